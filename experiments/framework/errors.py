"""How far a result is from float64, and how far it may be."""

from typing import Any

import jax
import numpy as np

# Of an attention output, relative Frobenius, against float64 on the very same (rounded) inputs, by
# their dtype: P and the output are rounded to it; in float32 only the order of the sums differs.
OUTPUT_BOUND = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}
# Of a whole layer, in which weights, activations and cache are of that dtype; "int8": the cache.
LAYER_BOUND = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3, "int8": 2e-2}
LSE_BOUND = 1e-3  # absolute; the scores are accumulated in float32 whatever the inputs are


def to_numpy(value: jax.Array | np.ndarray) -> np.ndarray:
    """In float64, on the host."""
    return np.asarray(value).astype(np.float64)


def relative_error(got: Any, wanted: Any) -> float:
    """|got - wanted| / |wanted| in the Frobenius norm; NaN where `got` holds one."""
    got, wanted = to_numpy(got), to_numpy(wanted)
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got - wanted)) / (norm if norm else 1.0)


def lse_error(got: Any, wanted: Any) -> float:
    """The largest |got - wanted|; infinite unless -inf stands in the same places."""
    got, wanted = to_numpy(got), to_numpy(wanted)
    empty = np.isneginf(wanted)
    if not np.array_equal(empty, np.isneginf(got)):
        return float("inf")
    return float(np.max(np.abs(np.where(empty, 0.0, got - np.where(empty, 0.0, wanted)))))
