"""The issue orders of our own Hopper kernels, `pallas_kernels.hopper.kernels`, as schedules.

A worker of these kernels runs several work items one after the other, and loads the next item's
first block while it still computes this one. So an order may begin with an earlier work item of
`before` blocks: what the schedule takes longer than the earlier item alone is the time of an item
that is not a worker's first.

The stages have the names that the kernel's own time stamps have (`pallas_kernels.hopper.stamps`):

    LOAD_Q LOAD_L LOAD_R LOAD_ROPE    the loader copies q, and the three parts of a KV block
    QK SM PV_L PV_R                   scores, softmax, and both halves of O += P V
    SUM_L SUM_R STORE_L STORE_R       the end of a work item: row sums, then normalise and store

Over an int8 cache a block has one barrier, and there are four more stages:

    ITEM LOAD                         the loader checks a work item, and copies a KV block
    LOAD_Q                            warpgroups that compute read q and quantize it
    QK_ROPE PUBLISH                   the bfloat16 part of the scores, and the signal of P
"""

import math
from functools import lru_cache

from mla_jax.hal.schedule import Access, Schedule, ScheduleBuilder

STAGES = 2  # of KV blocks in shared memory; `decode_transposed` may have others


def _items(num_blocks: int, before: int) -> list[range]:
    """Returns the blocks of each work item of a schedule."""
    if not 0 <= before < num_blocks:
        raise ValueError(f"before = {before}, wanted 0 to {num_blocks - 1} of {num_blocks} blocks")
    return [r for r in (range(before), range(before, num_blocks)) if r]


def _builder(name: str, num_blocks: int, period: int, **more: int) -> ScheduleBuilder:
    slots = {"q": 1, "kv_l": STAGES, "kv_r": STAGES, "kv_rope": STAGES, "S": 1, "P": 1, "state": 1,
             "O_L": 1, "O_R": 1, "sum": 2} | more  # fmt: skip
    return ScheduleBuilder(name, num_blocks, period, slots)


def _load(build: ScheduleBuilder, block: int, parts: tuple[str, ...]) -> None:
    for part in parts:
        slot = build.slot(f"kv_{part.lower()}", block)
        build.add("load", f"LOAD_{part}", block, writes=(slot,))


def _load_q(build: ScheduleBuilder, item: range, slot: int = 0) -> None:
    build.add("load", "LOAD_Q", item[0], writes=(Access("q", slot, item[0]),))


@lru_cache(maxsize=1024)
def hopper_decode(num_blocks: int, *, before: int = 0, name: str = "hopper-decode") -> Schedule:
    """Returns the order of `decode`: FlashMLA's two warpgroups, as docs/hopper_decode.md says.

    Two blocks at a time, warpgroup 0 scores the first and warpgroup 1 the second. Warpgroup 1
    leaves its product with the first P in flight ("mma1") while it computes the second softmax. The
    last block of an odd number is scored by warpgroup 0. P replaces the rope columns of its block.
    """
    build = _builder(name, num_blocks, 2, P=2, S=2)
    parts = ("L", "R", "ROPE")
    loaded = 0

    def load_until(stop: int) -> None:
        nonlocal loaded
        for block in range(loaded, min(stop, num_blocks)):
            _load(build, block, parts)
        loaded = max(loaded, min(stop, num_blocks))

    items = _items(num_blocks, before)
    for item in items:
        if item[0]:
            load_until(item[0] + 1)  # The first block of a later item is loaded before its q.
        _load_q(build, item)
        for first in range(item[0], item[-1] + 1, 2):
            # The loader is in the next item only when its q is free, so it stops at the item's end.
            load_until(min(first + STAGES, item[-1] + 1))
            pair = range(first, min(first + 2, item[-1] + 1))
            for side, block in enumerate(pair):
                _score(build, f"wg{side}", item, block)
            for side, block in enumerate(pair):
                _softmax(build, f"wg{side}", item, block)
                in_flight = side == 0 and len(pair) == 2
                # Warpgroup 1 issues the product after it has read the scores of its own block.
                scores = (build.slot("S", pair[-1]),) if in_flight else ()
                _multiply(build, "wg0", "L", item, block)
                _multiply(build, "mma1" if in_flight else "wg1", "R", item, block, scores)
                load_until(min(block + STAGES + 1, item[-1] + 1))
        if item is not items[-1]:
            load_until(item[-1] + 2)
        _finish(build, item, ("wg0", "wg1"))
    return build.build()


