"""Our own Hopper decode kernels in the simulator: what their stages cost.

`pallas_kernels.hopper.model` makes a `HopperKernel` of `plan_decode`'s plan, and
`simulator.hopper_times` has the time of its call.

Three constants are fitted on rows of our own kernels (profiles/hopper.json): the share of the
memory's bandwidth, the share of the tensor cores' rate, and the time of an empty launch. What a
stage takes besides its counted work (latencies of dependent instructions, barriers, fences) was
measured by the time stamps of `decode` (`stages` in that file). All others are those of the
profile, or count instructions of the kernel.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from mla_jax.hal.hopper_orders import (
    STAGES,
    hopper_decode,
    hopper_int8,
    hopper_transposed,
    hopper_transposed_int8,
)
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Schedule, Step
from mla_jax.hal.simulator.one_core import Costs, StageCost
from mla_jax.hal.tiling import KEY, LATENT, ROPE
from mla_jax.hal.work import Work

BLOCK = 64  # tokens per KV block
SOFTMAX_OPS = 8  # scale, maximum, subtract, exponent's multiply, sum, convert, store, vote
# Over an int8 cache, instructions per score: two integer sums are combined and converted, and the
# scales of a token and of a row are multiplied too.
INT8_SOFTMAX_OPS = 13
DEQUANTIZE_OPS = 5 / 4  # per value of V: xor, and, prmt and two fma for four of them
QUANTIZED_ROWS = 8  # of q at a time, by a warpgroup
QUANTIZE_OPS = 250 * 128 / QUANTIZED_ROWS  # per row of q: 250 instructions of 128 threads
KERNELS = ("decode", "decode_transposed", "decode_int8", "decode_transposed_int8")
STORED, PARTIAL, KEPT = 0, 1, 2  # where the result of a work item goes


@dataclass(frozen=True)
class Merging:
    """How a worker combines its share of a split tile: parts, and partials loaded at once.

    A part is some columns or rows of a tile, which one warpgroup combines.
    """

    parts: int
    at_once: int
    warpgroups: int


@dataclass(frozen=True, eq=False)
class HopperKernel:
    """One of our kernels with the plan of one call.

    kernel: one of KERNELS.
    work: the plan's work items.
    kept: which of them keep their result and combine it with one other item of their tile.
    rows_per_cta: rows of the tile that one CTA has, with padding.
    ctas_per_tile: CTAs of a cluster that share every KV block.
    partial_bytes: per value of a partial.
    merging: by the number of partials of a tile.
    kv_stages: of the left half of the latent, of its right half and of the rope columns. Over an
        int8 cache all three are the same.
    q_stages: of `decode_transposed`, as in `hopper_transposed`.
    computing: of `decode_transposed_int8`, the warpgroups that compute.
    """

    kernel: str
    work: Work
    kept: np.ndarray
    rows_per_cta: int
    ctas_per_tile: int
    in_pairs: bool
    partial_bytes: int
    merging: Mapping[int, Merging]
    kv_stages: tuple[int, int, int] = (STAGES, STAGES, STAGES)
    q_stages: int = 2
    computing: int = 2

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel = {self.kernel!r}, wanted one of {', '.join(KERNELS)}")

    @property
    def name(self) -> str:
        return f"hopper {self.kernel}"

    @property
    def block_kv(self) -> int:
        return BLOCK

    @property
    def is_int8(self) -> bool:
        """Whether it reads an int8 cache."""
        return self.kernel.endswith("int8")

    @property
    def is_transposed(self) -> bool:
        """Whether it has up to 32 rows per tile."""
        return self.kernel.startswith("decode_transposed")

    @property
    def token_bytes(self) -> float:
        """Bytes per token that it loads, an int8 token's scale included."""
        return LATENT + ROPE * 2 + 4 if self.is_int8 else KEY * 2

    @property
    def block_bytes(self) -> float:
        """Bytes of a KV block that one CTA loads."""
        return BLOCK * self.token_bytes / self.ctas_per_tile

    @property
    def stage_bytes(self) -> float:
        """Bytes of KV that one CTA has in flight: all of its stages."""
        left, right, rope = self.kv_stages
        if self.is_int8:
            return left * self.block_bytes
        return BLOCK * 2 * ((left + right) * LATENT / 2 + rope * ROPE) / self.ctas_per_tile

    @property
    def quantizing(self) -> int:
        """The warpgroups that quantize q: all that compute, if they can have equal shares."""
        computing = self.computing if self.is_transposed else 1
        return computing if self.rows_per_cta % (computing * QUANTIZED_ROWS) == 0 else 1

    def order(self, num_blocks: int, before: int = 0) -> Schedule:
        """Returns the schedule of so many blocks, of which an earlier item has `before`."""
        match self.kernel:
            case "decode":
                return hopper_decode(num_blocks, before=before)
            case "decode_transposed":
                return hopper_transposed(num_blocks, before=before, kv_stages=self.kv_stages,
                                         q_stages=self.q_stages)  # fmt: skip
            case "decode_int8":
                return hopper_int8(num_blocks, before=before, kv_stages=self.kv_stages[0])
        return hopper_transposed_int8(num_blocks, before=before, kv_stages=self.kv_stages[0],
                                      computing=self.computing,
                                      quantizing=self.quantizing)  # fmt: skip


