"""Costs of MLA kernels in the style of Ascend's fused-infer-attention (FIA).

A kernel is an issue order and choices that change the cost of a stage. A "core" is one cube core
with its two vector cores. The time of a stage is the sum of its counted work (cube fractals, vector
elements, bytes moved) over the profile's rates.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from mla_jax.hal.orders import ASCEND_ORDERS, AscendOrder
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Step
from mla_jax.hal.simulator.one_core import Costs, StageCost
from mla_jax.hal.tiling import FRACTAL, LATENT, ROPE, TilePlan
from mla_jax.hal.work import ITEMSIZE


@dataclass(frozen=True)
class AscendKernel:
    """An issue order and the choices that change the cost of a stage.

    tail_row_sum: row sums and maxima are kept element-wise over a block and reduced once at its
        end, instead of once per slice of columns.
    unit_flags: cube, FixPipe and L0C pass tiles on by unit flags, without a set/wait pair per tile.
    fractal_layout: S and P stay in the cube's fractal layout, so that P is not converted on its way
        to L1.
    convert_load: the cache is ND and is converted to fractals on load; False is an NZ cache.
    head_group: query rows per vector instruction.
    update_ping_pong: UP loads the next rows while it computes on these.
    q_tokens: query tokens per job ("Q2": 2).
    block_kv: keys per block; None is as many as fit, 512 on all 910s.
    splits: requests are split over the keys, so that all cores get equally many, and merged (flash
        decoding). False gives each request, or each of its row tiles, to the next free core.
    expanded: prefill with keys of 192 and values of 128 values per head, and a causal mask. False
        is the absorbed form, in which all heads read the same 512 + 64 values of a token.
    replayed: the call is repeated on the same cache, so that L2 still holds a cache that fits.

    Raises ValueError for choices that exclude each other.
    """

    name: str
    order: AscendOrder
    kv_dtype: str = "bf16"
    tail_row_sum: bool = True
    unit_flags: bool = True
    fractal_layout: bool = True
    convert_load: bool = False
    head_group: int = 16
    update_ping_pong: bool = True
    q_tokens: int = 1
    block_kv: int | None = None
    splits: bool = False
    expanded: bool = False
    replayed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.head_group <= 64:
            raise ValueError(f"{self.name}: head_group = {self.head_group}, wanted 1 to 64")
        if self.q_tokens not in (1, 2):
            raise ValueError(f"{self.name}: q_tokens = {self.q_tokens}, wanted 1 or 2")
        if self.kv_dtype not in ("bf16", "fp16", "int8"):
            raise ValueError(
                f"{self.name}: kv_dtype = {self.kv_dtype!r}, wanted bf16, fp16 or int8"
            )
        if self.expanded and self.kv_dtype == "int8":
            raise ValueError(f"{self.name}: expanded needs kv_dtype bf16 or fp16, got 'int8'")
        if self.order.rescale == "exponent_add" and self.kv_dtype == "int8":
            raise ValueError(
                f"{self.name}: AMLA adds P.V to O in memory, which int32 products can't"
            )
        if self.order.signals == 2 and self.kv_dtype != "int8":
            raise ValueError(
                f"{self.name}: signals = 2 needs kv_dtype = 'int8', got {self.kv_dtype!r}"
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Values of a key and of a value."""
        return (192, 128) if self.expanded else (LATENT + ROPE, LATENT)

    @property
    def bytes_per_stored(self) -> float:
        """Bytes read per byte of the cache; an ND cache is converted on the way."""
        return 2.0 if self.convert_load else 1.0

    @property
    def score_bytes(self) -> float:
        """Bytes that softmax reads per score; the parts of an int8 score may be separate."""
        return 8.0 if self.kv_dtype == "int8" and self.order.signals == 1 else 4.0

    @property
    def job_rows(self) -> int:
        """Query rows per job at most; int8 keeps two products of QK and has half as many."""
        return 128 if self.kv_dtype == "int8" else 128 * self.q_tokens


_V0 = AscendKernel(
    "int8-v0",
    dataclasses.replace(ASCEND_ORDERS["chunk1"], name="int8-v0", update_slots=1),
    kv_dtype="int8",
    tail_row_sum=False,
    unit_flags=False,
    fractal_layout=False,
    convert_load=False,
    head_group=8,
    update_ping_pong=False,
)
_V11_ORDER = AscendOrder("int8-v11", chunk=4, preload=0, signals=2, update="chunk")

