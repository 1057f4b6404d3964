"""Profiles of NVIDIA devices; data only.

Clocks are boost clocks. The fitted efficiencies account for the lower sustained clocks.
"""

from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.profiles.sources import Entry, build, measured_constants

CHIP = "Hopper"  # the fit that all devices here take their constants from
# What `calibrate` measured of the chip on an H200. No kernel reaches the other numbers that it
# measures.
MEASURED = ("latency.barrier", "latency.memory", "engine.store", "memory.l2_bandwidth")
_SAME_CHIP = ", on an H200, which has the same chip"
_SHEET = "datasheet"
_GUIDE = "CUDA programming guide, throughput and limits by compute capability"

_SM: dict[str, Entry] = {
    "buffer.registers": (65536, _GUIDE, "official"),
    "engine.cuda": (128, _GUIDE, "official"),
    "engine.sfu": (16, _GUIDE, "official"),
    "engine.shared_pipe": (128, _GUIDE, "official"),
    # Values for a device without any fit. A fit on it or on a similar device replaces them.
    "memory.hbm_efficiency": (0.9, "as measured reads on H200 reach", "assumed"),
    "engine.tensor_efficiency": (0.75, "as large bf16 products on H200 reach", "assumed"),
    "engine.cuda_efficiency": (0.8, "issue slots of straight code", "assumed"),
    "engine.shared_efficiency": (0.85, "some bank conflicts", "assumed"),
    "engine.copy": (8e10, "bytes in flight over latency, one SM", "assumed"),
    "engine.store": (5e10, "half of what it loads", "assumed"),
    "engine.widen": (4, "fp8 to bf16 by one warpgroup, scales looked up", "assumed"),
    "latency.memory": (5e-7, "HBM load with nothing else running", "assumed"),
    "latency.barrier": (2e-8, "a named barrier of 256 threads", "assumed"),
    "latency.l2": (2e-7, "one dependent L2 load", "assumed"),
    "latency.grid_sync": (2e-6, "cooperative launch and grid.sync", "assumed"),
    "latency.second_launch": (3e-6, "a dependent kernel in a stream", "assumed"),
    "latency.launch": (4e-6, "graph replay, one kernel", "assumed"),
}


def _hopper(
    name: str,
    sms: int,
    memory: float,
    bandwidth: float,
    fitted_on: str,
    tensor: Entry = (4096, "4 tensor cores x 512 bf16 multiply-adds a cycle (wgmma)", "official"),
    mma_sync: Entry = (0.62, "mma.sync against wgmma on Hopper, microbenchmarks", "community"),
    note: str = "",
) -> HardwareProfile:
    entries: dict[str, Entry] = _SM | {
        "core.count": (sms, _SHEET, "document"),
        "core.compute_capability": (9.0, _GUIDE, "official"),
        "core.clock": (1.98e9, "boost clock, nvidia-smi", "official"),
        "memory.hbm_bytes": (memory, _SHEET, "document"),
        "memory.hbm_bandwidth": (bandwidth, _SHEET, "document"),
        "buffer.l2": (50e6, _SHEET, "document"),
        "buffer.shared": (227 * 1024, _GUIDE, "official"),
        "engine.tensor_bf16": tensor,
        "engine.tensor_int8": (2 * tensor[0], "twice the bf16 rate", "derived"),
        "engine.mma_sync_share": mma_sync,
    }
    entries |= measured_constants("H200_SXM", MEASURED, "" if name == "H200_SXM" else _SAME_CHIP)
    return build(name, "nvidia", entries, fitted_on, note, CHIP)


def _older(
    name: str,
    sms: int,
    capability: float,
    clock: float,
    shared: int,
    l2: float,
    l2_bandwidth: float,
    memory: float,
    bandwidth: float,
    tensor: float,
    note: str,
) -> HardwareProfile:
    """Returns the profile of an Ampere or Ada device, whose tensor cores execute mma.sync."""
    entries: dict[str, Entry] = _SM | {
        "core.count": (sms, _SHEET, "document"),
        "core.compute_capability": (capability, _GUIDE, "official"),
        "core.clock": (clock, f"boost clock, {_SHEET}", "document"),
        "memory.hbm_bytes": (memory, _SHEET, "document"),
        "memory.hbm_bandwidth": (bandwidth, _SHEET, "document"),
        "memory.l2_bandwidth": (l2_bandwidth, "microbenchmarks", "community"),
        "buffer.l2": (l2, _SHEET, "document"),
        "buffer.shared": (shared, _GUIDE, "official"),
        "engine.tensor_bf16": (tensor, "datasheet TFLOPS / SMs / clock", "derived"),
        "engine.tensor_int8": (2 * tensor, "twice the bf16 rate", "derived"),
        "engine.mma_sync_share": (1.0, "no wgmma on this chip", "official"),
    }
    return build(name, "nvidia", entries, "H100_SXM5", note, CHIP)


_NO_ROWS = "no rows of its own: datasheet numbers with the efficiencies of "
_H20_TENSOR: Entry = (958, "148 TFLOPS / 78 SMs / 1.98 GHz", "derived")

H100_SXM5 = _hopper("H100_SXM5", 132, 80e9, 3.352e12, "H100_SXM5")
H200_SXM = _hopper("H200_SXM", 132, 141e9, 4.8e12, "H200_SXM")
H800_SXM5 = _hopper("H800_SXM5", 132, 80e9, 3.352e12, "H200_SXM", note=_NO_ROWS + "H200_SXM")
_H20_MMA: Entry = (1.0, "below what mma.sync alone could reach", "assumed")
H20 = _hopper("H20", 78, 96e9, 4.0e12, "H200_SXM", _H20_TENSOR, _H20_MMA, _NO_ROWS + "H200_SXM")
A100_SXM4_40GB = _older("A100_SXM4_40GB", 108, 8.0, 1.41e9, 163 * 1024, 40e6, 3.0e12, 40e9,
                        1.555e12, 2048, _NO_ROWS + "H100_SXM5")  # fmt: skip
A100_SXM4_80GB = _older("A100_SXM4_80GB", 108, 8.0, 1.41e9, 163 * 1024, 40e6, 3.0e12, 80e9,
                        2.039e12, 2048, _NO_ROWS + "H100_SXM5")  # fmt: skip
L40 = _older("L40", 142, 8.9, 2.49e9, 99 * 1024, 96e6, 3.5e12, 48e9, 0.864e12, 512,
             _NO_ROWS + "H100_SXM5")  # fmt: skip
