"""Lanes of a work item: from the kernel's own time stamps, and from a simulated timeline.

A span is one stage of one KV block in one lane. Its time is from the moment at which the warpgroup
may begin (it has nothing else to do, and what it waits for has arrived) until the stage is done. So
a stage that shares the tensor cores with another warpgroup's is longer for that, in both. Waits for
KV blocks and for the other warpgroup's P are spans of their own.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from mla_jax.hal.simulator.one_core import Timeline
from pallas_kernels.hopper.parts import stamps as at

WAIT_KV, WAIT_P, COMBINE = "WAIT_KV", "WAIT_P", "COMBINE"
MOST_BLOCKS = at.BLOCKS


class Span(NamedTuple):
    """A stage of a KV block; seconds."""

    lane: str
    stage: str
    block: int
    start: float
    end: float


class Clocks:
    """The stamps of one CTA's work item in seconds from the start of its loader.

    stamps: [warpgroups, ITEMS, BLOCKS + 1, POINTS, 2] int32 of one CTA, of which the first item
    counts. The clock's period follows from the device's timer, which item points have, too.
    """

    def __init__(self, stamps: np.ndarray, loader: int) -> None:
        self._values = stamps[:, 0].astype(np.int64) & 0xFFFFFFFF
        self._first = self._values[loader, at.BLOCKS, at.LOAD_Q, 0]
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


def measured_spans(stamps: np.ndarray, kernel: str, num_blocks: int) -> list[Span]:
    """Returns the spans of a CTA's first work item, of blocks that no row's mask touches.

    stamps: of the CTA, as `Clocks` takes them. kernel: "decode" or "decode_transposed".
    """
    blocks = min(num_blocks, MOST_BLOCKS)
    ends: tuple[tuple[int, str], ...]
    if kernel == "decode":
        clocks = Clocks(stamps, loader=2)
        spans = [*_decode_blocks(clocks, num_blocks, blocks)]
        ends = (0, "L"), (1, "R")
    else:
        clocks = Clocks(stamps, loader=1)
        spans = [*_transposed_blocks(clocks, blocks)]
        ends = ((0, "LR"),)
    loader = stamps.shape[0] - 1
    spans.append(Span("load", "LOAD_Q", 0, 0.0, clocks.item(loader, at.LOADED_Q)))
    for block in range(blocks):
        start, end = (clocks.block(loader, block, p) for p in (at.LOAD, at.LOADED_3))
        spans.append(Span("load", "ISSUE", block, start, end))
    last = num_blocks - 1
    for warpgroup, half in ends:
        lane = f"wg{warpgroup}"
        begin, store, end = (
            clocks.item(warpgroup, point) for point in (at.SUM, at.STORE, at.ITEM_END)
        )
        spans.append(Span(lane, f"SUM_{half}", last, begin, store))
        spans.append(Span(lane, f"STORE_{half}", last, store, end))
        if clocks.has_item(warpgroup, at.COMBINE):
            begin, end = (clocks.item(warpgroup, point) for point in (at.COMBINE, at.COMBINE_END))
            spans.append(Span(lane, COMBINE, last, begin, end))
    return sorted(spans, key=lambda span: span.start)


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
    yield Span(lane, f"PV_{'LR'[warpgroup]}", block, product, end)


def _transposed_blocks(clocks: Clocks, blocks: int) -> Iterable[Span]:
    for block in range(blocks):
        points = at.WAIT, at.QK, at.SM, at.PUBLISHED, at.END
        times = [clocks.block(0, block, point) for point in points]
        for i, stage in enumerate((WAIT_KV, "QK", "SM", "PV_LR")):
            yield Span("wg0", stage, block, times[i], times[i + 1])


def simulated_spans(timeline: Timeline, merge: float = 0.0) -> list[Span]:
    """Returns the spans of a simulated timeline, named like the measured ones.

    merge: seconds in which split tiles are combined after the item.
    """
    schedule = timeline.schedule
    softmax_end = {
        step.block: end
        for step, end in zip(schedule.steps, timeline.end, strict=True)
        if step.stage == "SM"
    }
    # Measured warpgroups wait for q before their first block, which is no stage here.
    q_ready = max(
        end + cost.latency
        for step, end, cost in zip(schedule.steps, timeline.end, timeline.costs, strict=True)
        if step.stage == "LOAD_Q"
    )
    busy_until: dict[str, float] = {}
    spans: list[Span] = []
    for index, (_, _, waits) in enumerate(schedule.program):
        step, end = schedule.steps[index], timeline.end[index]
        free = busy_until.get(step.unit, 0.0 if step.unit == "load" else q_ready)
        arrived = [timeline.end[given] + timeline.costs[given].latency for given in waits]
        ready = min(max([free, *arrived]), timeline.start[index])
        if step.unit == "load":
            ready = timeline.start[index]
        elif ready > free and step.stage == "QK":
            spans.append(Span(step.unit, WAIT_KV, step.block, free, ready))
        elif ready > free and step.unit != "mma1" and step.stage in ("SM", "PV_L", "PV_R"):
            spans.append(Span(step.unit, WAIT_P, step.block, free, ready))
        elif step.stage.startswith("SUM"):
            ready = free
        if step.unit == "mma1":
            # The warpgroup sees that a product in flight has ended when its own softmax has.
            end = max(end, softmax_end.get(step.block + 1, end))
        spans.append(Span(step.unit, step.stage, step.block, ready, end))
        busy_until[step.unit] = end
    if merge:
        last = schedule.num_blocks - 1
        lanes = {s.lane for s in spans if s.stage.startswith("STORE")}
        spans += [Span(n, COMBINE, last, busy_until[n], busy_until[n] + merge) for n in lanes]
    return sorted(spans, key=lambda span: span.start)


class StageError(NamedTuple):
    """One stage in one lane: mean seconds per span."""

    lane: str
    stage: str
    spans: int
    measured: float
    simulated: float

    @property
    def percent(self) -> float:
        return (self.simulated / self.measured - 1) * 100


def stage_errors(measured: list[list[Span]], simulated: list[Span]) -> list[StageError]:
    """Returns each stage's mean times, over the blocks that have stamps, in all measured items."""
    totals: dict[tuple[str, str], list[list[float]]] = {}
    for which, items in ((0, measured), (1, [simulated])):
        for span in (s for item in items for s in _of_stages(item)):
            at_end = span.stage.startswith(("SUM", "STORE", COMBINE))
            if span.lane != "load" and (span.block < MOST_BLOCKS or at_end):
                key = span.lane, span.stage
                totals.setdefault(key, [[], []])[which].append(span.end - span.start)
    blocks = {s.block for item in measured for s in item if s.stage == "QK"}
    per_item = max(len(blocks), 1)
    found = []
    for (lane, stage), (seen, said) in totals.items():
        if stage == WAIT_P:  # a block that need not wait has no simulated span
            mean = sum(seen) / max(len(measured) * per_item, 1)
            found.append(StageError(lane, stage, len(seen), mean, sum(said) / per_item))
        elif seen and said:
            found.append(StageError(lane, stage, len(seen), float(np.mean(seen)),
                                    float(np.mean(said))))  # fmt: skip
    return found


