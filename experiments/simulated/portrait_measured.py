"""Lanes of a work item from a kernel's own time stamps; `portrait_lanes` says what a span is."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.simulated.portrait_lanes import COMBINE, WAIT_KV, WAIT_P, WAIT_TURN, Span
from pallas_kernels.hopper.parts import stamps as at

HALVES = "LR"  # of the dimensions, which two warpgroups have


class Clocks:
    """The stamps of one CTA's work item in seconds from the start of its loader.

    stamps: [warpgroups, ITEMS, BLOCKS + 1, POINTS, 2] int32 of one CTA, of which the first item
    counts. The last warpgroup loads, and `start` is its first point. The clock's period follows
    from the device's timer, which item points have, too.
    """

    def __init__(self, stamps: np.ndarray, start: int) -> None:
        self.loader = stamps.shape[0] - 1
        self._values = stamps[:, 0].astype(np.int64) & 0xFFFFFFFF
        self._first = self._values[self.loader, at.BLOCKS, start, 0]
        begin, end = (self._values[0, at.BLOCKS, p] for p in (at.ITEM, at.KERNEL_END))
        clocks, nanoseconds = (end - begin) & 0xFFFFFFFF
        if not clocks or not nanoseconds:
            raise ValueError("there are no stamps of the first work item of this CTA")
        self.period = nanoseconds / clocks * 1e-9

    def block(self, warpgroup: int, block: int, point: int) -> float:
        return self._seconds(self._values[warpgroup, block, point, 0])

    def item(self, warpgroup: int, point: int) -> float:
        return self._seconds(self._values[warpgroup, at.BLOCKS, point, 0])

    def has_item(self, warpgroup: int, point: int) -> bool:
        return bool(self._values[warpgroup, at.BLOCKS, point].any())

    def _seconds(self, clock: Any) -> float:
        cycles = int(clock - self._first) & 0xFFFFFFFF
        return (cycles - (1 << 32) * (cycles >> 31)) * self.period


def measured_spans(
    stamps: np.ndarray, kernel: str, num_blocks: int, trims: bool = False
) -> list[Span]:
    """Returns the spans of a CTA's first work item, whose rows see all keys but a tile's last.

    Args:
        stamps: of the CTA, as `Clocks` takes them.
        kernel: one of `simulator.hopper.KERNELS`, or "prefill".
        num_blocks: KV blocks of the item.
        trims: as in `prefill_orders.hopper_prefill`.
    """
    blocks = min(num_blocks, at.BLOCKS)
    is_float = kernel in ("decode", "decode_transposed")
    clocks = Clocks(stamps, at.LOAD_Q if is_float else at.ITEM)
    match kernel:
        case "decode":
            spans = [*_decode_blocks(clocks, num_blocks, blocks)]
        case "decode_transposed":
            spans = [*_transposed_blocks(clocks, blocks, 1, "PV_LR")]
        case "decode_int8":
            spans = [*_int8_blocks(clocks, num_blocks, blocks)]
        case "decode_transposed_int8":
            blocks_in_turns = _transposed_blocks(clocks, blocks, clocks.loader, "PV")
            spans = [*blocks_in_turns, *_quantized(clocks)]
        case "prefill":
            spans = [*_prefill_blocks(clocks, num_blocks, blocks, trims)]
        case _:
            raise ValueError(f"kernel = {kernel!r} has no stamps")
    load = "load_k" if kernel == "prefill" else "load"
    spans += _loads(clocks, load, blocks, is_float)
    if kernel != "prefill":
        spans += _ends(clocks, kernel, num_blocks - 1)
    return sorted(spans, key=lambda span: span.start)


def _loads(clocks: Clocks, lane: str, blocks: int, is_float: bool) -> Iterable[Span]:
    loader = clocks.loader
    if not is_float:
        yield Span(lane, "ITEM", 0, 0.0, clocks.block(loader, 0, at.LOAD))
    if clocks.has_item(loader, at.LOADED_Q):
        begin = clocks.item(loader, at.LOAD_Q)
        yield Span(lane, "LOAD_Q", 0, begin, clocks.item(loader, at.LOADED_Q))
    for block in range(blocks):
        start, end = (clocks.block(loader, block, p) for p in (at.LOAD, at.LOADED_3))
        yield Span(lane, "ISSUE", block, start, end)


def _ends(clocks: Clocks, kernel: str, last: int) -> Iterable[Span]:
    """Yields the end of an item of a decode kernel: its sums, its store and its combination."""
    storing = {"decode": 2, "decode_transposed": 1, "decode_int8": 2}.get(kernel, clocks.loader)
    for warpgroup in range(storing):
        lane, half = f"wg{warpgroup}", HALVES[warpgroup] if storing == 2 else HALVES
        store, end = (clocks.item(warpgroup, point) for point in (at.STORE, at.ITEM_END))
        if kernel != "decode_int8":
            yield Span(lane, f"SUM_{half}", last, clocks.item(warpgroup, at.SUM), store)
        yield Span(lane, f"STORE_{half}", last, store, end)
        if clocks.has_item(warpgroup, at.COMBINE):
            begin, end = (clocks.item(warpgroup, point) for point in (at.COMBINE, at.COMBINE_END))
            yield Span(lane, COMBINE, last, begin, end)


def _decode_blocks(clocks: Clocks, num_blocks: int, blocks: int) -> Iterable[Span]:
    """Yields the spans of both computing warpgroups; the last of an odd number has no pair."""
    for block in range(blocks):
        pair = block - block % 2
        alone = pair + 1 >= num_blocks
        scorer = 0 if alone else block % 2
        if pair + 1 >= blocks and not alone:
            return  # The second block of this pair has no stamps.
        begin, first, scored, published = (
            clocks.block(scorer, block, p) for p in (at.WAIT, at.QK, at.SM, at.PUBLISHED)
        )
        lane = f"wg{scorer}"
        yield Span(lane, WAIT_KV, block, begin, first)
        yield Span(lane, "QK", block, first, scored)
        if scorer == 0:
            yield Span(lane, "SM", block, scored, published)
            yield Span(lane, "PV_L", block, published, clocks.block(0, block, at.END))
            yield from _others(clocks, 1, block, "wg1" if alone else "mma1")
            continue
        # Between its maxima and its exponentials, warpgroup 1 starts the product with the other P.
        wait, product = (clocks.block(1, block - 1, p) for p in (at.WAIT_P, at.PV))
        yield Span(lane, WAIT_P, block, wait, product)
        yield Span(lane, "SM", block, scored + product - wait, published)
        freed = clocks.block(1, block - 1, at.END)
        yield Span(lane, "PV_R", block, freed, clocks.block(1, block, at.END))
        yield from _others(clocks, 0, block, "wg0")


def _others(clocks: Clocks, warpgroup: int, block: int, lane: str) -> Iterable[Span]:
    """Yields the product with a P of the other warpgroup."""
    wait, product, end = (clocks.block(warpgroup, block, p) for p in (at.WAIT_P, at.PV, at.END))
    if lane != "mma1":  # that wait is a part of the second block's softmax
        yield Span(lane, WAIT_P, block, wait, product)
    yield Span(lane, f"PV_{HALVES[warpgroup]}", block, product, end)


def _transposed_blocks(clocks: Clocks, blocks: int, computing: int, values: str) -> Iterable[Span]:
    """Yields the spans of warpgroups that take turns with the blocks. values: the stage of P V."""
    for block in range(blocks):
        warpgroup = block % computing
        points = at.WAIT, at.QK, at.SM, at.PUBLISHED, at.END
        times = [clocks.block(warpgroup, block, point) for point in points]
        for i, stage in enumerate((WAIT_KV, "QK", "SM", values)):
            yield Span(f"wg{warpgroup}", stage, block, times[i], times[i + 1])


def _quantized(clocks: Clocks) -> Iterable[Span]:
    """Yields the time in which each computing warpgroup quantizes its share of q."""
    for warpgroup in range(clocks.loader):
        begin, end = (clocks.item(warpgroup, point) for point in (at.ITEM, at.Q_READY))
        yield Span(f"wg{warpgroup}", f"LOAD_Q_{HALVES[warpgroup]}", 0, begin, end)


def _int8_blocks(clocks: Clocks, num_blocks: int, blocks: int) -> Iterable[Span]:
    """Yields the spans of the softmax warpgroup, and of the two that multiply P and V."""
    scorer = 2
    begin, q_ready, summing = (clocks.item(scorer, p) for p in (at.ITEM, at.Q_READY, at.SUM))
    yield Span("wg2", "LOAD_Q", 0, begin, q_ready)
    for block in range(blocks):
        start, scored = (clocks.block(scorer, block, p) for p in (at.WAIT, at.SM))
        yield Span("wg2", "QK", block, start, scored)
        if block + 1 < blocks:
            yield Span("wg2", "SM", block, scored, clocks.block(scorer, block + 1, at.WAIT))
        elif block + 1 == num_blocks:
            yield Span("wg2", "SM", block, scored, summing)
    yield Span("wg2", "SUM", num_blocks - 1, summing, clocks.item(0, at.STORE))
    for warpgroup in range(2):
        free, lane = q_ready, f"wg{warpgroup}"
        for block in range(blocks):
            product, end = (clocks.block(warpgroup, block, p) for p in (at.PV, at.END))
            yield Span(lane, WAIT_P, block, free, product)
            yield Span(lane, f"PV_{HALVES[warpgroup]}", block, product, end)
            free = end


def _prefill_blocks(clocks: Clocks, num_blocks: int, blocks: int, trims: bool) -> Iterable[Span]:
    """Yields the spans of both computing warpgroups.

    A product of P and V ends in the softmax of the next block, whose instructions are mixed with
    the wait for it. So only the last one is a span.
    """
    for w in range(2):
        for block in range(blocks):
            arrived, turn, scored, maxima, end = (
                clocks.block(w, block, p) for p in (at.QK, at.TURN, at.SM, at.EXP, at.END)
            )
            free = clocks.block(w, block, at.WAIT)
            if block:  # Behind the first softmax, the warpgroup waits until V has been checked.
                free = clocks.block(w, block - 1, at.PUBLISHED if block == 1 else at.END)
            else:
                end = clocks.block(w, block, at.PUBLISHED)
            part = "QK_HALF" if trims and w == 0 and block == 0 else "QK"
            yield Span(f"mma{w}", WAIT_KV, block, free, arrived)
            yield Span(f"mma{w}", WAIT_TURN, block, arrived, turn)
            yield Span(f"mma{w}", f"{part}_{w}", block, turn, scored)
            yield Span(f"wg{w}", f"MAX_{w}", block, scored, maxima)
            yield Span(f"wg{w}", f"SM_{w}", block, maxima, end)
        points = at.SUM, at.STORE, at.ITEM_END
        multiplying, storing, end = (clocks.item(w, point) for point in points)
        yield Span(f"wg{w}", f"PV_{w}", num_blocks - 1, multiplying, storing)
        yield Span(f"wg{w}", f"STORE_{w}", num_blocks - 1, storing, end)
