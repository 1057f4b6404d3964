"""Whether timed outputs are right: their errors against float64, and the bounds of these."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.framework.errors import OUTPUT_BOUND, relative_error, rounds_to_8_bits
from experiments.framework.experiment import Row

# Bounds of the relative error of o against float64, for the values in the cache. With an int8 cache
# P is rounded with V's scale folded in, and q to 14 bits.
BOUND = {"bf16": OUTPUT_BOUND["bfloat16"], "int8": 6e-3}
BOUND_OF_LSE = {"bf16": 1e-3, "int8": 2e-3}
BOUNDS_OF_8_BITS = 4e-2, 2e-2  # of o and lse, where q and P have 8 bits too


def errors_of(
    output: tuple[Any, Any],
    wanted: Mapping[int, tuple[np.ndarray, np.ndarray]],
    dtype: str,
    implementation: str | None = None,
) -> Row:
    """Returns `error`, `lse_error` and whether both are in bounds and all outputs are finite."""
    bound, bound_of_lse = BOUND[dtype], BOUND_OF_LSE[dtype]
    if rounds_to_8_bits(implementation, dtype):
        bound, bound_of_lse = BOUNDS_OF_8_BITS
    o, lse = (np.asarray(x) for x in output)
    requests = list(wanted)
    error = relative_error(o[requests], np.stack([wanted[i][0] for i in requests]))
    off = np.abs(lse[requests].astype(np.float64) - np.stack([wanted[i][1] for i in requests]))
    finite = bool(np.isfinite(o.astype(np.float32)).all() and np.isfinite(lse).all())
    lse_error = float(off.max())
    right = finite and error <= bound and lse_error <= bound_of_lse
    return {"error": error, "lse_error": lse_error, "correct": right}
