"""Issue orders of causal prefill kernels on a GPU, in the expanded form, as schedules.

Two warpgroups compute 64 query rows of a tile each. The stages end in _0 or _1 for one of them:

    QK MAX SM PV STORE    scores, row maxima, softmax, O += P V, and the end of a tile

A warpgroup issues its products and goes on, so they are on a unit of their own ("mma0", "mma1").
"""

from functools import lru_cache

from mla_jax.hal.schedule import Access, Schedule, ScheduleBuilder

COMPUTING = "01"  # the warpgroups that compute


@lru_cache(maxsize=256)
def two_consumers(num_blocks: int) -> Schedule:
    """Returns the order of FlashAttention-3: a producer, and two consumers that take turns.

    Each consumer issues QK of its next block before PV of this one, so that its softmax runs while
    the tensor cores work for the other or for PV.
    """
    build = ScheduleBuilder("prefill", num_blocks, 2,
                            {"q": 1, "k": 2, "v": 2, "S0": 2, "S1": 2, "P0": 2, "P1": 2, "O0": 1,
                             "O1": 1})  # fmt: skip
    q = Access("q", 0, -1)
    build.add("load", "LOAD_Q", -1, writes=(q,))
    for block in range(num_blocks + 1):
        if block < num_blocks:
            build.add("load", "LOAD_K", block, writes=(build.slot("k", block),))
            build.add("load", "LOAD_V", block, writes=(build.slot("v", block),))
        for w in COMPUTING:
            if block < num_blocks:
                build.add(f"mma{w}", f"QK_{w}", block, reads=(q, build.slot("k", block)),
                          writes=(build.slot(f"S{w}", block),))  # fmt: skip
                build.add(f"wg{w}", f"SM_{w}", block, reads=(build.slot(f"S{w}", block),),
                          writes=(build.slot(f"P{w}", block),))  # fmt: skip
            if block:
                _values(build, w, block - 1, first=0)
    for w in COMPUTING:
        build.add(
            f"wg{w}", f"STORE_{w}", num_blocks - 1, reads=(Access(f"O{w}", 0, num_blocks - 1),)
        )
    return build.build()


def _values(build: ScheduleBuilder, w: str, block: int, first: int, *more: Access) -> None:
    """Adds the product of P and V of a block. first: the first block of its tile."""
    before = (Access(f"O{w}", 0, block - 1),) if block > first else ()
    reads = (build.slot(f"P{w}", block), build.slot("v", block), *more, *before)
    build.add(f"mma{w}", f"PV_{w}", block, reads=reads, writes=(Access(f"O{w}", 0, block),))


@lru_cache(maxsize=256)
def hopper_prefill(
    num_blocks: int,
    *,
    before: int = 0,
    stages: int = 2,
    trims: bool = False,
    name: str = "hopper-prefill",
) -> Schedule:
    """Returns the order of our prefill kernel, as docs/hopper_prefill.md says.

    In each step a warpgroup issues the scores of a block and PV of the block before, in turns with
    the other one. P is in registers, so it is written when PV has read the one before. A tile's
    first block, which has the mask, is also checked for values that are not finite (CHECK). Each
    loader warp (K and q, V) runs ahead into the next tile.

    before: blocks of an earlier tile, as in `hopper_orders`.
    stages: KV blocks of K, and of V, in shared memory.
    trims: whether warpgroup 0 sees only half of a tile's first block, and scores no more (QK_HALF).
    """
    if not 0 <= before < num_blocks:
        raise ValueError(f"before = {before}, wanted 0 to {num_blocks - 1} of {num_blocks} blocks")
    slots = {"item": 2, "q0": 1, "q1": 1, "k": stages, "v": stages, "checked": stages}
    slots |= {f"{buffer}{w}": 1 for buffer in "SPMO" for w in COMPUTING}
    build = ScheduleBuilder(name, num_blocks, stages, slots)
    items = [r for r in (range(before), range(before, num_blocks)) if r]
    loads = _Loads(build, [item[0] for item in items], num_blocks)
    for item in items:
        first, last = item[0], item[-1]
        for block in item:
            loads.add_k(scored=block)
            loads.add_v(multiplied=max(block - 1, first))
            for w in COMPUTING:
                checked = (build.slot("checked", first),) if block == first + 1 else ()
                part = "QK_HALF" if trims and w == "0" and block == first else "QK"
                build.add(f"mma{w}", f"{part}_{w}", block,
                          reads=(Access(f"q{w}", 0, first), build.slot("k", block), *checked),
                          writes=(Access(f"S{w}", 0, block),))  # fmt: skip
                if block > first:
                    _values(build, w, block - 1, first)
            for w in COMPUTING:
                old = (Access(f"M{w}", 0, block - 1),) if block > first else ()
                scores, maxima = Access(f"S{w}", 0, block), Access(f"M{w}", 0, block)
                build.add(f"wg{w}", f"MAX_{w}", block, reads=(scores, *old), writes=(maxima,))
                build.add(f"wg{w}", f"SM_{w}", block, reads=(scores, maxima),
                          writes=(Access(f"P{w}", 0, block),))  # fmt: skip
        loads.add_k(scored=last + 1)
        loads.add_v(multiplied=last)
        for w in COMPUTING:
            checked = (build.slot("checked", first),) if first == last else ()
            _values(build, w, last, first, *checked)
            # A warpgroup scores the next tile only after it has stored this one.
            build.add(f"wg{w}", f"STORE_{w}", last,
                      reads=(Access(f"O{w}", 0, last), Access(f"S{w}", 0, last)))  # fmt: skip
        loads.add_v(multiplied=last + 1)
    return build.build()


class _Loads:
    """Appends the loads of two warps in their orders, as far as stages are free.

    starts: the first blocks of tiles.
    """

    def __init__(self, build: ScheduleBuilder, starts: list[int], num_blocks: int) -> None:
        self._build, self._stages, self._num_blocks = build, build.slots_of("k"), num_blocks
        self._number_of = {block: number for number, block in enumerate(starts)}
        self._k = self._v = 0  # blocks whose K, or V, is loaded
        self._without_q: int | None = None  # the first block of a tile whose q is not loaded

    def add_k(self, scored: int) -> None:
        """Loads K and q, when the scores of so many blocks are listed."""
        while True:
            if self._without_q is not None:
                if scored < self._without_q:  # The tile before needs its q still.
                    return
                for w in COMPUTING:
                    self._build.add("load_k", f"LOAD_Q_{w}", self._without_q,
                                    writes=(Access(f"q{w}", 0, self._without_q),))  # fmt: skip
                self._without_q = None
            block = self._k
            if block >= min(scored + self._stages, self._num_blocks):
                return
            if block in self._number_of:
                self._build.add("load_k", "ITEM", block, writes=(self._item(block),))
                self._without_q = block
            slot = self._build.slot("k", block)
            self._build.add("load_k", "LOAD_K", block, writes=(slot,))
            self._k += 1

    def add_v(self, multiplied: int) -> None:
        """Loads V, and has it checked, when so many blocks are multiplied with P."""
        while self._v < min(multiplied + self._stages, self._k):
            block, v = self._v, self._build.slot("v", self._v)
            is_first = block in self._number_of
            described = (self._item(block),) if is_first else ()
            self._build.add("load_v", "LOAD_V", block, reads=described, writes=(v,))
            if is_first:
                self._build.add("check", "CHECK", block, reads=(v,),
                                writes=(self._build.slot("checked", block),))  # fmt: skip
            self._v += 1

    def _item(self, block: int) -> Access:
        return Access("item", self._number_of[block] % 2, block)
