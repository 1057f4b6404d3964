"""int8 with float32 scales: value = int8 * scale. The one place of these formulas.

Symmetric, without a zero point: int8 in -127 .. 127, rounded to nearest, ties to even, and
scale = amax / 127, where amax is the largest magnitude of what shares the scale. A latent shares
it within a token ("token"), within a token and GROUP columns ("group"), or over the whole cache
("tensor", then known beforehand from calibration).

The same pair of functions rounds a query (a scale each token and head) and a row of softmax
weights (a scale each row and block, as Ascend's kernel does it).

`hadamard` spreads what a few columns hold over all, which is what a scale a token wants
(QuaRot, arXiv 2404.00456).

Rounding to int8 has no derivative: int8 carries none, and what reached the scales alone would be
wrong. `quantize` and `quantize_in_halves` therefore refuse to be differentiated with respect to
the values. `dequantize` has a derivative with respect to the scales.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import checks

GRANULARITIES = ("token", "group", "tensor")
GROUP = 128  # columns
LARGEST = 127
HALF = 128  # steps of the lower half of 14 bits in one of the upper half
LARGEST_HIGH = 63  # of the upper half

# Written as products: XLA makes them of divisions by a constant, but under jit only.
_STEP = np.float32(1 / LARGEST)
_SMALLEST_AMAX = np.float32(2.0**-100)  # below it amax / 127 nears the subnormal numbers
_SMALLEST_OF_HALVES = np.float32(2.0**-60)  # bfloat16 beside it can be divided by its step


def _without_derivative(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises TypeError where it is differentiated by its first argument."""
    refusing = jax.custom_jvp(function)

    @functools.partial(refusing.defjvp, symbolic_zeros=True)
    def refuse(primals: tuple, tangents: tuple) -> Any:
        if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
            raise TypeError(
                "rounding to int8 has no derivative, and an int8 cache carries none: apply "
                "jax.lax.stop_gradient to what is rounded (the rows that are appended), or use a "
                "cache of float32, bfloat16 or float16"
            )
        out = refusing(*primals)
        return out, jax.tree.map(_zero_tangent, out)

    return refusing


def _zero_tangent(x: jax.Array) -> Any:
    return jax.custom_derivatives.zero_from_primal(x, symbolic_zeros=True)


def scale_for(amax: jax.Array) -> jax.Array:
    """The scale, float32, for values of magnitude up to amax.

    It is 1 / 127, a scale that makes them 0, where amax is 0 or next to nothing; NaN stays NaN.
    """
    amax = amax.astype(jnp.float32)
    return jnp.where(amax < _SMALLEST_AMAX, jnp.float32(1), amax) * _STEP


def scales_of(x: jax.Array, granularity: str) -> jax.Array:
    """Scales, float32, that fit x [..., D]: "token" [...], "group" [..., D / GROUP], "tensor" [].

    That of "tensor" is measured over all of x: calibration.

    Raises TypeError for x that is no array of float32, bfloat16 or float16, ValueError for another
    granularity or a D that "group" does not divide.
    """
    x = _floats(x)
    checks.require_one_of("granularity", granularity, GRANULARITIES)
    if granularity == "group" and x.shape[-1] % GROUP:
        raise ValueError(
            f"the last dim of x must be a multiple of {GROUP} with granularity group, got "
            f"{x.shape[-1]}"
        )
    amax = jnp.abs(x.astype(jnp.float32))
    if granularity == "tensor":
        return scale_for(amax.max())
    if granularity == "group":
        amax = amax.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    return scale_for(amax.max(-1))


def quantize(x: jax.Array, scales: jax.Array) -> jax.Array:
    """int8 of x [..., D] in steps of `scales`, in any of the shapes of `scales_of`.

    What lies past 127 steps (only a "tensor" scale lets it) becomes +-127. int8 holds no NaN: of a
    NaN the scales of `scales_of` tell, and with a "tensor" scale from elsewhere it becomes 0.

    Raises TypeError for x or scales that are no arrays of float32 (x also bfloat16, float16), and
    where it is differentiated by x; ValueError for scales of another shape.
    """
    x = _floats(x)
    return _rounded(x, _scales(scales, x))


