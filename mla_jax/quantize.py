"""int8 quantization with float32 scales: value = int8 * scale. All code uses these functions.

Quantization is symmetric, without a zero point. int8 values are in -127 .. 127, rounded to nearest,
ties to even. The scale is amax / 127, where amax is the largest magnitude among the values that
share the scale. Values of a latent share a scale within a token ("token"), within a token and GROUP
columns ("group"), or in the whole cache ("tensor", a scale known beforehand from calibration).

The same functions quantize a query, with one scale per token and head, and a row of softmax
weights, with one scale per row and block as in Ascend's kernel.

`hadamard` rotates a vector so that the content of a few columns spreads over all of them. One scale
per token is then more accurate (QuaRot, arXiv 2404.00456).

Rounding to int8 has no derivative. int8 carries none, and a derivative through the scales alone
would be wrong. `quantize` and `quantize_in_halves` therefore raise if they are differentiated with
respect to the values. `dequantize` has a derivative with respect to the scales.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import checks
from mla_jax.derivatives import without_derivative

GRANULARITIES = ("token", "group", "tensor")
GROUP = 128  # columns
LARGEST = 127
HALF = 128  # the factor of the upper 7 of 14 bits
LARGEST_HIGH = 63  # largest value of the upper bits

# Divisions by these constants are written as products. XLA would make them products under jit, but
# not in eager calls, and the bits would differ.
_STEP = np.float32(1 / LARGEST)
_SMALLEST_AMAX = np.float32(2.0**-100)  # for less, amax / 127 comes close to subnormal numbers
_SMALLEST_OF_HALVES = np.float32(2.0**-60)  # a bfloat16 value can be divided by the resulting step


# The values are those of the first argument.
_without_derivative = functools.partial(
    without_derivative,
    message=(
        "rounding to int8 has no derivative, and an int8 cache carries none: apply "
        "jax.lax.stop_gradient to what is rounded (the rows that are appended), or use a cache of "
        "float32, bfloat16 or float16"
    ),
    of=slice(1),
)


def scale_for(amax: jax.Array) -> jax.Array:
    """Returns the float32 scale for values of magnitude up to amax.

    For an amax of almost 0 it is 1 / 127, which quantizes the values to 0. NaN stays NaN.
    """
    amax = amax.astype(jnp.float32)
    return jnp.where(amax < _SMALLEST_AMAX, jnp.float32(1), amax) * _STEP


def scales_of(x: jax.Array, granularity: str) -> jax.Array:
    """Returns float32 scales for x [..., D]: "token" [...], "group" [..., D / GROUP], "tensor" [].

    The scale of "tensor" is that of all values in x, which is how to calibrate one.

    Raises TypeError unless x is an array of float32, bfloat16 or float16. Raises ValueError for
    another granularity, or if "group" does not divide D.
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
    """Quantizes x [..., D] to int8 with `scales` in any of the shapes that `scales_of` returns.

    Values above 127 steps become +-127, which can only happen with a "tensor" scale. int8 has no
    NaN. The scales of `scales_of` are NaN where x is. With another "tensor" scale NaN becomes 0.

    Raises TypeError unless scales are float32 and x is float32, bfloat16 or float16, and if it is
    differentiated in x. Raises ValueError for scales of another shape.
    """
    x = _floats(x)
    return _rounded(x, _scales(scales, x))


@_without_derivative
def _rounded(x: jax.Array, scales: jax.Array) -> jax.Array:
    steps = jnp.rint(x.astype(jnp.float32) / spread(scales, x))
    steps = jnp.where(jnp.isnan(steps), 0, steps)
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8)


def step_of_halves(amax: jax.Array) -> jax.Array:
    """Returns the float32 step of `quantize_in_halves` for values of magnitude up to amax.

    It is a power of two, so that dividing by it is exact. For an amax of NaN or infinity it is 0,
    because no step can represent such values.
    """
    least = jnp.maximum(amax.astype(jnp.float32), _SMALLEST_OF_HALVES)
    bits = lax.bitcast_convert_type(least * np.float32(1 / (LARGEST_HIGH * HALF)), jnp.int32)
    step = lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(amax < jnp.inf, step, 0.0)


def quantize_in_halves(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes x [..., D] to 14 bits: two int8 arrays [..., D] and a float32 step [...].

    x is (HALF * high + low) * step with high in -63 .. 63 and low in -64 .. 64. It serves products
    with int8 that must keep the accuracy of x. Each of high . k and low . k is below 2^22 for up to
    512 columns, so that float32 holds it. HALF * (high . k) + low . k is exact in int32.

    Raises TypeError if x is not a float array, and if it is differentiated.
    """
    return _halves(_floats(x))


@_without_derivative
def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    steps = step_of_halves(jnp.abs(x.astype(jnp.float32)).max(-1))
    whole = jnp.rint(x.astype(jnp.float32) / spread(steps, x))
    high = jnp.rint(whole * np.float32(1 / HALF))
    return high.astype(jnp.int8), (whole - HALF * high).astype(jnp.int8), steps


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns int8 values [..., D] times scales in any of the shapes of `scales_of`, float32.

    Raises TypeError unless values are int8 and scales are float32. Raises ValueError for scales of
    another shape.
    """
    if getattr(values, "dtype", None) != jnp.int8:
        raise TypeError(
            f"values must be an int8 array, got {getattr(values, 'dtype', type(values).__name__)}"
        )
    scales = _scales(scales, values)
    return values.astype(jnp.float32) * spread(scales, values)


def spread(scales: jax.Array, values: jax.Array) -> jax.Array:
    """Reshapes scales so that they broadcast with values [..., D]."""
    if scales.ndim == values.ndim:
        return jnp.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
    return scales[..., None]


def _floats(x: Any) -> jax.Array:
    """Returns x as a JAX array of one of FLOAT_DTYPES with at least one dim; raises otherwise."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"x must be an array, got {type(x).__name__}")
    x = jnp.asarray(x)
    checks.require_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [..., D], got shape []")
    return x


def _scales(scales: Any, values: Any) -> jax.Array:
    """Returns scales as a JAX array; raises unless they are float32 and fit values [..., D]."""
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
    """Returns a Hadamard matrix, [width, width] float64: orthogonal, symmetric, equal magnitudes.

    It is Sylvester's construction. Raises ValueError unless width is a power of 2.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"the width of a Hadamard matrix must be a power of 2, got {width}")
    matrix = np.ones((1, 1))
    while len(matrix) < width:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(width)
