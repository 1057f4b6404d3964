"""The published issue orders, each a function from a number of KV blocks to a `Schedule`.

Ascend orders have the stages QK (C1), SM (softmax, V1), PV (C2) and UP (update of O, V2). AMLA
replaces UP by ADD, the integer add that rescales O in memory.

GPU orders load KV into slots in shared memory with LOAD_L and LOAD_R, the two halves of the 512
latent columns. LOAD_L also loads the rope columns. O stays in registers, halved over the output
columns, which PV_L and PV_R compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from mla_jax.hal.schedule import Access, Schedule, ScheduleBuilder

ScheduleFn = Callable[[int], Schedule]


@dataclass(frozen=True)
class AscendOrder:
    """An Ascend issue order of C1, V1, C2 and V2. Raises ValueError for an impossible one.

    chunk: KV blocks whose QK are issued together; 0 is all of them.
    preload: chunks of QK that are issued before the first PV.
    rescale: "multiply", where O is read and written back by UP, or "exponent_add" (AMLA).
    signals: 1 or 2 after QK. With int8, 2 are one for the nope part and one for the rope part.
    update: whether UP runs once per "block" or once per "chunk".
    update_slots: 1, or 2 for one slot of Otmp more than a chunk needs (UP ping-pong).
    overlap: False lets no block start before the previous one is done.
    """

    name: str = "chunk1"
    chunk: int = 1
    preload: int = 1
    rescale: str = "multiply"
    signals: int = 1
    update: str = "block"
    update_slots: int = 2
    overlap: bool = True

    def __post_init__(self) -> None:
        for field, low, high in (("chunk", 0, 64), ("preload", 0, 4), ("signals", 1, 2),
                                 ("update_slots", 1, 2)):  # fmt: skip
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{self.name}: {field} = {value}, wanted {low} to {high}")
        if self.rescale not in ("multiply", "exponent_add"):
            raise ValueError(
                f"{self.name}: rescale = {self.rescale!r}, wanted multiply or exponent_add"
            )
        if self.update not in ("block", "chunk"):
            raise ValueError(f"{self.name}: update = {self.update!r}, wanted block or chunk")
        if not self.overlap and (self.chunk != 1 or self.preload):
            raise ValueError(f"{self.name}: overlap = False needs chunk = 1 and preload = 0")
        if self.update == "chunk" and self.rescale == "exponent_add":
            raise ValueError(
                f"{self.name}: update = 'chunk' needs rescale = 'multiply': AMLA has no UP"
            )

    def slots(self, num_blocks: int) -> dict[str, int]:
        """Returns the number of slots of each workspace buffer."""
        chunk = min(self.chunk or num_blocks, num_blocks)
        ahead = min(chunk * (self.preload + 1), num_blocks)
        slots = {"S": ahead, "P": ahead, "state": 1, "O": 1}
        if self.signals == 2:
            slots["S_rope"] = ahead
        if self.rescale == "multiply":
            slots["Otmp"] = min(chunk + self.update_slots - 1, num_blocks)
        return slots

    def workspace_bytes(self, num_blocks: int, rows: int, block_kv: int, itemsize: int) -> int:
        """Returns the bytes of S, P, Otmp and O in global memory for one core."""
        slots = self.slots(num_blocks)
        wide = slots["S"] + slots.get("S_rope", 0)
        values = wide * block_kv + (slots.get("Otmp", 0) + 1) * 512
        return rows * (4 * values + itemsize * slots["P"] * block_kv)

    @lru_cache(maxsize=1024)  # noqa: B019  an order is an immutable value, so the cache is no leak
    def __call__(self, num_blocks: int) -> Schedule:
        chunk = min(self.chunk or num_blocks, num_blocks)
        build = ScheduleBuilder(self.name, num_blocks, chunk, self.slots(num_blocks))
        chunks = [range(i, min(i + chunk, num_blocks)) for i in range(0, num_blocks, chunk)]
        for index in range(len(chunks) + self.preload):
            issued = chunks[index] if index < len(chunks) else range(0)
            drained = chunks[index - self.preload] if index >= self.preload else range(0)
            if self.rescale == "exponent_add" and self.preload:
                for block in issued:
                    self._keys(build, block)
                self._accumulate(build, drained)
                for block in issued:
                    self._softmax(build, block)
                continue
            for block in issued:
                self._keys(build, block)
                self._softmax(build, block)
            if self.rescale == "exponent_add":
                self._accumulate(build, drained)
            elif drained:
                self._round_trip(build, drained)
        return build.build()

    def _keys(self, build: ScheduleBuilder, block: int) -> None:
        s = build.slot("S", block)
        done = () if self.overlap or not block else (Access("O", 0, block - 1),)
        if self.signals == 1:
            build.add("cube", "QK", block, reads=done, writes=(s,))
            return
        build.add("cube", "QK_NOPE", block, reads=done, writes=(s,))
        build.add("cube", "QK_ROPE", block, writes=(build.slot("S_rope", block),))

    def _softmax(self, build: ScheduleBuilder, block: int) -> None:
        s = build.slot("S", block)
        inputs: tuple[Access, ...] = (s,)
        if self.signals == 2:
            build.add("vector", "DEQUANT", block, reads=(s,), writes=(s,))
            inputs = (s, build.slot("S_rope", block))
        state = (Access("state", 0, block - 1),) if block else ()
        outputs = (build.slot("P", block), Access("state", 0, block))
        build.add("vector", "SM", block, reads=inputs + state, writes=outputs)

    def _accumulate(self, build: ScheduleBuilder, blocks: range) -> None:
        """Adds AMLA's steps: the vector unit adds to O's exponents, the cube unit adds P.V to O."""
        for block in blocks:
            p, before = build.slot("P", block), (Access("O", 0, block - 1),) if block else ()
            if block:
                build.add("vector", "ADD", block, reads=(p, *before), writes=before)
            build.add("cube", "PV", block, reads=(p, *before), writes=(Access("O", 0, block),))

    def _round_trip(self, build: ScheduleBuilder, blocks: range) -> None:
        """Adds PV into Otmp, and UP: the vector unit reads O, rescales it, adds and writes it."""
        for block in blocks:
            p, otmp = build.slot("P", block), build.slot("Otmp", block)
            build.add("cube", "PV", block, reads=(p,), writes=(otmp,))
            if self.update == "block":
                self._update(build, range(block, block + 1))
        if self.update == "chunk":
            self._update(build, blocks)

    def _update(self, build: ScheduleBuilder, blocks: range) -> None:
        parts = tuple(build.slot(name, b) for b in blocks for name in ("Otmp", "P"))
        before = (Access("O", 0, blocks[0] - 1),) if blocks[0] else ()
        build.add("vector", "UP", blocks[-1], reads=parts + before,
                  writes=(Access("O", 0, blocks[-1]),))  # fmt: skip


ASCEND_ORDERS = {
    order.name: order
    for order in (
        AscendOrder("serial", preload=0, overlap=False),
        AscendOrder("chunk1"),
        AscendOrder("chunk1-no-preload", preload=0),
        AscendOrder("chunk2", chunk=2, preload=0),
        AscendOrder("chunk2-preload", chunk=2),
        AscendOrder("chunk4", chunk=4, preload=0),
        AscendOrder("chunk4-preload", chunk=4),
        AscendOrder("chunk4-up-chunk", chunk=4, preload=0, update="chunk"),
        AscendOrder("chunk-n", chunk=0, preload=0),
        AscendOrder("amla", preload=1, rescale="exponent_add"),
        AscendOrder("int8-1-signal", preload=1, signals=1),
        AscendOrder("int8-2-signals", preload=1, signals=2),
    )
}


def _load(build: ScheduleBuilder, block: int, ctas: tuple[str, ...] = ("",)) -> None:
    """Adds the loads of a block; of two CTAs each loads one half and multicasts it to both."""
    for half, cta in zip("LR", (ctas[0], ctas[-1]), strict=True):
        slots = tuple(build.slot(f"kv_{half.lower()}{c}", block) for c in ctas)
        build.add(f"load{cta}", f"LOAD_{half}", block, writes=slots)


def _scores(build: ScheduleBuilder, unit: str, block: int, cta: str = "") -> None:
    keys = tuple(build.slot(f"{name}{cta}", block) for name in ("kv_l", "kv_r"))
    build.add(f"{unit}{cta}", f"QK{cta}", block, reads=(Access(f"q{cta}", 0, -1), *keys),
              writes=(build.slot(f"S{cta}", block),))  # fmt: skip


def _softmax(build: ScheduleBuilder, unit: str, block: int, cta: str = "") -> None:
    state = (Access(f"state{cta}", 0, block - 1),) if block else ()
    build.add(f"{unit}{cta}", f"SM{cta}", block, reads=(build.slot(f"S{cta}", block), *state),
              writes=(build.slot(f"P{cta}", block), Access(f"state{cta}", 0, block)))  # fmt: skip


def _pv(build: ScheduleBuilder, unit: str, half: str, block: int, cta: str = "") -> None:
    kept = f"O_{half}{cta}"
    before = (Access(kept, 0, block - 1),) if block else ()
    kv = build.slot(f"kv_{half.lower()}{cta}", block)
    build.add(f"{unit}{cta}", f"PV_{half}{cta}", block,
              reads=(build.slot(f"P{cta}", block), kv, *before),
              writes=(Access(kept, 0, block),))  # fmt: skip


def _store(
    build: ScheduleBuilder, last: int, units: tuple[str, str], cta: str = "", staged: bool = False
) -> None:
    """Adds the stores of O; `staged` stores use the KV slots that follow the last block's."""
    for half, unit in zip("LR", units, strict=True):
        reads = (Access(f"O_{half}{cta}", 0, last), Access(f"state{cta}", 0, last))
        slot = (build.slot(f"kv_{half.lower()}{cta}", last + 1),) if staged else ()
        build.add(f"{unit}{cta}", f"STORE_{half}{cta}", last, reads=reads, writes=slot)


