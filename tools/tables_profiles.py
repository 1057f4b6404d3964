"""The table of a profile's fields in docs/adding_a_profile.md, from `FIELDS` and two profiles."""

from pathlib import Path

from tables_common import table

from mla_jax.hal import PROFILES
from mla_jax.hal.profiles.profile import FIELDS

EXAMPLES = {"nvidia": "H200_SXM", "ascend": "Ascend910B1"}
MEANINGS = {
    "core.count": "cores: SMs, or cube cores",
    "core.clock": "clock while a kernel runs",
    "core.vector_cores": "vector cores per cube core",
    "core.compute_capability": "9.0 has wgmma and TMA",
    "memory.hbm_bytes": "capacity",
    "memory.hbm_bandwidth": "peak, both directions together",
    "memory.hbm_efficiency": "share of that peak that a kernel reaches",
    "memory.l2_bandwidth": "of all cores together",
    "buffer.l2": "capacity of the L2 cache",
    "buffer.shared": "shared memory of a CTA at most",
    "buffer.registers": "32-bit registers of an SM",
    "buffer.l1": "L1 of a cube core",
    "buffer.l0a": "left operand of the cube unit",
    "buffer.l0b": "right operand of the cube unit",
    "buffer.l0c": "products of the cube unit",
    "buffer.ub": "unified buffer of a vector core",
    "engine.tensor_bf16": "tensor cores of an SM; a multiply-add is 2",
    "engine.tensor_int8": "the same with int8 or fp8",
    "engine.tensor_efficiency": "share of that rate that a kernel reaches",
    "engine.mma_sync_share": "rate of mma.sync over that of wgmma",
    "engine.cuda": "float32 operations of an SM",
    "engine.cuda_efficiency": "share of them that a kernel reaches",
    "engine.sfu": "exponentials of an SM",
    "engine.shared_pipe": "shared memory of an SM, reads and writes",
    "engine.shared_efficiency": "share of them without bank conflicts",
    "engine.copy": "what one SM loads alone",
    "engine.store": "what one SM stores alone",
    "engine.widen": "fp8 to bf16 by one SM",
    "engine.cube_fp16": "cube unit of a core; a multiply-add is 2",
    "engine.cube_int8": "the same with int8",
    "engine.cube_head": "before the first product of an instruction",
    "engine.vector_wide": "float32 with a scalar, a vector core",
    "engine.vector_narrow": "float32 of two vectors, exponentials, casts",
    "engine.vector_head": "before the first element of an instruction",
    "engine.gm_to_l1": "memory to L1, a core",
    "engine.gm_to_ub": "memory to UB, a vector core",
    "engine.ub_to_gm": "UB to memory, a vector core",
    "engine.gm_read": "memory or L2 to a core and its vector cores",
    "engine.fixpipe": "L0C to memory, a core",
    "engine.l1_to_l0a": "L1 to L0A",
    "engine.l1_to_l0b": "L1 to L0B",
    "engine.dma_scale": "factor of all paths from and to memory",
    "latency.launch": "a launch with nothing to do",
    "latency.second_launch": "a dependent launch",
    "latency.memory": "a load with nothing else running",
    "latency.l2": "a dependent load from L2",
    "latency.barrier": "a barrier of warpgroups; also of a signal",
    "latency.grid_sync": "a barrier of all CTAs",
    "latency.core_start": "by which each further core starts later",
    "latency.cross_core": "a signal between cube and vector core",
    "latency.flag": "a set/wait pair of two pipes of a core",
    "latency.job": "filling L1 and L0 before a stage",
}


def fields(root: Path) -> str:
    """Returns a row per field: families, unit, meaning, and the value of a device of each."""
    names = list(dict.fromkeys(field for family in EXAMPLES for field in FIELDS[family]))
    lines = []
    for name in names:
        having = [family for family in EXAMPLES if name in FIELDS[family]]
        unit = FIELDS[having[0]][name]
        values = [
            _value(PROFILES[device][name]) if family in having else ""
            for family, device in EXAMPLES.items()
        ]
        lines.append([f"`{name}`", unit, MEANINGS[name], *values])
    return table(["field", "unit", "meaning", *EXAMPLES.values()], lines, words=3)


def _value(value: float) -> str:
    """Whole numbers below a million in full, others with four digits."""
    return f"{value:,.0f}" if value.is_integer() and value < 1e6 else f"{value:.4g}"