def _of_stages(spans: list[Span]) -> list[Span]:
    """Returns the spans that are compared.

    The products of QK begin with the first part of a block, and wait for the others in between. So
    QK has the wait for its block here. The halves of a stage that one warpgroup runs are one stage.
    Of the warpgroups that combine partials, the last one counts.
    """
    groups: dict[tuple[str, str, int], list[Span]] = {}
    lanes_of: dict[tuple[str, int], set[str]] = {}
    for s in spans:
        if s.stage[-2:] in ("_L", "_R"):
            lanes_of.setdefault((s.stage[:-2], s.block), set()).add(s.lane)
    for s in spans:
        lane, stage = s.lane, "QK" if s.stage == WAIT_KV else s.stage
        if len(lanes_of.get((stage[:-2], s.block), ())) == 1:
            stage = f"{stage[:-2]}_LR"
        if stage == COMBINE:
            lane = "CTA"
        groups.setdefault((lane, stage, s.block), []).append(s)
    joined = []
    for (lane, stage, block), parts in groups.items():
        start, end = min(part.start for part in parts), max(part.end for part in parts)
        if stage == COMBINE:
            end = start = max(part.start for part in parts)
            end += max(part.end - part.start for part in parts)
        joined.append(Span(lane, stage, block, start, end))
    return joined
