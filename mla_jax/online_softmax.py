"""Softmax over keys that come block by block, and the merge of results over disjoint keys.

The recurrence is online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv
2205.14135). Per row it keeps the running maximum m, the sum l of e^(s - m), and the output O; when
m rises, what O holds must be scaled down, in one of two ways:
- "multiply": O <- O * e^(m_old - m_new).
- "exponent_add": AMLA (arXiv 2509.25224). O is kept at the scale 2^n, n = round(-m / ln 2), so the
  rescaling is an integer added to the bits of O: as_f32(as_i32(O) + N), N = (n_new - n_old) 2^23.
  What 2^n leaves of e^-m, the residual r = e^m 2^n in [2^-1/2, 2^1/2], goes into P before P is
  rounded to the values' dtype; what rounding r lost, c = r / round(r), is made up for in the same
  add, to first order (`compensate`).

Scores are natural-log logits; log-sum-exp (lse) values are natural logs in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

RESCALES = ("multiply", "exponent_add")

_LN2 = math.log(2.0)
_LN2_HIGH = 0.693359375  # 9 bits: an integer below 2^15 times it is exact in float32
_LN2_LOW = _LN2 - _LN2_HIGH
_MANTISSA_BITS = 23
_SMALLEST_NORMAL_BITS = 1 << _MANTISSA_BITS
_MAX_EXPONENT_DROP = 30  # what is 2^30 times smaller than what comes in is lost anyway
_MEAN_MANTISSA = 1.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxState:
    """The recurrence between two blocks; all float32, batch dims [...] and R rows."""

    m: jax.Array  # [..., R] running maximum of the scores; -inf before the first key
    l: jax.Array  # noqa: E741  [..., R] sum of e^(s - m)
    o: jax.Array  # [..., R, D_v] the output, still to be divided by l * residual
    residual: jax.Array  # [..., R] r as P was multiplied with it, rounded; 1 in "multiply"
    lost: jax.Array  # [..., R] c, what rounding the residual lost; 1 in "multiply"


def init_state(rows_shape: tuple[int, ...], value_dim: int) -> SoftmaxState:
    """No key yet. rows_shape [..., R]; value_dim D_v."""
    ones = jnp.ones(rows_shape, jnp.float32)
    return SoftmaxState(
        m=jnp.full(rows_shape, -jnp.inf, jnp.float32),
        l=jnp.zeros(rows_shape, jnp.float32),
        o=jnp.zeros((*rows_shape, value_dim), jnp.float32),
        residual=ones,
        lost=ones,
    )


def update(
    state: SoftmaxState,
    scores: jax.Array,
    values: jax.Array,
    *,
    rescale: str = "multiply",
    compensate: bool = True,
) -> SoftmaxState:
    """Takes in one block of T keys.

    Args:
        scores: [..., R, T] float32; -inf where the row must not see the key.
        values: [..., T, D_v]; rows that nobody sees must still be finite. P is rounded to their
            dtype before P V, which accumulates in float32.
        rescale: "multiply" or "exponent_add", the same in every block.
        compensate: in "exponent_add", make up for what rounding the residual lost.
    """
    new, p, factor = weigh(state, scores, values.dtype, rescale=rescale, compensate=compensate)
    return dataclasses.replace(new, o=rescale_output(state.o, factor) + weighted_sum(p, values))


def weigh(
    state: SoftmaxState,
    scores: jax.Array,
    dtype: Any,
    *,
    rescale: str = "multiply",
    compensate: bool = True,
) -> tuple[SoftmaxState, jax.Array, jax.Array]:
    """The first half of `update`, without the values: (state with its o as it was, P [..., R, T]
    rounded to `dtype`, what `rescale_output` wants for o [..., R])."""
    m = jnp.maximum(state.m, scores.max(-1))
    shift = jnp.where(m == -jnp.inf, 0.0, m)  # a row without a key keeps p = 0, not NaN
    p = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(state.m - shift)
    total = state.l * decay + p.sum(-1)
    if rescale == "multiply":
        return dataclasses.replace(state, m=m, l=total), p.astype(dtype), decay

    exact = _residual(shift)
    residual = exact.astype(dtype).astype(jnp.float32)
    lost = exact / residual
    drop = _exponent(shift) - _exponent(state.m)
    drop = jnp.where(state.m == -jnp.inf, 0.0, jnp.maximum(drop, -_MAX_EXPONENT_DROP))
    correction = _MEAN_MANTISSA * (state.lost / lost - 1.0) if compensate else jnp.zeros_like(lost)
    step = drop.astype(jnp.int32) * _SMALLEST_NORMAL_BITS
    step = step + jnp.rint(correction * float(_SMALLEST_NORMAL_BITS)).astype(jnp.int32)
    p = (p * residual[..., None]).astype(dtype)
    return SoftmaxState(m, total, state.o, residual, lost), p, step


def rescale_output(o: jax.Array, factor: jax.Array) -> jax.Array:
    """o [..., R, D_v] times a float32 factor [..., R], or with an int32 one added to its bits."""
    if factor.dtype == jnp.int32:
        return _add_to_bits(o, factor[..., None])
    return o * factor[..., None]


def finalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """o [..., R, D_v] and lse [..., R], float32; a row that saw no key has o = 0, lse = -inf."""
    seen = state.l != 0  # NaN stays NaN
    sums = jnp.where(seen, state.l, 1.0)
    o = jnp.where(seen[..., None], state.o / (sums * state.residual)[..., None], 0.0)
    return o, jnp.where(seen, state.m + jnp.log(sums), -jnp.inf)


def merge_states(o: jax.Array, lse: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint key sets, from the attention over each.

    Serves split-KV decode, a cached prefix beside a new chunk, and context parallelism.
    Associative; a part with lse = -inf counts for nothing, whatever its o holds. Merging a single
    part, or one with empty ones, gives its very bits.

    Args:
        o: [..., P, ..., D_v], normalised.
        lse: [..., P, ...] natural log.
        axis: where the P parts are, counted in lse's dims.

    Returns:
        o (o's dtype; summed in float32) and lse (float32) without that axis. If every part is
        empty: 0 and -inf.

    Raises ValueError where lse's shape is not o's without the last dim.
    """
    if o.shape[:-1] != lse.shape:
        raise ValueError(
            f"lse must be o's shape without the last = {o.shape[:-1]}, got {lse.shape}"
        )
    axis = axis % lse.ndim
    lse = lse.astype(jnp.float32)
    top = lse.max(axis, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - top)
    total = weights.sum(axis, keepdims=True)
    seen = total != 0  # NaN counts as seen: a part that is NaN stays loud
    divisor = jnp.where(seen, total, 1.0)
    parts = jnp.where((lse == -jnp.inf)[..., None], 0.0, o.astype(jnp.float32))
    merged = (parts * (weights / divisor)[..., None]).sum(axis)
    merged_lse = jnp.where(seen, top + jnp.log(divisor), -jnp.inf).squeeze(axis)
    return merged.astype(o.dtype), merged_lse