# The ingredients of V11, one by one, in the order in which the ablation adds them.
INGREDIENTS: dict[str, dict[str, object]] = {
    "tail row sum and max": {"tail_row_sum": True},
    "cube and L0C unit flags": {"unit_flags": True},
    "S and P layout": {"fractal_layout": True},
    "larger head groups in SM": {"head_group": 16},
    "UP ping-pong": {"update_ping_pong": True, "order.update_slots": 2},
    "two signals after QK": {"order.signals": 2},
    "chunk 4": {"order.chunk": 4, "order.preload": 0},
    "one UP a chunk": {"order.update": "chunk"},
}


def with_ingredients(kernel: AscendKernel, *names: str) -> AscendKernel:
    """Returns `kernel` with some of V11's ingredients."""
    order: dict[str, object] = {}
    direct: dict[str, object] = {}
    for name in names:
        for key, value in INGREDIENTS[name].items():
            (order if key.startswith("order.") else direct)[key.removeprefix("order.")] = value
    changed = dataclasses.replace(kernel.order, **order)  # type: ignore[arg-type]
    return dataclasses.replace(kernel, order=changed, **direct)  # type: ignore[arg-type]


ASCEND_KERNELS = {
    "int8-v0": _V0,
    "int8-v11": dataclasses.replace(
        with_ingredients(_V0, *INGREDIENTS), name="int8-v11", order=_V11_ORDER
    ),
    "amla": AscendKernel("amla", ASCEND_ORDERS["amla"], q_tokens=2),
    "fia": AscendKernel("fia", ASCEND_ORDERS["chunk1"], q_tokens=2, splits=True),
    "fia-prefill": AscendKernel("fia-prefill", ASCEND_ORDERS["chunk1"], splits=True, expanded=True),
} | {
    f"{dtype}-{name}": AscendKernel(f"{dtype}-{name}", order, kv_dtype=dtype)
    for dtype in ("bf16", "int8")
    for name, order in ASCEND_ORDERS.items()
    if (order.signals == 1 if dtype == "bf16" else order.rescale == "multiply")
}


@dataclass(frozen=True)
class _Work:
    """The counted work of a stage: bytes by DMA path, cube cycles, vector cycles."""

    cube: float = 0.0
    l0a: float = 0.0
    l0b: float = 0.0
    gm_to_l1: float = 0.0
    fixpipe: float = 0.0
    tiles: int = 0
    slices: int = 0
    vector: float = 0.0
    gm_to_ub: float = 0.0
    ub_to_gm: float = 0.0
    overlapped: bool = True
    marks: dict[str, float] = field(default_factory=dict)


FRACTAL_OPS = {2: 2 * 16**3, 1: 2 * 16 * 32 * 16}  # of a 16-bit and of an int8 fractal product


def cube_cycles(
    rows: int,
    depth: int,
    columns: int,
    itemsize: int,
    head: float = 6.0,
    rate: float | None = None,
) -> float:
    """Returns the cycles of an L0 multiply: head + ceil(m/16) * ceil(k bytes/32) * ceil(n/16).

    rate: operations per cycle; None is one fractal product per cycle.
    """
    fractals = math.ceil(rows / 16) * math.ceil(depth * itemsize / 32) * math.ceil(columns / 16)
    return head + fractals * (FRACTAL_OPS[itemsize] / rate if rate else 1.0)


def _product(
    profile: HardwareProfile,
    plan: TilePlan,
    stage: str,
    rows: int,
    depth: int,
    columns: int,
    item: int,
) -> _Work:
    """Returns the work of rows x depth . depth x columns in L0 tiles, in FIA's loop order.

    L1 gets the right operand in slices, as deep as the plan's L1 tile of the stage.
    """
    tiles = {(tile.level, tile.stage): tile for tile in plan.tiles}
    side, step = tiles["l0", stage].n, tiles["l0", stage].k
    head = profile["engine.cube_head"]
    rate = profile["engine.cube_int8" if item == 1 else "engine.cube_fp16"]
    row_tiles = [min(side, rows - r) for r in range(0, rows, side)]
    steps = [min(step, depth - k) for k in range(0, depth, step)]
    column_tiles = math.ceil(columns / side)
    cycles = column_tiles * sum(
        cube_cycles(m, k, side, item, head, rate) for m in row_tiles for k in steps
    )
    return _Work(
        cube=cycles,
        l0a=column_tiles * rows * depth * item,
        l0b=len(row_tiles) * depth * columns * item,
        tiles=column_tiles * len(row_tiles),
        slices=column_tiles * math.ceil(depth / tiles["l1", stage].k),
    )


