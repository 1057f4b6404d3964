"""Softmax over keys that are read block by block, and the merge of results over disjoint keys.

The recurrence is online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv
2205.14135). Per row it keeps the running maximum m, the sum l of e^(s - m), and the output O. When
m rises, O must be scaled down, in one of two ways:
- "multiply": O <- O * e^(m_old - m_new).
- "exponent_add": AMLA (arXiv 2509.25224) adds an integer to the bits of O.

AMLA stores r O, with a residual r in [2^-1/2, 2^1/2]. The factor between two blocks is then a power
of two, 2^-k with k = round(log2(r_old e^(m_new - m_old))), and O is rescaled by
as_f32(as_i32(O) - k 2^23). The new residual is r = r_old e^(m_new - m_old) 2^-k. P is multiplied by
it before P is rounded to the values' dtype. Rounding r loses the factor c = r / round(r), and the
same addition corrects for it to first order (`compensate`). The derivative is that of "multiply".

The paper takes r = e^m 2^n with n = round(-m / ln 2). Differences of maxima give the same k without
the product n ln 2, which is inexact in float32 for large scores. So every finite score is allowed.

Scores and values that are not finite have these results:
- A score of -inf has weight 0, like a key that the row must not see. A row with scores of -inf only
  has o = 0 and lse = -inf, like a row without a key.
- A score of +inf or NaN makes o and lse of its row NaN.
- An infinite or NaN value affects the rows that see its key and no other row.

Scores are natural-log logits; log-sum-exp (lse) values are natural logs in float32.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import checks

RESCALES = ("multiply", "exponent_add")

_LN2 = math.log(2.0)
_LN2_HIGH = 0.693359375  # has 9 bits: its product with an integer below 2^15 is exact in float32
_LN2_LOW = _LN2 - _LN2_HIGH
_MANTISSA_BITS = 23
_SMALLEST_NORMAL_BITS = 1 << _MANTISSA_BITS
_INFINITY_BITS = 0x7F800000
_FARTHEST_DROP = 254  # largest k: it makes every float32 less than the smallest normal number
# Adding d 2^23 to the bits of x adds d 2^exponent, which is x d / mantissa. The correction assumes
# the mean mantissa.
_MEAN_MANTISSA = 1.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxState:
    """The state of the recurrence after a block; float32, batch dims [...] and R rows."""

    m: jax.Array  # [..., R] running maximum of the scores; -inf before the first key
    l: jax.Array  # noqa: E741  [..., R] sum of e^(s - m)
    o: jax.Array  # [..., R, D_v] the output before division by l * residual
    residual: jax.Array  # [..., R] r, rounded to the dtype of P; 1 in "multiply"
    lost: jax.Array  # [..., R] c, the factor lost in rounding the residual; 1 in "multiply"


def init_state(rows_shape: tuple[int, ...], value_dim: int) -> SoftmaxState:
    """Returns the state before the first key, for rows [..., R] and value_dim D_v."""
    rows_shape = checks.require_ints("rows_shape", rows_shape, 0)
    value_dim = checks.require_positive("value_dim", value_dim)
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
    """Updates the state with one block of T keys.

    Args:
        state: of rows [..., R] with outputs of D_v values.
        scores: [..., R, T] float32; -inf where the row must not see the key.
        values: [..., T, D_v] float32, bfloat16 or float16. The values of a key may hold anything
            for the rows that must not see it. P is rounded to their dtype before P V, which
            accumulates in float32.
        rescale: "multiply" or "exponent_add", the same in every block.
        compensate: whether "exponent_add" corrects for the rounding of the residual.

    Raises:
        TypeError: an argument that is not an array, or of another dtype.
        ValueError: shapes that do not fit, or another `rescale`.
    """
    scores, values = _check_block(state, scores, values)
    checks.require_one_of("rescale", rescale, RESCALES)
    checks.require_bool("compensate", compensate)
    finite = jnp.isfinite(values)
    options: dict[str, Any] = {"rescale": rescale, "compensate": compensate}
    new = accumulate(state, scores, jnp.where(finite, values, 0), **options)
    return lax.cond(
        finite.all(),
        lambda: new,
        lambda: dataclasses.replace(new, o=new.o + _infinities(scores, values)),
    )


def accumulate(
    state: SoftmaxState,
    scores: jax.Array,
    values: jax.Array,
    *,
    rescale: str,
    compensate: bool = True,
) -> SoftmaxState:
    """Computes `update` without checks, for values that are finite if any row must not see them."""
    if rescale == "multiply":
        return _recurrence(rescale, compensate, state, scores, values)
    return _exponent_add(compensate, state, scores, values)


def _recurrence(
    rescale: str, compensate: bool, state: SoftmaxState, scores: jax.Array, values: jax.Array
) -> SoftmaxState:
    new, p, factor = weigh(state, scores, values.dtype, rescale=rescale, compensate=compensate)
    return dataclasses.replace(new, o=rescale_output(state.o, factor) + weighted_sum(p, values))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _exponent_add(
    compensate: bool, state: SoftmaxState, scores: jax.Array, values: jax.Array
) -> SoftmaxState:
    return _recurrence("exponent_add", compensate, state, scores, values)


@_exponent_add.defjvp
def _derivative_of_multiply(
    compensate: bool, primals: tuple, tangents: tuple
) -> tuple[SoftmaxState, SoftmaxState]:
    """Differentiates O = o / residual through the multiplication that the integer add replaces.

    The new residual counts as a constant. It multiplies o here, and `finalize` divides by it.
    """
    new = _exponent_add(compensate, *primals)

    def multiply(state: SoftmaxState, scores: jax.Array, values: jax.Array) -> SoftmaxState:
        ones = jnp.ones_like(new.residual)
        state = dataclasses.replace(
            state, o=state.o / state.residual[..., None], residual=ones, lost=ones
        )
        after = _recurrence("multiply", compensate, state, scores, values)
        return dataclasses.replace(after, o=after.o * new.residual[..., None])

    return new, jax.jvp(multiply, primals, tangents)[1]


def weigh(
    state: SoftmaxState,
    scores: jax.Array,
    dtype: Any,
    *,
    rescale: str = "multiply",
    compensate: bool = True,
) -> tuple[SoftmaxState, jax.Array, jax.Array]:
    """Computes the first half of `update`, which does not need the values.

    Returns:
        The new state with the old o, P [..., R, T] rounded to `dtype`, and the factor [..., R] of o
        for `rescale_output`.
    """
    # The results do not depend on m, so that it has no derivative. That of a maximum would be NaN
    # where XLA computes the scores twice and they differ in the last bit.
    m = lax.stop_gradient(jnp.maximum(state.m, scores.max(-1)))
    shift = jnp.where(m == -jnp.inf, 0.0, m)  # for a row without a key p is 0 instead of NaN
    p = jnp.exp(scores - shift[..., None])
    decay = jnp.exp(state.m - shift)
    total = state.l * decay + p.sum(-1)
    if rescale == "multiply":
        return dataclasses.replace(state, m=m, l=total), p.astype(dtype), decay

    exact, drop = _next_residual(state.residual * state.lost, shift - state.m)
    residual = exact.astype(dtype).astype(jnp.float32)
    lost = exact / residual
    correction = _MEAN_MANTISSA * (state.lost / lost - 1.0) if compensate else jnp.zeros_like(lost)
    step = jnp.rint(correction * float(_SMALLEST_NORMAL_BITS)).astype(jnp.int32)
    step = step - drop * _SMALLEST_NORMAL_BITS
    p = (p * residual[..., None]).astype(dtype)
    return SoftmaxState(m, total, state.o, residual, lost), p, step


def rescale_output(o: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies o [..., R, D_v] by a float32 factor [..., R], or adds an int32 one to its bits.

    An infinite o stays infinite, also if the factor underflows to 0.
    """
    if factor.dtype == jnp.int32:
        return _add_to_bits(o, factor[..., None])
    return jnp.where(jnp.isinf(o), o, o * factor[..., None])


def finalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """Returns o [..., R, D_v] and lse [..., R], float32; o is 0 and lse -inf without a key."""
    checks.require_type("state", state, SoftmaxState)
    seen = state.l != 0  # NaN stays NaN
    sums = jnp.where(seen, state.l, 1.0)
    o = jnp.where(seen[..., None], state.o / (sums * state.residual)[..., None], 0.0)
    return o, jnp.where(seen, state.m + jnp.log(sums), -jnp.inf)


def merge_states(o: jax.Array, lse: jax.Array, axis: int = 0) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint sets of keys into attention over their union.

    Uses are split-KV decode, a cached prefix next to a new chunk, and context parallelism. The
    merge is associative. A part with lse = -inf is ignored, whatever its o holds. Merging a single
    part, or one part with empty ones, returns the same bits. The weights of the parts are as
    accurate as lse is in float32: off by up to 0.4 % if lse is about 1e5.

    Args:
        o: [..., P, ..., D_v], normalised; float32, bfloat16 or float16.
        lse: [..., P, ...] natural log, of the same dtypes.
        axis: the axis of the P parts in lse, of size 1 or more.

    Returns:
        o in its dtype, summed in float32, and lse in float32, both without that axis. They are 0
        and -inf if every part is empty.

    Raises:
        TypeError: o or lse is not an array of those dtypes, or axis is not an integer.
        ValueError: lse does not have o's shape without the last dim, or axis is out of range.
    """
    o, lse = _float_array("o", o), _float_array("lse", lse)
    if o.shape[:-1] != lse.shape or o.ndim < 2:
        raise ValueError(
            f"lse must be o's shape without the last = {o.shape[:-1]} and have an axis of parts, "
            f"got {lse.shape}"
        )
    axis = checks.require_int("axis", axis, -lse.ndim, lse.ndim - 1) % lse.ndim
    checks.require_positive("the number of parts", lse.shape[axis])
    lse = lse.astype(jnp.float32)
    top = lax.stop_gradient(lse.max(axis, keepdims=True))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = jnp.exp(lse - top)
    total = weights.sum(axis, keepdims=True)
    seen = total != 0  # NaN counts as seen, so that a part of NaN is not hidden
    divisor = jnp.where(seen, total, 1.0)
    weighted = _weighted(o, lse, weights / divisor)
    merged_lse = jnp.where(seen, top + jnp.log(divisor), -jnp.inf).squeeze(axis)
    return weighted.sum(axis).astype(o.dtype), merged_lse


def merge_pair(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Merges two parts (o, lse) as `merge_states` does, and returns o and lse in float32.

    It has no axis of parts, so that a loop can update the first part in place.
    """
    top = lax.stop_gradient(jnp.maximum(first[1], second[1]))
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(lse - top) for _, lse in (first, second)]
    total = weights[0] + weights[1]
    seen = total != 0
    divisor = jnp.where(seen, total, 1.0)
    o = _weighted(*first, weights[0] / divisor) + _weighted(*second, weights[1] / divisor)
    return o, jnp.where(seen, top + jnp.log(divisor), -jnp.inf)


