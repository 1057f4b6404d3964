"""Attention of packed requests in the expanded form, on a Hopper GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.checks import require_softmax_scale
from mla_jax.hal import TilePlanError
from pallas_kernels.hopper import device
from pallas_kernels.hopper.config import ITEMSIZE
from pallas_kernels.hopper.prefill.config import PrefillConfig
from pallas_kernels.hopper.prefill.kernel import prefill
from pallas_kernels.hopper.prefill.list_kernel import MOST_REQUESTS, list_tiles
from pallas_kernels.hopper.prefill.refs import PrefillCall
from pallas_kernels.hopper.prefill.work_items import WorkList, work_list
from pallas_kernels.modes import jit_with_defaults

OPTIONS = ("softmax_scale", "causal", "config", "interpret")
LEAST_QUERIES = 64  # rows that a copy of q has


def refusal(dtype: Any, *, nope_dim: int, rope_dim: int, v_dim: int) -> str | None:
    """Returns why the kernel can't take this dtype and these widths; None where it can."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, got {dtype.name}"
    try:
        PrefillConfig.of_widths(nope_dim, rope_dim, v_dim)
    except TilePlanError as error:
        return f"its tiles can't have these widths: {error}"
    return None


@jit_with_defaults(*OPTIONS)
def attend_ragged(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array | None,
    v: jax.Array | None,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    work: WorkList | None = None,
    *,
    softmax_scale: float,
    causal: bool,
    config: PrefillConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of packed requests, each of any length.

    The queries of a request are its last tokens: with a causal mask, query i of n sees its keys up
    to number kv_len - n + i. What a row must not see never reaches it, not even NaN. A row that
    sees a V that is not finite is NaN.

    Args:
        q: [Tq, H, nope_dim + rope_dim] bfloat16 or float16, not scaled.
        k_nope: [Tk, H, nope_dim] of q's dtype; or with v=None [Tk, H, nope_dim + v_dim], K and V
            side by side as kv_b_proj leaves them, which are read in place.
        k_rope: [Tk, rope_dim], shared by all heads; None: q has no such columns.
        v: [Tk, H, v_dim].
        cu_q_lens: [B + 1] int32: request b has the query rows cu_q_lens[b] .. cu_q_lens[b + 1] - 1.
        cu_kv_lens: [B + 1] int32, likewise its keys.
        softmax_scale: above 0.
        work: `plan` of these lengths; None: it is made here.
        config: of the kernel; None: `PrefillConfig.of_widths`.
        interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.

    Returns:
        o [Tq, H, v_dim] of q's dtype and lse [Tq, H] float32, natural log. Rows that see no key,
        and rows of no request, have o = 0 and lse = -inf. The rows of an invalid request
        (`mla_jax.ragged.requests.valid_requests`) are NaN.

    Raises:
        TypeError: a softmax_scale that is no number.
        ValueError: arrays of other shapes or dtypes, or another softmax_scale.
        TilePlanError: widths that the kernel can't have.
    """
    k_rope = None if k_rope is None or not k_rope.shape[1] else k_rope
    rope_dim = 0 if k_rope is None else k_rope.shape[1]
    nope_dim = q.shape[2] - rope_dim
    v_dim = k_nope.shape[2] - nope_dim if v is None else v.shape[2]
    config = config or PrefillConfig.of_widths(nope_dim, rope_dim, v_dim)
    _check(q, k_nope, k_rope, v, cu_q_lens, cu_kv_lens, config)
    # With a scale below 0 the mask's -inf would become the largest score.
    softmax_scale = require_softmax_scale(softmax_scale)
    num_queries, num_heads, _ = q.shape
    num_keys = k_nope.shape[0]
    if 0 in (num_queries, num_heads):
        lse = jnp.full((num_queries, num_heads), -jnp.inf, jnp.float32)
        return jnp.zeros((num_queries, num_heads, v_dim), q.dtype), lse
    if work is None:
        work = plan(
            cu_q_lens,
            cu_kv_lens,
            num_queries,
            num_keys,
            num_heads,
            config,
            causal=causal,
            interpret=interpret,
        )
    return prefill(
        PrefillCall(
            q=_at_least(q, LEAST_QUERIES),
            k_nope=_at_least(k_nope, config.block_keys),
            k_rope=None if k_rope is None else _at_least(k_rope, config.block_keys),
            v=None if v is None else _at_least(v, config.block_keys),
            work=work,
            num_queries=num_queries,
            softmax_scale=softmax_scale,
            causal=causal,
            config=config,
            num_ctas=device.num_sms() if interpret is None else 2,
            interpret=interpret,
        )
    )


def plan(
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    config: PrefillConfig,
    *,
    causal: bool,
    interpret: Any = None,
) -> WorkList:
    """Returns the work list of `attend_ragged`, which calls for several layers can share.

    On an NVIDIA GPU one kernel makes it. On other platforms, where `interpret` is given, and for
    more than `list_kernel.MOST_REQUESTS` requests it is made in JAX.
    """
    options: dict[str, Any] = {
        "num_queries": num_queries,
        "num_keys": num_keys,
        "causal": causal,
        "num_heads": num_heads,
        "bytes_per_key": (config.nope_dim + config.v_dim) * ITEMSIZE,
        "heads_at_once": config.heads_at_once,
    }
    bounds = cu_q_lens, cu_kv_lens
    if interpret is not None or not num_queries or len(cu_q_lens) - 1 > MOST_REQUESTS:
        return work_list(*bounds, **options)
    return lax.platform_dependent(
        *bounds,
        cuda=functools.partial(list_tiles, **options),
        default=functools.partial(work_list, **options),
    )


def _at_least(x: jax.Array, rows: int) -> jax.Array:
    """Returns x with rows of zeros behind it where it has fewer than a copy of the kernel."""
    spare = max(0, rows - x.shape[0])
    return jnp.pad(x, ((0, spare), *((0, 0) for _ in x.shape[1:]))) if spare else x


def _check(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array | None,
    v: jax.Array | None,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    config: PrefillConfig,
) -> None:
    """Raises ValueError for an array whose shape or dtype does not fit q or the config."""
    heads, keys = q.shape[1], k_nope.shape[0]
    width = config.nope_dim + (config.v_dim if v is None else 0)
    wanted = [
        ("q", q, (q.shape[0], heads, config.nope_dim + config.rope_dim), q.dtype),
        ("k_nope", k_nope, (keys, heads, width), q.dtype),
        ("cu_kv_lens", cu_kv_lens, cu_q_lens.shape, jnp.int32),
        ("cu_q_lens", cu_q_lens, (max(2, cu_q_lens.size),), jnp.int32),
    ]
    if k_rope is not None:
        wanted.append(("k_rope", k_rope, (keys, config.rope_dim), q.dtype))
    if v is not None:
        wanted.append(("v", v, (keys, heads, config.v_dim), q.dtype))
    for name, array, shape, dtype in wanted:
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} must be {jnp.dtype(dtype).name}{list(shape)}, got "
                f"{array.dtype.name}{list(array.shape)}"
            )
    reason = refusal(
        q.dtype, nope_dim=config.nope_dim, rope_dim=config.rope_dim, v_dim=config.v_dim
    )
    if reason is not None:
        raise ValueError(f"q, k_nope and v do not suit the Hopper prefill kernel: {reason}")