def output_in_ub(plan: TilePlan, kernel: AscendKernel, rows: int, vectors: float) -> bool:
    """Returns whether O of a tile fits beside the rest of UB, so that it never leaves it.

    At 128 rows that is so for the 128 columns of the expanded form, and not for 512.
    """
    state = 4.0 * rows * kernel.widths[1] / vectors
    return plan.used()["ub"] + state <= plan.capacity["ub"]


def port_bytes(
    kernel: AscendKernel, rows: int, keys: int, in_ub: bool = False
) -> tuple[float, float]:
    """Returns the bytes per block that a cube core and its vector cores read from memory or L2.

    The cube core reads keys, values and P. The vector cores read S, and, unless AMLA adds in
    memory, the product PV and O: the round trip of O.

    in_ub: O stays in UB.
    """
    item = ITEMSIZE[kernel.kv_dtype]
    width = sum(kernel.widths) * item + (ROPE if kernel.kv_dtype == "int8" else 0)
    converted = 1.0 if kernel.fractal_layout else 2.0
    cube = keys * (width * kernel.bytes_per_stored + rows * item * converted)
    vector = kernel.score_bytes * rows * keys
    if kernel.kv_dtype == "int8" and kernel.order.signals == 2:
        vector += 4.0 * rows * keys  # DEQUANT reads and SM reads
    if kernel.order.rescale == "multiply":
        once_in = kernel.order.chunk or math.inf if kernel.order.update == "chunk" else 1
        vector += (1 + (0 if in_ub else 1 / once_in)) * 4.0 * rows * kernel.widths[1]
    return cube, vector