def _gpu_builder(
    name: str, n: int, period: int, stages: int, pairs: int, ctas: tuple[str, ...] = ("",)
) -> ScheduleBuilder:
    slots = {"q": 1, "kv_l": stages, "kv_r": stages, "S": pairs, "P": pairs, "state": 1,
             "O_L": 1, "O_R": 1}  # fmt: skip
    each = {f"{buffer}{cta}": count for cta in ctas for buffer, count in slots.items()}
    build = ScheduleBuilder(name, n, period, each)
    for cta in ctas:
        build.add(f"load{cta}", f"LOAD_Q{cta}", -1, writes=(Access(f"q{cta}", 0, -1),))
    return build


@lru_cache(maxsize=1024)
def fa2(num_blocks: int, *, stages: int = 2, name: str = "fa2") -> Schedule:
    """Returns the order of a single pipeline, in which only loads overlap with computation.

    Every warp does QK, softmax and PV of a block one after the other.
    """
    build = _gpu_builder(name, num_blocks, stages, stages, 1)
    for block in range(min(stages, num_blocks)):
        _load(build, block)
    for block in range(num_blocks):
        _scores(build, "warps", block)
        _softmax(build, "warps", block)
        _pv(build, "warps", "L", block)
        _pv(build, "warps", "R", block)
        if block + stages < num_blocks:
            build.add("warps", "ISSUE", block + stages)
            _load(build, block + stages)
    _store(build, num_blocks - 1, ("warps", "warps"))
    return build.build()