def _score(build: ScheduleBuilder, unit: str, item: range, block: int) -> None:
    keys = tuple(build.slot(part, block) for part in ("kv_l", "kv_r", "kv_rope"))
    build.add(unit, "QK", block, reads=(Access("q", _q_slot(build, item), item[0]), *keys),
              writes=(build.slot("S", block),))  # fmt: skip


def _q_slot(build: ScheduleBuilder, item: range) -> int:
    return 0 if item[0] == 0 else build.slots_of("q") - 1


def _softmax(build: ScheduleBuilder, unit: str, item: range, block: int) -> None:
    state = (Access("state", 0, block - 1),) if block > item[0] else ()
    rope = (build.slot("kv_rope", block),)
    build.add(unit, "SM", block, reads=(build.slot("S", block), *state),
              writes=(build.slot("P", block), *rope, Access("state", 0, block)))  # fmt: skip


def _multiply(
    build: ScheduleBuilder,
    unit: str,
    half: str,
    item: range,
    block: int,
    first: tuple[Access, ...] = (),
) -> None:
    """Adds a product of P and half of V, after `first` has been read."""
    kept, kv = f"O_{half}", build.slot(f"kv_{half.lower()}", block)
    before = (Access(kept, 0, block - 1),) if block > item[0] else ()
    p = (build.slot("P", block), build.slot("kv_rope", block))
    build.add(
        unit, f"PV_{half}", block, reads=(*p, kv, *first, *before), writes=(Access(kept, 0, block),)
    )


def _finish(
    build: ScheduleBuilder, item: range, units: tuple[str, str], stages_o: bool = True
) -> None:
    """Adds the end of an item: row sums are exchanged, then O is normalised and stored.

    stages_o: whether O is staged over q. If not, q is free before.
    """
    last, q = item[-1], (Access("q", _q_slot(build, item), item[0]),)
    of_sum, of_store = ((), q) if stages_o else (q, ())
    for i, (half, unit) in enumerate(zip("LR", units, strict=True)):
        build.add(unit, f"SUM_{half}", last, reads=(Access("state", 0, last), *of_sum),
                  writes=(Access("sum", i, last),))  # fmt: skip
    sums = tuple(Access("sum", i, last) for i in range(2))
    for half, unit in zip("LR", units, strict=True):
        build.add(
            unit, f"STORE_{half}", last, reads=(Access(f"O_{half}", 0, last), *of_store, *sums)
        )