@functools.cache
def hopper_constants() -> dict:
    """Returns the three fitted constants, and the rows that they were fitted on."""
    return json.loads(files("mla_jax.hal.profiles").joinpath("hopper.json").read_text())


def tuned_for_hopper(
    profile: HardwareProfile, constants: Mapping[str, float] | None = None
) -> HardwareProfile:
    """Returns the profile with the constants that are fitted on our own kernels."""
    fit = hopper_constants()
    values = fit["constants"] if constants is None else constants
    return profile.with_values(values, f"fitted on {fit['rows']}")


def fixed_costs(profile: HardwareProfile, kernel: str) -> Mapping[str, float]:
    """Returns what stages take besides their counted work, in seconds.

    Those of `decode` were measured, and the kernels over an int8 cache get the same. Their stages
    are chains of dependent instructions and barriers too. `decode_transposed` gets two of them,
    which its own time stamps confirm: that of softmax, whose maxima pass from warp to warp through
    shared memory, and that of the exchange between the CTAs of a pair. Its products and sums take
    the profile's latencies, by the stamps too. So do its other stores and its merge, which no
    stamps show.
    """
    measured = hopper_constants()["stages"]
    measured = measured | {"exchange": measured["store_partial"]}
    if kernel != "decode_transposed":
        return measured
    barrier, l2 = profile["latency.barrier"], profile["latency.l2"]
    return measured | {
        "product": 0.0,
        "sum": 2 * barrier,
        "store": 2 * barrier,
        "store_partial": 2 * barrier + l2,
        "wait_for_partials": 4 * l2,
        "combine_round": l2,
    }


def hopper_costs(
    profile: HardwareProfile, kernel: HopperKernel, end: int, queue: float = 0.0
) -> Costs:
    """Returns the cost function of stages. end: STORED, PARTIAL or KEPT.

    queue: seconds that each load waits for those of other cores, in the queue of the memory.
    """
    rates = _Rates.of(profile, kernel)
    if kernel.is_int8:
        return _int8_costs(profile, kernel, end, rates, queue)
    return _float_costs(profile, kernel, end, rates, queue)


