"""The primitives of the kernels as methods of one object, on the GPU and in the interpreter.

`Backend(interpreting=False)` emits instructions. `Backend(interpreting=True)` runs the same
schedule with the same barriers in Pallas's interpreter on a CPU. It replaces only what the
interpreter lacks, and each group of primitives says how. The methods are grouped by subject:

    values         arrays in registers: constants, indices, loads and stores
    products       accumulators and wgmma
    votes          one flag for a warp or a warpgroup
    per_thread     one value per thread: indexed access, exchange within a warp
    gather         rows copied to shared memory one by one
    shared_memory  repairs of values in shared memory, and a fence
    control        counters between CTAs, registers per thread, indices, dependent kernels
"""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper.mosaic.control import Control
from pallas_kernels.hopper.mosaic.gather import Gather
from pallas_kernels.hopper.mosaic.per_thread import PerThread
from pallas_kernels.hopper.mosaic.products import Products
from pallas_kernels.hopper.mosaic.shared_memory import SharedMemory
from pallas_kernels.hopper.mosaic.threads import (
    PANELS,
    ROWS,
    SCALAR,
    WGMMA_OPERAND,
    array_of,
    element_pointer,
    own_four,
    place_in_tile,
)
from pallas_kernels.hopper.mosaic.votes import Votes

__all__ = [
    "OWN_BARRIERS",
    "PANELS",
    "ROWS",
    "SCALAR",
    "WGMMA_OPERAND",
    "Backend",
    "array_of",
    "element_pointer",
    "own_four",
    "place_in_tile",
]

# Compiler parameters of a kernel that places all barriers itself and reduces without scratch.
OWN_BARRIERS = plgpu.CompilerParams(
    approx_math=True,
    unsafe_no_auto_barriers=True,
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
)


@dataclasses.dataclass(frozen=True)
class Backend(Products, Votes, PerThread, Gather, SharedMemory, Control):
    """All primitives that every kernel needs."""