def _weighted(o: jax.Array, lse: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns o times its weight in float32; 0 where lse is -inf, and infinities as they are."""
    o = jnp.where((lse == -jnp.inf)[..., None], 0.0, o.astype(jnp.float32))
    return jnp.where(jnp.isinf(o), o, o * weight[..., None])


def mark_nonfinite(o: jax.Array, lse: jax.Array, seen: jax.Array, values: jax.Array) -> jax.Array:
    """Returns o with NaN where a row sees a key whose value in that column is infinite or NaN.

    It corrects attention that replaced such values by 0, which keeps them away from rows that must
    not see them. NaN is the right result, because values are part of their key, so that the score
    is not finite either. A score of NaN or +inf has already made the row NaN. With a score of -inf,
    the weight 0 times the value is NaN.

    Args:
        o: [..., R, D_v] float32.
        lse: [..., R] float32; rows with lse = -inf are unchanged.
        seen: [..., R, T] bool, whether a row sees a key.
        values: [..., T, D_v].
    """
    nonfinite = ~jnp.isfinite(values)

    def marked() -> jax.Array:
        marks = _any_seen(seen, nonfinite) & (lse != -jnp.inf)[..., None]
        return jnp.where(marks, jnp.nan, o)

    return lax.cond(nonfinite.any(), marked, lambda: o)


def common_dtype(a: jax.Array, b: jax.Array) -> Any:
    """Returns the dtype in which queries and keys are multiplied, also in strict promotion.

    It is their common dtype, or float32 if they differ.
    """
    return a.dtype if a.dtype == b.dtype else jnp.dtype(jnp.float32)


def weighted_sum(p: jax.Array, values: jax.Array) -> jax.Array:
    """Returns P V, [..., R, T] @ [..., T, D_v], accumulated in float32 without rounding inputs."""
    return jnp.matmul(
        p, values, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _infinities(scores: jax.Array, values: jax.Array) -> jax.Array:
    """Returns the sum of the values that are not finite, per row that sees them: [..., R, D_v].

    It is 0, inf, -inf or NaN in float32. A row that sees both infinities gets NaN.
    """
    seen, nan = scores != -jnp.inf, jnp.isnan(values)
    above = _any_seen(seen, nan | (values == jnp.inf))
    below = _any_seen(seen, nan | (values == -jnp.inf))
    infinity, zero = jnp.float32(jnp.inf), jnp.float32(0)
    return jnp.where(above, infinity, zero) - jnp.where(below, infinity, zero)


def _any_seen(seen: jax.Array, found: jax.Array) -> jax.Array:
    """Returns whether a row sees a key of `found`, [..., R, D] bool.

    seen: [..., R, T] bool. found: [..., T, D] bool, per key and column.
    """
    return weighted_sum(seen.astype(jnp.bfloat16), found.astype(jnp.bfloat16)) > 0


def _next_residual(exact: jax.Array, rise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the residual after the maximum rose by `rise` >= 0, and k as int32.

    A rise that leaves nothing of O keeps the residual. The rise of inf in the first block is one.
    """
    k = jnp.round(rise * (1.0 / _LN2) + jnp.log2(exact))
    near = k <= _FARTHEST_DROP
    k = jnp.where(near, k, float(_FARTHEST_DROP))
    rest = jnp.where(near, (rise - k * _LN2_HIGH) - k * _LN2_LOW, 0.0)
    return exact * jnp.exp(rest), k.astype(jnp.int32)


def _add_to_bits(x: jax.Array, step: jax.Array) -> jax.Array:
    """Multiplies x by 2^(step / 2^23) by adding `step` to its bits.

    The result is exact for a whole power of two and otherwise right to first order. A result below
    the smallest normal number becomes 0. A check for x == 0 alone would not suffice, because an
    exponent that falls below 0 changes the sign bit. Infinities and NaN are unchanged. The
    published AMLA kernel also adds 1e-6 because its conversion to an integer truncates. Here the
    integer is exact.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    moved = jnp.where(
        magnitude + step < _SMALLEST_NORMAL_BITS,
        0.0,
        lax.bitcast_convert_type(bits + step, jnp.float32),
    )
    return jnp.where(magnitude >= _INFINITY_BITS, x, moved)


def _float_array(name: str, value: Any) -> jax.Array:
    """Returns the value as a JAX array; raises TypeError unless it is an array of a float dtype."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    array = jnp.asarray(value)
    checks.require_float(name, array)
    return array


def _check_block(state: Any, scores: Any, values: Any) -> tuple[jax.Array, jax.Array]:
    """Returns scores and values as JAX arrays; raises as `update` does."""
    checks.require_type("state", state, SoftmaxState)
    scores, values = _float_array("scores", scores), _float_array("values", values)
    if scores.dtype != jnp.float32:
        raise TypeError(f"scores must be an array of float32, got {scores.dtype}")
    rows, width = state.m.shape, state.o.shape[-1]
    words = f"[..., R, T] for the state's rows [..., R] = {list(rows)}"
    if scores.ndim < 2 or scores.shape[:-1] != rows or scores.shape[-1] == 0:
        raise ValueError(f"scores must be {words}, T at least 1, got shape {list(scores.shape)}")
    wanted = (*rows[:-1], scores.shape[-1], width)
    batch = (1,) * (len(wanted) - values.ndim) + values.shape[:-2]
    fits = values.ndim >= 2 and values.shape[-2:] == wanted[-2:] and len(batch) == len(rows) - 1
    if not fits or any(size not in (1, most) for size, most in zip(batch, rows, strict=False)):
        raise ValueError(
            f"values must be [..., T, D_v] that broadcasts to {list(wanted)}, got shape "
            f"{list(values.shape)}"
        )
    return scores, values