def ascend_costs(
    profile: HardwareProfile,
    kernel: AscendKernel,
    plan: TilePlan,
    rows: int,
    share: float,
    *,
    values_in_l2: bool = True,
    keys_in_l2: bool = False,
    port: tuple[float, float] = (math.inf, math.inf),
) -> Costs:
    """Returns the cost function of stages, for a tile of `rows` rows and blocks of plan.block_kv.

    share: bytes per second of the device's memory for this core while all cores are working.
    values_in_l2: whether PV reads the values from L2, because QK has just loaded them, or again
        from memory.
    keys_in_l2: whether QK reads the keys from L2.
    port: bytes per second that the cube core and its vector cores may read.
    """
    key_width, width = kernel.widths
    keys, item = plan.block_kv, ITEMSIZE[kernel.kv_dtype]
    int8 = kernel.kv_dtype == "int8"
    cycle, scale = profile.cycle, profile["engine.dma_scale"]
    vectors = profile["core.vector_cores"]
    in_ub = output_in_ub(plan, kernel, rows, vectors)
    flag = profile["latency.flag"]
    l2 = profile["memory.l2_bandwidth"] / profile.cores
    from_l2 = l2 if values_in_l2 else share
    stored = kernel.bytes_per_stored
    state = 4.0 * rows * width  # O, and a product PV before it is added
    cube_port, vector_port = port

    def passes(wide: float, narrow: float, columns: int) -> float:
        """Returns vector cycles of passes over rows x columns, by their element rate."""
        elements = rows * columns / vectors
        instructions = math.ceil(rows / vectors / kernel.head_group) * math.ceil(columns / LATENT)
        per_pass = instructions * profile["engine.vector_head"]
        return wide * (elements / profile["engine.vector_wide"] + per_pass) + narrow * (
            elements / profile["engine.vector_narrow"] + per_pass
        )

    def matrix(work: _Work, source: float) -> StageCost:
        load = min(profile["engine.gm_to_l1"] * scale, source, cube_port)
        busy = {
            "cube": work.cube * cycle,
            "mte1": work.l0a / profile["engine.l1_to_l0a"] + work.l0b / profile["engine.l1_to_l0b"],
            "mte2": work.gm_to_l1 / load,
            "fixpipe": work.fixpipe / (profile["engine.fixpipe"] * scale),
        }
        # The load of each L1 slice signals the copy to L0 by a set/wait pair. Unit flags replace
        # the pairs of cube and FixPipe, one per tile.
        waits = (work.slices + (0 if kernel.unit_flags else work.tiles)) * flag
        return StageCost(busy, hold=profile["latency.job"] + waits)

    def vector(work: _Work) -> StageCost:
        busy = {
            "vector": work.vector * cycle,
            "mte2v": work.gm_to_ub / min(profile["engine.gm_to_ub"] * scale * vectors, vector_port),
            "mte3": work.ub_to_gm / (profile["engine.ub_to_gm"] * scale * vectors),
        }
        exposed = 0.0 if work.overlapped else busy["mte2v"] + busy["mte3"]
        return StageCost(busy, hold=exposed)

    def scores(depth: int, itemsize: int) -> StageCost:
        work = _product(profile, plan, "QK", rows, depth, keys, itemsize)
        loads = keys * depth * itemsize * stored
        work = dataclasses.replace(work, gm_to_l1=loads, fixpipe=4.0 * rows * keys)
        return matrix(work, l2 if keys_in_l2 else share)

    def outputs() -> StageCost:
        work = _product(profile, plan, "PV", rows, keys, width, item)
        convert = 1.0 if kernel.fractal_layout else 2.0
        loads = keys * width * item * stored + rows * keys * item * convert
        return matrix(dataclasses.replace(work, gm_to_l1=loads, fixpipe=state), from_l2)

    def softmax(inputs: float) -> StageCost:
        # Scale, subtract, exponential, maximum and cast, and a sum if slices are reduced.
        narrow, wide = 5.0, 1.0
        if not kernel.tail_row_sum:
            narrow += 1.0
        if int8:  # the dynamic scale of P takes a multiplication and a cast
            narrow, wide = narrow + 1.0, wide + 1.0
            if kernel.order.signals == 1:
                narrow, wide = narrow + 2.0, wide + 1.0
            elif inputs:
                narrow += 1.0
        return vector(_Work(vector=passes(wide, narrow, keys), gm_to_ub=inputs * rows * keys,
                            ub_to_gm=item * rows * keys))  # fmt: skip

    def update(step: Step) -> StageCost:
        blocks = sum(read.buffer == "Otmp" for read in step.reads)
        narrow = 1.0 * blocks + (1.0 * blocks if int8 else 0.0)
        before = 0.0 if in_ub or all(read.buffer != "O" for read in step.reads) else state
        return vector(_Work(vector=passes(1.0 * blocks, narrow, width),
                            gm_to_ub=blocks * state + before, ub_to_gm=state,
                            overlapped=kernel.update_ping_pong))  # fmt: skip

    def stage(step: Step) -> StageCost:
        match step.stage:
            case "QK":
                if not int8:
                    return scores(key_width, item)
                nope, rope = scores(LATENT, 1), scores(ROPE, 2)
                busy = {engine: nope.busy[engine] + rope.busy[engine] for engine in nope.busy}
                return StageCost(busy, hold=nope.hold)
            case "QK_NOPE":
                return scores(LATENT, 1)
            case "QK_ROPE":
                rope = scores(ROPE, 2)
                return StageCost(rope.busy, hold=rope.hold - profile["latency.job"])
            case "DEQUANT":
                return vector(_Work(vector=passes(1.0, 1.0, keys), gm_to_ub=4.0 * rows * keys))
            case "SM":
                return softmax(kernel.score_bytes)
            case "PV":
                return outputs()
            case "UP":
                return update(step)
            case "ADD":
                return vector(_Work(ub_to_gm=state))
        raise ValueError(f"{kernel.name}: no cost for stage {step.stage}")

    return stage


def job_rows(kernel: AscendKernel, rows: int) -> list[int]:
    """Returns the rows of each job of a request, which is split evenly."""
    jobs = math.ceil(rows / max(kernel.job_rows, FRACTAL))
    size = math.ceil(rows / jobs)
    return [min(size, rows - start) for start in range(0, rows, size)]