@dataclass(frozen=True)
class _Rates:
    """Seconds per operation of an SM's engines, and per byte."""

    flop: float  # of bfloat16
    int8_flop: float
    shared: float
    cuda: float
    sfu: float
    copy: float  # of KV, which the CTAs of a cluster load together
    one_copy: float  # of what a CTA loads for itself
    store: float  # to L2

    @staticmethod
    def of(profile: HardwareProfile, kernel: HopperKernel) -> "_Rates":
        cycle, efficiency = profile.cycle, profile["engine.tensor_efficiency"]
        copy = profile["engine.copy"]
        return _Rates(
            flop=cycle / (profile["engine.tensor_bf16"] * efficiency),
            int8_flop=cycle / (profile["engine.tensor_int8"] * efficiency),
            shared=cycle / (profile["engine.shared_pipe"] * profile["engine.shared_efficiency"]),
            cuda=cycle / (profile["engine.cuda"] * profile["engine.cuda_efficiency"]),
            sfu=cycle / profile["engine.sfu"],
            copy=1.0 / (copy * kernel.ctas_per_tile),
            one_copy=1.0 / copy,
            store=1.0 / profile["engine.store"],
        )

    def product(self, m: int, n: int, k: int, hold: float) -> StageCost:
        """One bfloat16 product; wgmma reads A of each 64 rows, and B once for them."""
        operands = math.ceil(m / 64) * (64 + n) * k * 2
        busy = {"tensor": 2.0 * max(m, 64) * n * k * self.flop, "shared": operands * self.shared}
        return StageCost(busy, hold=hold)