@lru_cache(maxsize=1024)
def hopper_transposed(
    num_blocks: int,
    *,
    before: int = 0,
    kv_stages: tuple[int, int, int] = (STAGES, STAGES, STAGES),
    q_stages: int = 2,
    name: str = "hopper-decode-transposed",
) -> Schedule:
    """Returns the order of `decode_transposed`: one warpgroup loads, and one computes in turn.

    The rope part is free after the scores. q is free before an item's result is stored.

    kv_stages: of the left half of the latent, of its right half and of the rope columns.
    q_stages: work items whose q is in shared memory.
    """
    left, right, rope = kv_stages
    build = _builder(name, num_blocks, math.lcm(*kv_stages), q=q_stages, kv_l=left, kv_r=right,
                     kv_rope=rope)  # fmt: skip
    stages = {"ROPE": rope, "L": left, "R": right}
    items = _items(num_blocks, before)
    first_of = {item[0]: item for item in items}
    loads = iter([(block, part) for block in range(num_blocks) for part in stages])
    following = next(loads, None)

    def load_after(computed: int, stored: int) -> None:
        """Loads what has a stage when so many blocks are computed and so many items stored."""
        nonlocal following
        while following is not None:
            block, part = following
            number = sum(block >= first for first in first_of) - 1
            if block - stages[part] >= computed or number - q_stages >= stored:
                return
            if part == "ROPE" and block in first_of:
                _load_q(build, first_of[block], _q_slot(build, first_of[block]))
            _load(build, block, (part,))
            following = next(loads, None)

    load_after(0, 0)
    for number, item in enumerate(items):
        for block in item:
            _score(build, "wg0", item, block)
            p, state = build.slot("P", block), Access("state", 0, block)
            old = (Access("state", 0, block - 1),) if block > item[0] else ()
            build.add("wg0", "SM", block, reads=(build.slot("S", block), *old), writes=(p, state))
            for half in "LR":
                kv = build.slot(f"kv_{half.lower()}", block)
                kept = f"O_{half}"
                o = (Access(kept, 0, block - 1),) if block > item[0] else ()
                build.add("wg0", f"PV_{half}", block, reads=(p, kv, *o),
                          writes=(Access(kept, 0, block),))  # fmt: skip
            load_after(block + 1, number)
        _finish(build, item, ("wg0", "wg0"), stages_o=False)
        load_after(item[-1] + 1, number + 1)
    return build.build()


@lru_cache(maxsize=1024)
def hopper_int8(
    num_blocks: int, *, before: int = 0, kv_stages: int = 3, name: str = "hopper-decode-int8"
) -> Schedule:
    """Returns the order of `decode_int8`, whose four warpgroups have a role each.

    Warpgroup 2 quantizes q and computes scores and P. It starts the scores of the next block before
    it signals P (PUBLISH), and the signal is given when only their rope part is left. Warpgroups 0
    and 1 multiply a half of V each. The loader copies an item's second block when q is there, and
    begins the next item when the sums of this one are known.

    kv_stages: KV blocks in shared memory, each with its P.
    """
    build = ScheduleBuilder(name, num_blocks, kv_stages, {
        "item": 1, "q": 1, "kv": kv_stages, "P": kv_stages, "S": 1, "S_ROPE": 1, "P_registers": 1,
        "state": 1, "O_L": 1, "O_R": 1, "sum": 1,
    })  # fmt: skip
    loaded = 0

    def load_until(stop: int, q: tuple[Access, ...]) -> None:
        nonlocal loaded
        for block in range(loaded, stop):
            build.add("load", "LOAD", block, reads=q, writes=(build.slot("kv", block),))
        loaded = max(loaded, stop)

    for item in _items(num_blocks, before):
        first, last = item[0], item[-1]
        described, q = Access("item", 0, first), Access("q", 0, first)
        build.add("load", "ITEM", first, writes=(described,))
        load_until(first + 1, ())
        build.add("wg2", "LOAD_Q", first, reads=(described,), writes=(q,))
        load_until(min(first + kv_stages, last + 1), (q,))
        _int8_scores(build, q, first, "QK")
        _int8_scores(build, q, first, "QK_ROPE")
        for block in item:
            old = (Access("state", 0, block - 1),) if block > first else ()
            in_registers = Access("P_registers", 0, block)
            scores = Access("S", 0, block), Access("S_ROPE", 0, block)
            build.add("wg2", "SM", block, reads=(*scores, *old),
                      writes=(in_registers, Access("state", 0, block)))  # fmt: skip
            if block < last:
                _int8_scores(build, q, block + 1, "QK")
            build.add("wg2", "PUBLISH", block, reads=(in_registers,),
                      writes=(build.slot("P", block),))  # fmt: skip
            if block < last:
                _int8_scores(build, q, block + 1, "QK_ROPE")
            for unit, half in (("wg0", "L"), ("wg1", "R")):
                before_it = (Access(f"O_{half}", 0, block - 1),) if block > first else ()
                build.add(unit, f"PV_{half}", block,
                          reads=(build.slot("P", block), build.slot("kv", block), *before_it),
                          writes=(Access(f"O_{half}", 0, block),))  # fmt: skip
            load_until(min(block + 1 + kv_stages, last + 1), (q,))
        sums = Access("sum", 0, last)
        build.add("wg2", "SUM", last, reads=(Access("state", 0, last), described), writes=(sums,))
        for unit, half in (("wg0", "L"), ("wg1", "R")):
            build.add(unit, f"STORE_{half}", last, reads=(Access(f"O_{half}", 0, last), sums))
    return build.build()


