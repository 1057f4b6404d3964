"""The prefill op: attention over expanded keys and values of packed requests, and its gradients."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import numpy as np

from mla_jax import checks
from mla_jax.prefill.backward import attend_ragged
from mla_jax.prefill.registry import RAGGED_REGISTRY
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.ragged.requests import require_rising


@overload
def ragged_mla_attention(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: Literal[False] = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array: ...


@overload
def ragged_mla_attention(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: Literal[True],
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def ragged_mla_attention(
    q: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    cu_q_lens: jax.Array,
    cu_kv_lens: jax.Array,
    *,
    softmax_scale: float,
    causal: bool = True,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention over expanded keys and values of packed requests (prefill, training).

    The requests lie one after the other: request b has the queries cu_q_lens[b] ..
    cu_q_lens[b + 1] - 1 and the keys cu_kv_lens[b] .. cu_kv_lens[b + 1] - 1. Its queries are its
    last tokens, so that a request with more keys than queries is a chunk behind a prefix. A request
    may have no queries, or no keys. All sizes are static, and the bounds may be traced.

    Args:
        q: [Tq, H, nope + rope] = [q_nope | q_rope], not scaled; float32, bfloat16 or float16.
        k_nope: [Tk, H, nope] keys of each head, without position.
        k_rope: [Tk, rope] the part of the keys that all heads share; rope may be 0.
        v: [Tk, H, v_dim]. All four arrays have the same dtype.
        cu_q_lens: [B + 1] int32, from 0, rising, at most Tq. Queries past the last bound are
            padding.
        cu_kv_lens: [B + 1] int32, from 0, rising, at most Tk. Keys past the last bound are never
            used and may hold anything.
        softmax_scale: multiplies the scores (`MLAConfig.softmax_scale`); above 0 and known at
            trace time.
        causal: whether query i of n sees only the first kv_len - n + i + 1 keys of its request, the
            last of which is its own. A request then has at least as many keys as queries.
        return_lse: whether to return lse too.
        implementation: "hopper", "xla", or a list or tuple of these names, as in
            `paged_mla_attention`. None: ("hopper", "xla").

    Returns:
        o: [Tq, H, v_dim], q.dtype.
        lse: [Tq, H] float32, natural log of the sum of e^(scaled score); only with return_lse.
        Padding, and rows that see no key, have o = 0 and lse = -inf.

    Gradients of o and lse reach q, k_nope, k_rope and v, by plain JAX for every implementation, as
    in FlashAttention-2 (arXiv 2307.08691). The memory that they take is linear in the number of
    tokens. Invalid requests, padding and hidden keys have gradients of 0. Forward mode works too;
    second derivatives raise TypeError.

    Raises:
        TypeError: an argument of another type, a dtype other than those above, or mixed dtypes.
        ValueError: shapes or options that don't fit, implementations of which none can run, and,
            unless they are traced, bounds that do not start at 0, that fall or end past the arrays,
            or with causal a request with more queries than keys. Traced, such a request's rows are
            NaN.
    """
    _check_arrays(q, k_nope, k_rope, v, cu_q_lens, cu_kv_lens)
    causal = checks.require_bool("causal", causal)
    return_lse = checks.require_bool("return_lse", return_lse)
    names = RAGGED_REGISTRY.check_names(implementation)
    softmax_scale = checks.require_softmax_scale(softmax_scale)
    _check_bounds(q, v, cu_q_lens, cu_kv_lens, causal)
    problem = RaggedProblem(
        q=q,
        k_nope=k_nope,
        k_rope=k_rope,
        v=v,
        cu_q_lens=checks.snapshot(cu_q_lens),
        cu_kv_lens=checks.snapshot(cu_kv_lens),
        softmax_scale=softmax_scale,
        causal=causal,
    )
    choice = RAGGED_REGISTRY.choose(names, problem)
    o, lse = attend_ragged(problem, choice)
    return (o, lse) if return_lse else o


def _check_arrays(
    q: Any, k_nope: Any, k_rope: Any, v: Any, cu_q_lens: Any, cu_kv_lens: Any
) -> None:
    floats = {"q": q, "k_nope": k_nope, "k_rope": k_rope, "v": v}
    for name, value in floats.items():
        checks.require_array(name, value)
        checks.require_float(name, value)
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
    checks.require_shape("q", q, "[Tq, H, nope + rope]", None, None, None)
    heads, width = q.shape[1:]
    checks.require_shape("k_nope", k_nope, "[Tk, H, nope]", None, heads, None)
    keys, _, nope = k_nope.shape
    if nope > width:
        raise ValueError(f"k_nope must be [Tk, H, nope], nope at most q's {width}, got {nope}")
    checks.require_shape("k_rope", k_rope, "[Tk, rope] for q's nope + rope", keys, width - nope)
    checks.require_shape("v", v, "[Tk, H, v_dim]", keys, heads, None)
    for name in ("q", "k_nope", "v"):
        if 0 in floats[name].shape:
            raise ValueError(f"{name} must have no dim of 0, got {list(floats[name].shape)}")
    size = None
    for name, value in {"cu_q_lens": cu_q_lens, "cu_kv_lens": cu_kv_lens}.items():
        checks.require_array(name, value)
        checks.require_shape(name, value, "[B + 1]", size)
        checks.require_int32(name, value)
        size = checks.require_int(f"B + 1, the size of {name},", len(value), 2)


def _check_bounds(q: Any, v: Any, cu_q_lens: Any, cu_kv_lens: Any, causal: bool) -> None:
    """Raises ValueError for what `ragged.requests` finds invalid, as far as it is known now."""
    packed = {"cu_q_lens": ("q", q, cu_q_lens), "cu_kv_lens": ("v", v, cu_kv_lens)}
    for name, (of, array, bounds) in packed.items():
        if checks.is_concrete(bounds):
            require_rising(name, np.asarray(bounds), of, len(array))
    if causal and checks.is_concrete(cu_q_lens, cu_kv_lens):
        queries, keys = np.diff(np.asarray(cu_q_lens)), np.diff(np.asarray(cu_kv_lens))
        for request in np.flatnonzero(queries > keys):
            raise ValueError(
                "cu_q_lens must give no request more queries than cu_kv_lens gives it keys where "
                f"causal, got {queries[request]} queries and {keys[request]} keys in request "
                f"{request}"
            )