def _float_costs(
    profile: HardwareProfile, kernel: HopperKernel, end: int, rates: _Rates, queue: float
) -> Costs:
    """Returns `hopper_costs` of a kernel over a 16-bit cache."""
    rows, memory = kernel.rows_per_cta, profile["latency.memory"] + queue
    fixed = fixed_costs(profile, kernel.kernel)
    transposed = kernel.is_transposed
    half = rows * LATENT / 2

    def load(columns: int) -> StageCost:
        return StageCost({"copy": BLOCK * columns * 2 * rates.copy}, latency=memory)

    def product(m: int, n: int, k: int) -> StageCost:
        return rates.product(m, n, k, fixed["product"])

    def softmax(second: bool) -> StageCost:
        elements = rows * BLOCK
        busy = {"cuda": elements * SOFTMAX_OPS * rates.cuda, "sfu": elements * rates.sfu}
        if transposed:  # O^T is rescaled always, and warps exchange their maxima
            busy["cuda"] += rows * LATENT * rates.cuda
            return StageCost(busy, hold=fixed["softmax"])
        return StageCost(busy, hold=fixed["softmax_second" if second else "softmax"])

    def stored(sends: bool) -> StageCost:
        """Normalises half of O and stores it. sends: to the other CTA, if a pair has the tile."""
        normalise = {"cuda": 3 * half * rates.cuda}
        if end == STORED:
            return StageCost(normalise | {"copy": half * 2 * rates.store}, hold=fixed["store"])
        if end == PARTIAL:
            copy_partial = {"copy": half * kernel.partial_bytes * rates.store}
            return StageCost(normalise | copy_partial, hold=fixed["store_partial"])
        if not kernel.in_pairs:  # The other item's partial is read and added.
            copy_partial = {"copy": half * kernel.partial_bytes * rates.one_copy}
            return StageCost(normalise | copy_partial, hold=fixed["exchange"])
        # Maxima and sums are exchanged, then each CTA sends one half of O in float32 to the other's
        # shared memory and stores the other half. If one warpgroup does both, it waits once.
        copied = {"copy": half * (4 if sends else 2) * rates.store}
        waits = not (transposed and sends)
        return StageCost(normalise | copied, hold=fixed["exchange"] * waits)

    def stage(step: Step) -> StageCost:
        match step.stage:
            case "LOAD_Q":
                return StageCost({"copy": rows * KEY * 2 * rates.one_copy}, latency=memory)
            case "LOAD_L" | "LOAD_R":
                return load(LATENT // 2)
            case "LOAD_ROPE":
                return load(ROPE)
            case "QK":
                return product(BLOCK, rows, KEY) if transposed else product(rows, BLOCK, KEY)
            case "SM":
                return softmax(step.unit == "wg1")
            case "PV_L" | "PV_R":
                if transposed:
                    return product(LATENT // 2, rows, BLOCK)
                return product(rows, LATENT // 2, BLOCK)
            case "SUM_L" | "SUM_R":
                return StageCost({}, hold=fixed["sum"])
            case "STORE_L" | "STORE_R":
                return stored(step.stage == "STORE_L")
        raise ValueError(f"{kernel.name}: no cost for stage {step.stage}")

    return stage


def _int8_costs(
    profile: HardwareProfile, kernel: HopperKernel, end: int, rates: _Rates, queue: float
) -> Costs:
    """Returns `hopper_costs` of a kernel over an int8 cache.

    Products over K are of 8-bit operands, twice as many as there are rows, and V becomes bfloat16
    in registers. q is read and quantized by warpgroups that compute.
    """
    rows, l2 = kernel.rows_per_cta, profile["latency.l2"]
    memory = profile["latency.memory"] + queue
    fixed, transposed = fixed_costs(profile, kernel.kernel), kernel.is_transposed
    half = rows * LATENT / 2

    def quantize() -> StageCost:
        """Each group of rows waits for the loads of the next one, if it computes no longer."""
        own = rows / kernel.quantizing
        computing = own * QUANTIZE_OPS * rates.cuda
        waiting = max(own / QUANTIZED_ROWS * l2 - computing, 0.0)
        return StageCost({"cuda": computing}, hold=memory + waiting)

    def int8_scores(rope: bool) -> StageCost:
        operands = (BLOCK + 2 * rows) * LATENT
        flop = 2.0 * BLOCK * 2 * rows * LATENT * rates.int8_flop
        latent = {"tensor": flop, "shared": operands * rates.shared}
        if not rope:
            return StageCost(latent)
        both = rates.product(BLOCK, rows, ROPE, fixed["product"])
        busy = {engine: seconds + latent[engine] for engine, seconds in both.busy.items()}
        return StageCost(busy, hold=both.hold)

    def softmax() -> StageCost:
        elements = rows * BLOCK
        busy = {"cuda": elements * INT8_SOFTMAX_OPS * rates.cuda, "sfu": elements * rates.sfu}
        if transposed:
            busy["cuda"] += rows * LATENT * rates.cuda  # O^T is rescaled always
            return StageCost(busy, hold=fixed["softmax"])
        return StageCost(busy, hold=fixed["softmax_second"])  # beside products, as that one is

    def values(columns: int) -> StageCost:
        """V^T P^T of so many columns of V, which is operand A in registers."""
        bytes_ = columns * BLOCK + math.ceil(columns / 64) * BLOCK * rows * 2
        busy = {
            "tensor": 2.0 * columns * rows * BLOCK * rates.flop,
            "cuda": columns * BLOCK * DEQUANTIZE_OPS * rates.cuda,
            "shared": bytes_ * rates.shared,
        }
        return StageCost(busy, hold=fixed["product"])

    def stored() -> StageCost:
        """Normalises half of O and stores it."""
        copied, what = (2, "store") if end == STORED else (kernel.partial_bytes, "store_partial")
        busy = {"cuda": 3 * half * rates.cuda, "copy": half * copied * rates.store}
        if transposed and kernel.computing == 2:
            busy["shared"] = half * 4 * rates.shared
        return StageCost(busy, hold=fixed[what])

    def stage(step: Step) -> StageCost:
        match step.stage:
            case "ITEM":
                return StageCost({}, hold=l2)
            case "LOAD":
                return StageCost({"copy": BLOCK * kernel.token_bytes * rates.copy}, latency=memory)
            case "LOAD_Q" | "LOAD_Q_L" | "LOAD_Q_R":
                return quantize()
            case "QK":
                return int8_scores(rope=transposed)
            case "QK_ROPE":
                return rates.product(BLOCK, rows, ROPE, fixed["product"])
            case "SM":
                return softmax()
            case "PUBLISH":  # a fence and an arrival
                return StageCost({}, hold=profile["latency.barrier"])
            case "PV":
                return values(LATENT)
            case "PV_L" | "PV_R":
                return values(LATENT // 2)
            case "SUM" | "SUM_L" | "SUM_R":
                given = {"shared": half * 4 * rates.shared} if kernel.computing == 2 else {}
                return StageCost(given if transposed else {}, hold=fixed["sum"])
            case "STORE_L" | "STORE_R":
                return stored()
        raise ValueError(f"{kernel.name}: no cost for stage {step.stage}")

    return stage
