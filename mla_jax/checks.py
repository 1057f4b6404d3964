"""Argument checks that the public functions share: each names the argument, got and wanted."""

from typing import Any

import jax
import numpy as np

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def is_concrete(*values: Any) -> bool:
    """Whether every value can be looked at now, i.e. none is being traced by jit."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def snapshot(value: Any) -> Any:
    """A numpy array's copy; anything else as it is.

    JAX may read a numpy argument after the call has returned, by when a serving loop may have
    changed it in place (`seq_lens += 1`).
    """
    return value.copy() if isinstance(value, np.ndarray) else value


def require_shape(name: str, value: Any, spec: str, *wanted: int | None) -> None:
    """Raises ValueError unless value.shape is `wanted` (None: any size), in words `spec`."""
    shape = np.shape(value)
    fits = len(shape) == len(wanted) and all(
        want is None or got == want for got, want in zip(shape, wanted, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in wanted)
        raise ValueError(f"{name} must be {spec} = [{sizes}], got shape {list(shape)}")


def require_int32(name: str, value: Any) -> None:
    """Raises TypeError unless value is an int32 array."""
    dtype = getattr(value, "dtype", None)
    if dtype != np.int32:
        raise TypeError(f"{name} must be an int32 array, got {dtype or type(value).__name__}")


def require_float(name: str, value: Any) -> None:
    """Raises TypeError unless value is an array of one of FLOAT_DTYPES."""
    dtype = getattr(value, "dtype", None)
    if str(dtype) not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be an array of {', '.join(FLOAT_DTYPES)}, "
            f"got {dtype or type(value).__name__}"
        )


def require_one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Raises ValueError unless value is one of the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}")


def require_positive(name: str, value: Any) -> None:
    """Raises ValueError unless value is a positive Python integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def require_pages(
    lengths_name: str, lengths: Any, block_tables: Any, page_size: int, num_pages: int
) -> None:
    """Raises ValueError where a length does not fit its block table, or uses a page that is not.

    Args:
        lengths_name: what the caller calls the lengths.
        lengths: [B] int32, concrete.
        block_tables: [B, max_pages] int32, concrete; slots past a request's length hold anything.
    """
    lengths, tables = np.asarray(lengths), np.asarray(block_tables)
    capacity = tables.shape[1] * page_size
    for request in np.flatnonzero((lengths < 0) | (lengths > capacity)):
        raise ValueError(
            f"{lengths_name}[{request}] must be in 0 .. {capacity} (block_tables has "
            f"{tables.shape[1]} pages of {page_size} a request), got {lengths[request]}"
        )
    used = np.arange(tables.shape[1]) < -(-lengths // page_size)[:, None]
    for request, slot in np.argwhere(used & ((tables < 0) | (tables >= num_pages))):
        raise ValueError(
            f"block_tables[{request}, {slot}] must be a page in 0 .. {num_pages - 1}, "
            f"got {tables[request, slot]}"
        )