def _int8_scores(build: ScheduleBuilder, q: Access, block: int, stage: str) -> None:
    """Adds the int8 part (QK) or the rope part (QK_ROPE) of the scores of a block."""
    build.add("wg2", stage, block, reads=(q, build.slot("kv", block)),
              writes=(Access(stage.replace("QK", "S"), 0, block),))  # fmt: skip


@lru_cache(maxsize=1024)
def hopper_transposed_int8(
    num_blocks: int,
    *,
    before: int = 0,
    kv_stages: int = 4,
    computing: int = 2,
    quantizing: int = 2,
    name: str = "hopper-decode-transposed-int8",
) -> Schedule:
    """Returns the order of `decode_transposed_int8`: one or two warpgroups compute, and one loads.

    Two take turns with the blocks of a CTA, each with an O of its own. At the end of an item each
    gives half of its O to the other one (SUM), and adds up and stores the other half.

    kv_stages: KV blocks in shared memory.
    computing: warpgroups that compute. quantizing: those of them that quantize q, in equal shares.
    """
    own = dict.fromkeys(("S", "P", "state", "O", "given"), computing)
    build = ScheduleBuilder(name, num_blocks, math.lcm(kv_stages, computing),
                            {"item": 2, "q": quantizing, "kv": kv_stages} | own)  # fmt: skip
    items = _items(num_blocks, before)
    first_of = {item[0]: number for number, item in enumerate(items)}
    loaded = 0

    def load_after(computed: int) -> None:
        """Loads what has a stage when so many blocks are computed."""
        nonlocal loaded
        while loaded < min(computed + kv_stages, num_blocks):
            if loaded in first_of:
                build.add("load", "ITEM", loaded,
                          writes=(Access("item", first_of[loaded] % 2, loaded),))  # fmt: skip
            build.add("load", "LOAD", loaded, writes=(build.slot("kv", loaded),))
            loaded += 1

    load_after(0)
    for number, item in enumerate(items):
        first, last = item[0], item[-1]
        q = tuple(Access("q", share, first) for share in range(quantizing))
        for share in range(quantizing):
            build.add(f"wg{share}", f"LOAD_Q_{'LR'[share]}", first, writes=(q[share],))
        of_warpgroup: dict[int, int] = {}  # the last block of each that has any
        for block in item:
            w, kv = block % computing, build.slot("kv", block)
            s, p, state, o = (Access(buffer, w, block) for buffer in ("S", "P", "state", "O"))
            old = of_warpgroup.get(w)
            old_state, old_o = (
                () if old is None else (Access(buffer, w, old),) for buffer in ("state", "O")
            )
            build.add(f"wg{w}", "QK", block, reads=(*q, kv), writes=(s,))
            build.add(f"wg{w}", "SM", block, reads=(s, *old_state), writes=(p, state))
            build.add(f"wg{w}", "PV", block, reads=(p, kv, *old_o), writes=(o,))
            of_warpgroup[w] = block
            load_after(block + 1)
        given = tuple(Access("given", w, last) for w in range(computing))
        for w in range(computing):
            reads = () if w not in of_warpgroup else tuple(
                Access(buffer, w, of_warpgroup[w]) for buffer in ("state", "O")
            )  # fmt: skip
            build.add(f"wg{w}", f"SUM_{'LR'[w]}", last, reads=reads, writes=(given[w],))
        for half in range(2):
            build.add(f"wg{half % computing}", f"STORE_{'LR'[half]}", last,
                      reads=(*given, Access("item", number % 2, first)))  # fmt: skip
    return build.build()
