"""int8 with float32 scales: value = int8 * scale. The one place of these formulas.

Symmetric, without a zero point: int8 in -127 .. 127, rounded to nearest, ties to even, and
scale = amax / 127, where amax is the largest magnitude of what shares the scale. A latent shares
it within a token ("token"), within a token and GROUP columns ("group"), or over the whole cache
("tensor", then known beforehand from calibration).

The same pair of functions rounds a query (a scale each token and head) and a row of softmax
weights (a scale each row and block, as Ascend's kernel does it).

`hadamard` spreads what a few columns hold over all, which is what a scale a token wants
(QuaRot, arXiv 2404.00456).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GRANULARITIES = ("token", "group", "tensor")
GROUP = 128  # columns
LARGEST = 127
HALF = 128  # steps of the lower half of 14 bits in one of the upper half
LARGEST_HIGH = 63  # of the upper half

# Written as products: XLA makes them of divisions by a constant, but under jit only.
_STEP = np.float32(1 / LARGEST)
_SMALLEST_AMAX = np.float32(2.0**-100)  # below it amax / 127 nears the subnormal numbers
_SMALLEST_OF_HALVES = np.float32(2.0**-60)  # bfloat16 beside it can be divided by its step


def scale_for(amax: jax.Array) -> jax.Array:
    """The scale, float32, for values of magnitude up to amax.

    It is 1 / 127, a scale that makes them 0, where amax is 0 or next to nothing; NaN stays NaN.
    """
    amax = amax.astype(jnp.float32)
    return jnp.where(amax < _SMALLEST_AMAX, jnp.float32(1), amax) * _STEP


def scales_of(x: jax.Array, granularity: str) -> jax.Array:
    """Scales, float32, that fit x [..., D]: "token" [...], "group" [..., D / GROUP], "tensor" [].

    That of "tensor" is measured over all of x: calibration.
    """
    amax = jnp.abs(x.astype(jnp.float32))
    if granularity == "tensor":
        return scale_for(amax.max())
    if granularity == "group":
        amax = amax.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    return scale_for(amax.max(-1))


def quantize(x: jax.Array, scales: jax.Array) -> jax.Array:
    """int8 of x [..., D] in steps of `scales`, in any of the shapes of `scales_of`.

    What lies past 127 steps (only a "tensor" scale lets it) becomes +-127.
    """
    steps = jnp.rint(x.astype(jnp.float32) / spread(scales, x))
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
    HALF * (high . k) + low . k is exact in int32.
    """
    steps = step_of_halves(jnp.abs(x.astype(jnp.float32)).max(-1))
    whole = jnp.rint(x.astype(jnp.float32) / spread(steps, x))
    high = jnp.rint(whole * np.float32(1 / HALF))
    return high.astype(jnp.int8), (whole - HALF * high).astype(jnp.int8), steps


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 of int8 values [..., D]."""
    return values.astype(jnp.float32) * spread(scales, values)


def spread(scales: jax.Array, values: jax.Array) -> jax.Array:
    """scales in a shape that broadcasts with values [..., D]."""
    if scales.ndim == values.ndim:
        return jnp.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)
    return scales[..., None]


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
