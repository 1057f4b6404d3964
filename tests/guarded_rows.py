"""Runs a Hopper kernel into outputs with guards, for any number of query rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hopper_batch import SCALE, HopperBatch
from int8_batch import Int8Batch

from mla_jax import plan_splits
from pallas_kernels.hopper import attention, int8

GUARD_ROWS = 136  # behind each request: more than what a tile of two CTAs has
GUARD = 7.25  # which no result is
KERNELS = ("float", "int8")
# One request of a single block, one of many: of the plan for two workers, the first one's tiles are
# left whole and the second one's are split. The last one has no key.
SEQ_LENS = [40, 330, 0]


def tokens_of(rows: int) -> int:
    """A number of tokens that divides the rows, so that heads and tokens both vary."""
    return next(tokens for tokens in (3, 2, 1) if rows % tokens == 0)


def check_rows(
    kind: str, rows: int, rows_per_tile: int, *, workers: int = 2, interpret: Any = None
) -> None:
    """Raises AssertionError unless the kernel's rows are right and its guards are as they were.

    kind: one of KERNELS. The latent of a cache of floats is 128 wide here, which has the same
    stores as 512 and compiles in a third of the time.
    """
    rng = np.random.default_rng([rows, rows_per_tile])
    tokens = tokens_of(rows)
    lens = [max(tokens, length) if length else 0 for length in SEQ_LENS]
    shape = {"heads": rows // tokens, "num_queries": tokens, "query_lens": [tokens, 1, 0]}
    if kind == "int8":
        batch: Any = Int8Batch(rng, lens, **shape)
        run: Any = functools.partial(int8.attend_int8.__wrapped__)
    else:
        batch = HopperBatch(rng, lens, kv_lora_rank=128, **shape)
        run = functools.partial(attention.attend.__wrapped__, kv_lora_rank=128)
    plan = plan_splits(
        batch.seq_lens, num_workers=workers, rows=rows, rows_per_tile=rows_per_tile, overhead=1
    )
    run = functools.partial(
        run, num_heads=rows // tokens, softmax_scale=SCALE, causal=True, interpret=interpret
    )
    arrays = batch.cache.arrays().values()
    lengths = batch.block_tables, batch.seq_lens, batch.query_lens
    q = batch.q.reshape(len(lens), rows, -1)
    new_outputs = attention.new_outputs
    attention.new_outputs = _guarded_outputs
    try:
        o, lse = jax.jit(run)(q, *arrays, *lengths, plan)
    finally:
        attention.new_outputs = new_outputs
    for name, output in (("o", o), ("lse", lse)):
        guards = np.array(output, np.float32)
        guards[: len(lens), :rows] = GUARD
        hit = np.argwhere(guards != GUARD)
        assert not len(hit), f"{name} was written at {hit[0].tolist()} and {len(hit) - 1} others"
    batch.check(o[: len(lens), :rows], lse[: len(lens), :rows])


def _guarded_outputs(batch: int, rows: int, kv_lora_rank: int, dtype: Any) -> tuple[Any, Any]:
    """As `attention.new_outputs`, with guard rows behind each request and a request of guards."""
    shape = batch + 1, rows + GUARD_ROWS
    o = jnp.full((*shape, kv_lora_rank), GUARD, dtype)
    return jax.new_ref(o), jax.new_ref(jnp.full(shape, GUARD, jnp.float32))
