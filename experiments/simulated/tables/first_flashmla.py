"""FlashMLA's first version, which TensorRT-LLM's decode op for Hopper runs, as a simulated kernel.

Its structure is that of the public source (NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/kernels/flashMLA).
Nothing here is fitted.
"""

import dataclasses
import functools

from mla_jax.hal import GpuScheduleBuilder, HardwareProfile, Kernel, Schedule
from mla_jax.hal.simulator.gpu_costs import KERNELS

BARRIERS = {"bf16": 2, "fp8": 4}  # per block, of both warpgroups; fp8: also before and after V


@functools.lru_cache(maxsize=1024)
def first_flashmla(num_blocks: int, *, transposes: bool = False) -> Schedule:
    """Returns the order of two warpgroups with roles, of which one computes all of P.

    Warpgroup 0 does QK, softmax and PV of the left half. Warpgroup 1 copies the next block when
    the one in hand is there, and does PV of the right half.

    transposes: whether warpgroup 1 also transposes V, while warpgroup 0 computes P.
    """
    build = GpuScheduleBuilder("first-flashmla", num_blocks, transposes=transposes)
    build.load(0)
    for block in range(num_blocks):
        # The copies that warpgroup 1 issues arrive later than QK reads its operands.
        build.scores("wg0", block)
        if block + 1 < num_blocks:
            arrived = (build.slot("kv_l", block), build.slot("kv_r", block))
            build.add("wg1", "ISSUE", block + 1, reads=arrived)
            build.load(block + 1)
        if transposes:
            build.transpose("wg1", block)
        build.softmax("wg0", block)
        build.values("wg0", "L", block)
        build.values("wg1", "R", block)
    build.store("wg0", "wg1")
    return build.build()


def first_flashmla_kernel(profile: HardwareProfile, dtype: str) -> Kernel:
    """Returns the kernel for a cache of bf16 or fp8, in which it also multiplies.

    Tiles, plan and pages are those of the later version.
    """
    transposes = dtype == "fp8"
    return dataclasses.replace(
        KERNELS["flashmla_dense"](profile),
        name="first_flashmla",
        orders=(functools.partial(first_flashmla, transposes=transposes),),
        copy="cp_async",
        barriers=BARRIERS[dtype],
        merge="combine_rows",
        multiplies=dtype,
        transposes_apart=transposes,
    )