@lru_cache(maxsize=1024)
def fa3(num_blocks: int, *, stages: int = 4, name: str = "fa3") -> Schedule:
    """Returns the order of FlashInfer's first FA3 template: a producer and two consumers.

    The consumers issue QK of the next block before PV of this one, so that softmax runs at the same
    time as PV. The output is stored through the KV slots.
    """
    build = _gpu_builder(name, num_blocks, stages, stages, 2)
    for block in range(min(stages, num_blocks)):
        _load(build, block)
    for block in range(num_blocks + 1):
        if block < num_blocks:
            _scores(build, "mma", block)
        if block:
            for half in "LR":
                _pv(build, "mma", half, block - 1)
            if block - 1 + stages < num_blocks:
                _load(build, block - 1 + stages)
        if block < num_blocks:
            _softmax(build, "warps", block)
    _store(build, num_blocks - 1, ("warps", "warps"), staged=True)
    return build.build()


@lru_cache(maxsize=1024)
def fa3_two(
    num_blocks: int, *, stages: int = 2, widen: bool = False, name: str = "fa3-2wg"
) -> Schedule:
    """Returns the order of FlashInfer's later template.

    Warpgroup 0 loads and does PV of the left half. Warpgroup 1 does QK, softmax and PV of the right
    half. With `widen` it also converts fp8 KV to bf16.
    """
    build = _gpu_builder(name, num_blocks, stages, stages, 1)
    for block in range(min(stages, num_blocks)):
        _load(build, block)
    for block in range(num_blocks):
        if widen:
            kv = (build.slot("kv_l", block), build.slot("kv_r", block))
            build.add("wg1", "WIDEN", block, reads=kv, writes=kv)
        _scores(build, "wg1", block)
        _softmax(build, "wg1", block)
        _pv(build, "wg0", "L", block)
        _pv(build, "wg1", "R", block)
        if block + stages < num_blocks:
            build.add("wg0", "ISSUE", block + stages)
            _load(build, block + stages)
    _store(build, num_blocks - 1, ("wg0", "wg1"))
    return build.build()


