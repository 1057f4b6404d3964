"""Page layouts: the shape of a page, and how rows are read from pages and written to them.

"ND" and "NZ" are described in `mla_jax.cache`. Arrays with fewer than four dims are in layout ND
or hold scales, which are the same in both layouts.
"""

from typing import Any

import jax
import jax.numpy as jnp

PAGE_SIZES = (1, 16, 64, 128)
LAYOUTS = ("ND", "NZ")
_FRACTAL_BYTES = 32


def page_shape(words: str, page_size: int, width: int, dtype: Any, layout: str) -> tuple[int, ...]:
    if layout == "ND":
        return page_size, width
    fractal = _FRACTAL_BYTES // jnp.dtype(dtype).itemsize
    if width % fractal:
        raise ValueError(
            f"{words} must be a multiple of {fractal} in layout NZ with dtype "
            f"{jnp.dtype(dtype).name}, got {width}"
        )
    return width // fractal, page_size, fractal


def read(array: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Reads tokens from an array of the cache: [N, T, ...]; page and offset are [N, T]."""
    if array.ndim == 0:
        return array
    if array.ndim < 4:
        return array.at[page, offset].get(mode="promise_in_bounds")
    fractals = array.at[page, :, offset, :].get(mode="promise_in_bounds")
    return fractals.reshape(*page.shape, -1)  # from [N, T, D / C0, C0]


def write(array: jax.Array, page: jax.Array, offset: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [N, T, ...] to tokens of an array; a page past the end drops the row."""
    if array.ndim < 4:
        return array.at[page, offset].set(rows, mode="drop")
    return array.at[page, :, offset, :].set(_fractals(array, rows), mode="drop")


def add(array: jax.Array, page: jax.Array, offset: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds rows [N, T, ...] to tokens of an array, which may be the same for several rows."""
    if array.ndim < 4:
        return array.at[page, offset].add(rows, mode="drop")
    return array.at[page, :, offset, :].add(_fractals(array, rows), mode="drop")


def _fractals(array: jax.Array, rows: jax.Array) -> jax.Array:
    return rows.reshape(*rows.shape[:2], array.shape[1], array.shape[3])
