"""Errors of a result relative to float64, and their bounds."""

from typing import Any

import jax
import numpy as np

# Bounds of the relative Frobenius error of an attention output, by dtype of the inputs. The
# reference gets the same rounded inputs. P and the output are rounded to the dtype, so that in
# float32 only the order of the sums differs.
OUTPUT_BOUND = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}
# The same for a whole layer with weights, activations and cache of that dtype. With "int8" only the
# cache is int8.
LAYER_BOUND = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2.5e-3, "int8": 2e-2}
LAYER_BOUND_OF_8_BITS = 4e-2  # where `rounds_to_8_bits`
LSE_BOUND = 1e-3  # absolute; scores are accumulated in float32 for every input dtype


def rounds_to_8_bits(implementation: str | None, cache_dtype: str) -> bool:
    """Returns whether q and P are rounded to int8, as on Ascend, and not only the cache."""
    return implementation == "blockwise" and cache_dtype == "int8"


def layer_bound(implementation: str, cache_dtype: str) -> float:
    """Returns the bound of the relative error of a layer's output."""
    if rounds_to_8_bits(implementation, cache_dtype):
        return LAYER_BOUND_OF_8_BITS
    return LAYER_BOUND[cache_dtype]


def to_numpy(value: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the value in float64, on the host."""
    return np.asarray(value).astype(np.float64)


def relative_error(got: Any, wanted: Any) -> float:
    """Returns |got - wanted| / |wanted| in the Frobenius norm; NaN if `got` has NaN."""
    got, wanted = to_numpy(got), to_numpy(wanted)
    norm = float(np.linalg.norm(wanted))
    return float(np.linalg.norm(got - wanted)) / (norm if norm else 1.0)


def lse_error(got: Any, wanted: Any) -> float:
    """Returns the largest |got - wanted|; infinite if -inf is not at the same positions."""
    got, wanted = to_numpy(got), to_numpy(wanted)
    empty = np.isneginf(wanted)
    if not np.array_equal(empty, np.isneginf(got)):
        return float("inf")
    return float(np.max(np.abs(np.where(empty, 0.0, got - np.where(empty, 0.0, wanted)))))