@_without_derivative
def _rounded(x: jax.Array, scales: jax.Array) -> jax.Array:
    steps = jnp.rint(x.astype(jnp.float32) / spread(scales, x))
    steps = jnp.where(jnp.isnan(steps), 0, steps)
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8)


def step_of_halves(amax: jax.Array) -> jax.Array:
    """The step, float32, in which `quantize_in_halves` holds values of magnitude up to amax.

    A power of two, so that to divide by it costs nothing of any value. What is not finite comes to
    nothing that is: its step is 0.
    """
    least = jnp.maximum(amax.astype(jnp.float32), _SMALLEST_OF_HALVES)
    bits = lax.bitcast_convert_type(least * np.float32(1 / (LARGEST_HIGH * HALF)), jnp.int32)
    step = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(amax < jnp.inf, step, 0.0)


def quantize_in_halves(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., D] in 14 bits, as two int8 [..., D] and a step [...]: (HALF * high + low) * step.

    high in -63 .. 63, low in -64 .. 64. For products with int8 that must not lose what x has: each
    of high . k and low . k is below 2^22 for up to 512 columns, so that float32 holds it, and
    HALF * (high . k) + low . k is exact in int32. Raises TypeError for x that is no float array,
    and where it is differentiated.
    """
    return _halves(_floats(x))


@_without_derivative
def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    steps = step_of_halves(jnp.abs(x.astype(jnp.float32)).max(-1))
    whole = jnp.rint(x.astype(jnp.float32) / spread(steps, x))
    high = jnp.rint(whole * np.float32(1 / HALF))
    return high.astype(jnp.int8), (whole - HALF * high).astype(jnp.int8), steps


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 of int8 values [..., D], with scales in any of the shapes of `scales_of`.

    Raises TypeError for values that are no int8 array or scales that are no float32 array,
    ValueError for scales of another shape.
    """
    if getattr(values, "dtype", None) != jnp.int8:
        raise TypeError(
            f"values must be an int8 array, got {getattr(values, 'dtype', type(values).__name__)}"
        )
    scales = _scales(scales, values)
    return values.astype(jnp.float32) * spread(scales, values)


def spread(scales: jax.Array, values: jax.Array) -> jax.Array:
    """scales in a shape that broadcasts with values [..., D]."""
    if scales.ndim == values.ndim:
        return jnp.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
    return scales[..., None]


def _floats(x: Any) -> jax.Array:
    """x as a JAX array of one of FLOAT_DTYPES with at least one dim; raises otherwise."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"x must be an array, got {type(x).__name__}")
    x = jnp.asarray(x)
    checks.require_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., D], got shape []")
    return x


def _scales(scales: Any, values: Any) -> jax.Array:
    """scales as a JAX array; raises unless it is float32 and fits values [..., D]."""
    if not isinstance(scales, jax.Array | np.ndarray | np.floating):
        raise TypeError(f"scales must be an array, got {type(scales).__name__}")
    scales, (*batch, width) = jnp.asarray(scales), values.shape
    if scales.dtype != jnp.float32:
        raise TypeError(f"scales must be float32, got {scales.dtype}")
    groups = scales.shape[-1] if scales.ndim == len(batch) + 1 else 1
    if scales.shape not in ((), (*batch,), (*batch, groups)) or groups < 1 or width % groups:
        raise ValueError(
            f"scales must be [] or {batch} or {batch} and a divisor of {width} for values "
            f"{list(values.shape)}, got shape {list(scales.shape)}"
        )
    return scales


def hadamard(width: int) -> np.ndarray:
    """[width, width] float64: orthogonal, symmetric, all entries of one magnitude (Sylvester).

    Raises ValueError unless width is a power of 2.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"the width of a Hadamard matrix must be a power of 2, got {width}")
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(width)