@lru_cache(maxsize=1024)
def four_warpgroups(num_blocks: int, *, stages: int = 2, name: str = "four-wg") -> Schedule:
    """Returns an order in which load, QK and the two halves of PV each have a warpgroup."""
    build = _gpu_builder(name, num_blocks, stages, stages, 2)
    for block in range(min(stages, num_blocks)):
        _load(build, block)
    for block in range(num_blocks + 1):
        if block < num_blocks:
            _scores(build, "mma1", block)
            _softmax(build, "wg1", block)
        if block:
            _pv(build, "mma2", "L", block - 1)
            _pv(build, "mma3", "R", block - 1)
            if block - 1 + stages < num_blocks:
                _load(build, block - 1 + stages)
    _store(build, num_blocks - 1, ("wg2", "wg3"))
    return build.build()


@lru_cache(maxsize=1024)
def seesaw(num_blocks: int, *, stages: int = 2, ahead: int = 2, name: str = "seesaw") -> Schedule:
    """Returns FlashMLA's order: two warpgroups, each with half of the output columns.

    Two KV blocks are processed at a time. Each warpgroup does QK and softmax of its own block, then
    its half of PV with both P's. FlashMLA calls it "seesaw".

    ahead: blocks whose QK are issued before the first of their PV. A warpgroup issues what is
    ready. If keys are waiting that is 2, and one softmax overlaps with the other's matrix work. If
    keys arrive one block at a time it is 1.
    """
    build = _gpu_builder(name, num_blocks, 2, stages, 2)
    for block in range(min(stages, num_blocks)):
        _load(build, block)
    for first in range(0, num_blocks, ahead):
        group = range(first, min(first + ahead, num_blocks))
        for block in group:
            _scores(build, f"mma{block % 2}", block)
        for block in group:
            _softmax(build, f"wg{block % 2}", block)
            _pv(build, "mma0", "L", block)
            _pv(build, "mma1", "R", block)
            if block + stages < num_blocks:
                _load(build, block + stages)
    _store(build, num_blocks - 1, ("wg0", "wg1"))
    return build.build()


@lru_cache(maxsize=1024)
def seesaw_cluster(
    num_blocks: int, *, stages: int = 2, ahead: int = 2, name: str = "seesaw-cluster2"
) -> Schedule:
    """Returns FlashMLA's order in a cluster of two CTAs with two row tiles of one request.

    Each CTA loads half of every KV block and multicasts it to both. The names of the second CTA end
    in "@1".
    """
    ctas = ("", "@1")
    build = _gpu_builder(name, num_blocks, 2, stages, 2, ctas)
    for block in range(min(stages, num_blocks)):
        _load(build, block, ctas)
    for first in range(0, num_blocks, ahead):
        group = range(first, min(first + ahead, num_blocks))
        for block in group:
            for cta in ctas:
                _scores(build, f"mma{block % 2}", block, cta)
        for block in group:
            for cta in ctas:
                _softmax(build, f"wg{block % 2}", block, cta)
                _pv(build, "mma0", "L", block, cta)
                _pv(build, "mma1", "R", block, cta)
            if block + stages < num_blocks:
                _load(build, block + stages, ctas)
    for cta in ctas:
        _store(build, num_blocks - 1, ("wg0", "wg1"), cta)
    return build.build()


@lru_cache(maxsize=1024)
def split_loop(num_blocks: int, *, stages: int = 1, name: str = "triton-split") -> Schedule:
    """Returns the order of a Triton loop: load K, wait, QK, softmax, load V, wait, PV."""
    build = _gpu_builder(name, num_blocks, 1, stages, 1)
    for block in range(num_blocks):
        _load(build, block)
        _scores(build, "warps", block)
        _softmax(build, "warps", block)
        _pv(build, "warps", "L", block)
        _pv(build, "warps", "R", block)
    _store(build, num_blocks - 1, ("warps", "warps"))
    return build.build()


GPU_ORDERS: dict[str, ScheduleFn] = {
    "fa2": fa2,
    "fa3": fa3,
    "fa3-2wg": fa3_two,
    "four-wg": four_warpgroups,
    "seesaw": seesaw,
    "seesaw-1-ahead": partial(seesaw, ahead=1, name="seesaw-1-ahead"),
    "seesaw-cluster2": seesaw_cluster,
    "fp8-widen": partial(fa3_two, widen=True, name="fp8-widen"),
    "triton-split": split_loop,
}


def schedule_named(name: str) -> ScheduleFn:
    """Returns an order by its name. Raises ValueError, which lists the names, if there is none."""
    orders: dict[str, ScheduleFn] = {**ASCEND_ORDERS, **GPU_ORDERS}
    if name not in orders:
        raise ValueError(f"schedule = {name!r}, wanted one of {', '.join(sorted(orders))}")
    return orders[name]
