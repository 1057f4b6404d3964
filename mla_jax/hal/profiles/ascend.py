"""Profiles of Ascend devices; data only.

The letter at the start of a source says what it is: S official source code, D official document, P
paper, C community, X derived.
"""

from mla_jax.hal.profiles.profile import Certainty, HardwareProfile
from mla_jax.hal.profiles.sources import Entry, build

_GIB = 2.0**30
_FITTED = "Ascend910B3"  # fitted: the published rows name an Atlas 800T A2 and no die
_CORE = "S: CANN operator sources, one AI core"
_DMA = "S: flat DMA table of a performance model in the CANN sources"

_COMMON: dict[str, Entry] = {
    "core.vector_cores": (2, _CORE, "official"),
    "buffer.l1": (512 * 1024, _CORE, "official"),
    "buffer.l0a": (64 * 1024, _CORE, "official"),
    "buffer.l0b": (64 * 1024, _CORE, "official"),
    "buffer.l0c": (128 * 1024, _CORE, "official"),
    "buffer.ub": (192 * 1024, "S: CANN operator sources, one vector core", "official"),
    "buffer.l2": (192 * 2**20, "D: product document, shared by the die", "document"),
    "memory.l2_bandwidth": (7e12, "D: mixed reads and writes, about", "document"),
    "engine.cube_fp16": (8192, "S: 16x16x16 multiply-adds a cycle", "official"),
    "engine.cube_int8": (16384, "S: 16x32x16 multiply-adds a cycle", "official"),
    "engine.cube_head": (6, "S: 6 + ceil(m/16)*ceil(k bytes/32)*ceil(n/16) cycles", "official"),
    "engine.vector_wide": (64, "S: fp32 operations with a scalar operand", "official"),
    "engine.vector_narrow": (32, "S: fp32 binary operations, exponentials, casts", "official"),
    "engine.vector_head": (12, "S: 10 to 14 cycles an instruction", "official"),
    "engine.gm_to_l1": (135 * _GIB, _DMA, "official"),
    "engine.gm_to_ub": (101 * _GIB, _DMA, "official"),
    "engine.ub_to_gm": (188 * _GIB, _DMA, "official"),
    "engine.gm_read": (135 * _GIB, "all units of a core together: as GM to L1", "assumed"),
    "engine.fixpipe": (70 * _GIB, _DMA, "official"),
    "engine.l1_to_l0a": (441 * _GIB, _DMA, "official"),
    "engine.l1_to_l0b": (220 * _GIB, _DMA, "official"),
    "engine.dma_scale": (1.0, "the table as it is; a fit on a 910B3 differs by up to 7", "assumed"),
    "memory.hbm_efficiency": (0.9, "as other HBM devices reach", "assumed"),
    "latency.cross_core": (
        1000 / 1.8e9,
        "C: about 1000 cycles a logical tile, fitted",
        "community",
    ),
    "latency.core_start": (5e-7, "time by which each further core starts later", "assumed"),
    "latency.flag": (50 / 1.8e9, "a set/wait pair between two pipes", "assumed"),
    "latency.job": (1000 / 1.8e9, "filling L1 and L0 before a stage's first multiply", "assumed"),
    "latency.launch": (10.9e3 / 1.8e9, "C: about 10.9k cycles, fitted", "community"),
}


def _die(
    name: str,
    cores: int,
    clock: float,
    hbm: float,
    bandwidth: float,
    clock_sure: str,
    note: str = "",
    **extra: Entry,
) -> HardwareProfile:
    certainty: Certainty = "official" if clock_sure == "S" else "document"
    entries: dict[str, Entry] = _COMMON | {
        "core.count": (cores, "D: product document (cube cores)", "document"),
        "core.clock": (clock, f"{clock_sure}: product data", certainty),
        "memory.hbm_bytes": (hbm, "C: board data", "community"),
        "memory.hbm_bandwidth": (bandwidth, "C: board data", "community"),
    }
    entries |= {field.replace("__", "."): entry for field, entry in extra.items()}
    if name == _FITTED:
        note = "assumed to be the die of FIA's published rows, which do not say which 910B it is"
    else:
        note = f"{note}; " * bool(note) + f"no rows of its own: the constants fitted on {_FITTED}"
    return build(name, "ascend", entries, _FITTED, note)


ASCEND910B1 = _die("Ascend910B1", 24, 1.85e9, 64e9, 1.6e12, "D")
ASCEND910B2 = _die("Ascend910B2", 24, 1.80e9, 64e9, 1.6e12, "D")
ASCEND910B3 = _die("Ascend910B3", 20, 1.80e9, 64e9, 1.6e12, "D")
ASCEND910B4 = _die("Ascend910B4", 20, 1.50e9, 32e9, 0.8e12, "S")
ASCEND910C_DIE = _die(
    "Ascend910C_die", 24, 1.80e9, 64e9, 1.6e12, "D", "one of a package's two dies"
)
_PACKAGE = _die(
    "Ascend910C", 48, 1.80e9, 128e9, 3.2e12, "D", "the package: two dies",
    buffer__l2=(2 * 192 * 2**20, "two dies", "derived"),
    memory__l2_bandwidth=(14e12, "two dies", "derived"),
)  # fmt: skip
ASCEND910C = _PACKAGE.with_values(
    {"latency.core_start": _PACKAGE["latency.core_start"] / 2},
    "half of a die's, since two dies start their cores at the same time",
)
