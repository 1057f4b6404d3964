"""`jnp`, the baseline in plain JAX: absorbed attention over contiguous KV, compiled by XLA."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.speed import timing
from experiments.speed.decode.bursts import LONG_BURST, estimated_seconds
from experiments.speed.decode.pools import array_struct
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.shapes import Shape


def jnp_step(kv_lora_rank: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns absorbed attention over contiguous KV, as a JAX user writes it.

    The function is (q [B, S, H, D], kv [B, T, D], seq_lens [B]) -> (o, lse).
    """

    def step(q: jax.Array, kv: jax.Array, seq_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("bshd,btd->bsht", q, kv, preferred_element_type=jnp.float32) * SCALE
        token = jnp.arange(q.shape[1], dtype=jnp.int32)
        visible = seq_lens[:, None] - q.shape[1] + token + 1  # [B, S]
        seen = jnp.arange(kv.shape[1]) < visible[:, :, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(kv.dtype)
        o = jnp.einsum("bsht,btd->bshd", weights, kv[..., :kv_lora_rank])
        return o, jax.nn.logsumexp(scores, axis=-1)

    return step


def contiguous(row: Shape, setup: Setup) -> tuple[tuple[int, int, int], int]:
    """Returns the shape [B, T, D] of the KV that `jnp` reads, and the number of layers."""
    longest = max(row.seq_lens)
    layer_bytes = row.batch * longest * 2 * setup.width
    layers = min(max(2, math.ceil(setup.rotate / layer_bytes)), setup.max_layers)
    return (row.batch, longest, setup.width), layers


def lacks_contiguous_memory(row: Shape, setup: Setup) -> str | None:
    """Returns why KV and scores of `jnp` do not fit beside the caches, or None if they do."""
    (batch, longest, width), layers = contiguous(row, setup)
    scores = batch * row.s_q * row.heads * longest * 12  # bytes: float32 twice, and XLA's copy
    needed = batch * longest * width * 2 * layers + scores
    if needed <= setup.memory / 2:
        return None
    return f"contiguous KV and scores take {needed / 2**30:.1f} GiB"


def compile_jnp(row: Shape, setup: Setup) -> timing.ModelProgram:
    """Compiles the burst of `jnp` for this row's lengths."""
    shape, layers = contiguous(row, setup)
    q = array_struct((row.batch, row.s_q, row.heads, setup.width), jnp.bfloat16)
    kv = [array_struct(shape, jnp.bfloat16)] * layers
    launches = min(setup.launches // 2, LONG_BURST / (5 * estimated_seconds(row, setup)))
    return timing.compile_model(
        jnp_step(setup.kv_lora_rank),
        q,
        kv,
        array_struct((row.batch,), jnp.int32),
        passes=max(1, round(launches / layers)),
    )