def _exponent(m: jax.Array) -> jax.Array:
    """n = round(-m / ln 2), an integer in float32; m is finite where it matters."""
    return jnp.round(m * (-1.0 / _LN2))


def _residual(m: jax.Array) -> jax.Array:
    """r = e^m 2^n in about [2^-1/2, 2^1/2], from m + n ln 2 with ln 2 in two parts."""
    n = _exponent(m)
    return jnp.exp((m + n * _LN2_HIGH) + n * _LN2_LOW)


def _add_to_bits(x: jax.Array, step: jax.Array) -> jax.Array:
    """x * 2^(step / 2^23), to first order in what is no whole power, by an integer add to its bits.

    Where the result would lie below the smallest normal number it is 0. A guard for x == 0 alone
    would not do: an exponent that falls past 0 runs into the sign bit. (The shipped kernel also
    adds 1e-6, against a conversion that truncates; the integer here is exact.)
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    return jnp.where(
        magnitude + step < _SMALLEST_NORMAL_BITS,
        0.0,
        lax.bitcast_convert_type(bits + step, jnp.float32),
    )


def weighted_sum(p: jax.Array, values: jax.Array) -> jax.Array:
    """P V: [..., R, T] @ [..., T, D_v], accumulated in float32; float32 inputs stay float32."""
    return jnp.matmul(
        p, values, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
