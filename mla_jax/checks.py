"""Argument checks of the public functions; each error names the argument and both values."""

from typing import Any

import jax
import numpy as np

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def is_concrete(*values: Any) -> bool:
    """Returns whether all values are known now, that is none is being traced by jit."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def snapshot(value: Any) -> Any:
    """Returns a copy of a numpy array, and any other value unchanged.

    JAX may read a numpy argument after the call has returned. By then a serving loop may have
    changed it in place, as in `seq_lens += 1`.
    """
    return value.copy() if isinstance(value, np.ndarray) else value


def require_type(name: str, value: Any, kind: type) -> None:
    """Raises TypeError unless value is an instance of the class."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        got = type(value).__name__
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {got}")


def require_array(name: str, value: Any) -> None:
    """Raises TypeError unless value is a JAX or numpy array, traced or not."""
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be an array, got {_described(value)}")


def require_shape(name: str, value: Any, spec: str, *wanted: int | None) -> None:
    """Raises ValueError unless value.shape is `wanted`, where None is any size.

    spec: names the dims in the message, as in "[B, S, D]".
    """
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


def require_float_dtype(name: str, dtype: Any) -> np.dtype:
    """Returns the dtype; raises TypeError or ValueError unless it is one of FLOAT_DTYPES."""
    try:
        if dtype is None:  # numpy would read None as float64
            raise TypeError
        found = jax.numpy.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {_described(dtype)}"
        ) from None
    require_one_of(name, found.name, FLOAT_DTYPES)
    return found


def require_one_of(name: str, value: Any, options: tuple[Any, ...]) -> None:
    """Raises ValueError unless value equals one of the options and has its type."""
    kinds = (str,) if isinstance(options[0], str) else (int, np.integer)
    if not isinstance(value, kinds) or isinstance(value, bool) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r}")


def require_bool(name: str, value: Any) -> bool:
    """Returns the value as a Python bool; raises TypeError unless it is a Python or numpy bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_described(value)}")
    return bool(value)


def require_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns the value as a Python int, so that sums of it do not overflow a narrow dtype.

    Raises TypeError unless it is a Python or numpy integer; a bool is not. Raises ValueError unless
    it is in low .. high; a high of None is no upper bound.
    """
    if type(value) is not int and (
        not isinstance(value, int | np.integer) or isinstance(value, bool)
    ):
        raise TypeError(f"{name} must be an integer, got {_described(value)}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in {low} .. {high}"
        wanted = "a positive integer" if (low, high) == (1, None) else wanted
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return int(value)


def require_ints(name: str, values: Any, low: int) -> tuple[int, ...]:
    """Returns a tuple, a list or an [N] numpy array of integers as a tuple of Python ints.

    Raises TypeError for anything else, and ValueError for an integer below `low`.
    """
    is_array = isinstance(values, np.ndarray) and values.ndim == 1
    if not is_array and not isinstance(values, tuple | list):
        raise TypeError(
            f"{name} must be a tuple, a list or an [N] numpy array of integers, "
            f"got {_described(values)}"
        )
    return tuple(require_int(f"{name}[{at}]", value, low) for at, value in enumerate(values))


def require_positive(name: str, value: Any) -> int:
    """Returns the value as a Python int of 1 or more; raises as `require_int` does."""
    return require_int(name, value, 1)


def require_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    finite: bool = True,
) -> float:
    """Returns the value as a Python float.

    Accepts Python and numpy numbers and arrays of shape [] of a real dtype, unless they are traced.
    Raises TypeError for anything else, also for bool, complex and str. Raises ValueError for
    values that are below `low` or not above `above`, and if `finite` for NaN and infinity.
    """
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{name} must be a number that is known at trace time, got a traced value")
    dtype = np.asarray(value).dtype if np.shape(value) == () else np.dtype(object)
    if not (jax.numpy.issubdtype(dtype, np.floating) or jax.numpy.issubdtype(dtype, np.integer)):
        raise TypeError(f"{name} must be a real number, got {_described(value)}")
    number = float(value)
    if finite and not np.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if above is not None and number <= above:
        raise ValueError(f"{name} must be above {above}, got {value}")
    return number


def require_softmax_scale(softmax_scale: Any, name: str = "softmax_scale") -> float:
    """Returns the softmax scale as a Python float, above 0 and in the range of float32.

    name: what the caller calls it.

    Raises TypeError unless it is a real number that is not traced, and ValueError for another one.
    """
    try:
        number = require_number(name, softmax_scale, above=0)
    except TypeError:
        got = "a traced one" if not is_concrete(softmax_scale) else None
        got = got or f"{type(softmax_scale).__name__} {softmax_scale!r}"
        raise TypeError(
            f"{name} must be a number, got {got}; it must be real and known at trace time"
        ) from None
    low, high = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not low <= number <= high:
        raise ValueError(f"{name} must be in {low} .. {high}, what float32 holds, got {number}")
    return number


def _described(value: Any) -> str:
    """Returns a short text of a value and its type, for error messages."""
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} of type {type(value).__name__}"


def require_block_tables(block_tables: Any, batch: int) -> None:
    """Raises TypeError or ValueError unless block_tables can be that of `batch` requests."""
    require_array("block_tables", block_tables)
    require_shape("block_tables", block_tables, "[B, max_pages]", batch, None)
    require_int32("block_tables", block_tables)
    require_positive("max_pages of block_tables", block_tables.shape[1])


def require_pages(
    lengths_name: str, lengths: Any, block_tables: Any, page_size: int, num_pages: int
) -> None:
    """Raises ValueError for a length that exceeds its block table or uses a page out of range.

    Args:
        lengths_name: the caller's name of the lengths, for the message.
        lengths: [B] int32, not traced.
        block_tables: [B, max_pages] int32, not traced; entries past a length may hold anything.
        page_size: tokens per page.
        num_pages: pages in the cache.
    """
    lengths, tables = np.asarray(lengths), np.asarray(block_tables)
    capacity = tables.shape[1] * page_size
    for request in np.flatnonzero((lengths < 0) | (lengths > capacity)):
        raise ValueError(
            f"{lengths_name}[{request}] must be in 0 .. {capacity} (block_tables has "
            f"{tables.shape[1]} pages of {page_size} per request), got {lengths[request]}"
        )
    used = np.arange(tables.shape[1]) < -(-lengths // page_size)[:, None]
    for request, entry in np.argwhere(used & ((tables < 0) | (tables >= num_pages))):
        raise ValueError(
            f"block_tables[{request}, {entry}] must be a page in 0 .. {num_pages - 1}, "
            f"got {tables[request, entry]}"
        )
