"""Lanes of a work item, measured and simulated, and how far their stages are apart.

A span is one stage of one KV block in one lane. Its time is from the moment at which the warpgroup
may begin (it has nothing else to do, and what it waits for has arrived) until the stage is done. So
a stage that shares the tensor cores with another warpgroup's is longer for that, in both. Waits for
KV blocks, for the other warpgroup's P and for the turn are spans of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_jax.hal.simulator.one_core import Timeline
from mla_jax.hal.simulator.trace import stage_group
from pallas_kernels.hopper.parts import stamps as at

WAIT_KV, WAIT_P, WAIT_TURN, COMBINE = "WAIT_KV", "WAIT_P", "WAIT_TURN", "COMBINE"
MOST_BLOCKS = at.BLOCKS
# Stages of which an item has one, at its end.
AT_END = ("SUM", "STORE", COMBINE, "PV_0", "PV_1")
OF_LOADERS = ("load", "load_k", "load_v", "check")


class Span(NamedTuple):
    """A stage of a KV block; seconds."""

    lane: str
    stage: str
    block: int
    start: float
    end: float


def simulated_spans(timeline: Timeline, merge: float = 0.0) -> list[Span]:
    """Returns the spans of a simulated timeline, named like the measured ones.

    merge: seconds in which split tiles are combined after the item.
    """
    if "load_k" in timeline.schedule.units:
        return _simulated_prefill(timeline)
    schedule = timeline.schedule
    softmax_end = {
        step.block: end
        for step, end in zip(schedule.steps, timeline.end, strict=True)
        if step.stage == "SM"
    }
    q_ready = _q_ready(timeline)
    busy_until: dict[str, float] = {}
    spans: list[Span] = []
    for index, (_, _, waits) in enumerate(schedule.program):
        step, end = schedule.steps[index], timeline.end[index]
        free = busy_until.get(step.unit, 0.0 if step.unit == "load" else q_ready)
        ready = _ready(timeline, index, waits, free)
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


def _q_ready(timeline: Timeline) -> float:
    """Returns when q is there. Measured warpgroups wait for it before their first block."""
    steps = zip(timeline.schedule.steps, timeline.end, timeline.costs, strict=True)
    return max(end + cost.latency for step, end, cost in steps if step.stage.startswith("LOAD_Q"))


def _ready(timeline: Timeline, index: int, waits: Sequence[int], free: float) -> float:
    """Returns when a step may begin: its warpgroup is free, and what it waits for has arrived."""
    arrived = [timeline.end[given] + timeline.costs[given].latency for given in waits]
    return min(max([free, *arrived]), timeline.start[index])


def _simulated_prefill(timeline: Timeline) -> list[Span]:
    """Returns the spans of the prefill kernel, of which each warpgroup has two lanes.

    A warpgroup sees that a product has ended after its latency. Only its last product of P and V is
    one that it waits for and does nothing else.
    """
    schedule, last, q_ready = (
        timeline.schedule,
        timeline.schedule.num_blocks - 1,
        _q_ready(timeline),
    )
    busy_until: dict[str, float] = {}
    spans: list[Span] = []
    for index, (_, _, waits) in enumerate(schedule.program):
        step, start, end = schedule.steps[index], timeline.start[index], timeline.end[index]
        lane, group = step.unit, stage_group(step.stage)
        if lane not in OF_LOADERS:
            warpgroup = f"wg{step.stage[-1]}"
            free = busy_until.get(warpgroup, q_ready)
            ready = _ready(timeline, index, waits, free)
            if group in ("QK", "PV"):
                end += timeline.costs[index].latency
            if group == "QK":
                spans.append(Span(lane, WAIT_KV, step.block, min(free, ready), ready))
                spans.append(Span(lane, WAIT_TURN, step.block, ready, start))
            elif group == "PV" and step.block == last:
                lane, start = warpgroup, ready
            elif group in ("SM", "STORE"):  # The softmax has the wait for O here.
                start = ready = min(free, start)
            if group != "PV" or step.block == last:
                busy_until[warpgroup] = end
        spans.append(Span(lane, step.stage, step.block, start, end))
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
            at_end = span.stage.startswith(AT_END)
            if span.lane not in OF_LOADERS and (span.block < MOST_BLOCKS or at_end):
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
    QK has the wait for its block here, and that for the turn: a warpgroup passes the turn on when
    its products are issued, and the tensor cores are still at work. In `decode_int8` it also has
    what is between it and the softmax of its block: the signal of P and the part with rope. The
    halves of a stage that one warpgroup runs are one stage. The last of the warpgroups that combine
    partials counts.
    """
    groups: dict[tuple[str, str, int], list[Span]] = {}
    lanes_of: dict[tuple[str, int], set[str]] = {}
    scores: dict[tuple[str, int], str] = {}
    for s in spans:
        if s.stage[-2:] in ("_L", "_R"):
            lanes_of.setdefault((s.stage[:-2], s.block), set()).add(s.lane)
        if stage_group(s.stage) == "QK" and s.stage != "QK_ROPE":
            scores[s.lane, s.block] = s.stage
    for s in spans:
        lane, stage = s.lane, s.stage
        if stage in (WAIT_KV, WAIT_TURN, "QK_ROPE"):
            stage = scores[lane, s.block]
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
