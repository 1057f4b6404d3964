"""The time of a schedule on one core, by a deterministic simulation of events.

A step starts when its unit has ended its previous step, its engines are free, and the signals that
it waits for have arrived. It holds each engine for that engine's share of the work. Engines serve
steps in issue order. Every time is therefore a maximum of sums of durations, and never falls when a
duration rises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla_jax.hal.schedule import Schedule, Step


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage in seconds.

    busy: how long it holds each engine.
    hold: additional time of the unit, on no engine.
    latency: from the time the unit is free again to the time the result is available.
    """

    busy: Mapping[str, float]
    hold: float = 0.0
    latency: float = 0.0

    @property
    def work(self) -> float:
        """Seconds for which the unit is occupied."""
        return max(self.busy.values(), default=0.0) + self.hold


Costs = Callable[[Step], StageCost]


@dataclass(frozen=True)
class Timeline:
    """Start and end of every step in seconds, in the order of `schedule.steps`."""

    schedule: Schedule
    start: tuple[float, ...]
    end: tuple[float, ...]
    costs: tuple[StageCost, ...]

    @property
    def total(self) -> float:
        """Seconds until the last result is available."""
        return max(e + c.latency for e, c in zip(self.end, self.costs, strict=True))

    def engine_busy(self) -> dict[str, float]:
        """Returns the seconds for which each engine is held in total."""
        busy: dict[str, float] = {}
        for cost in self.costs:
            for engine, seconds in cost.busy.items():
                busy[engine] = busy.get(engine, 0.0) + seconds
        return busy


def run_schedule(schedule: Schedule, costs: Costs, signal: float = 0.0) -> Timeline:
    """Simulates a schedule. signal: seconds from giving a signal to its arrival."""
    unit_free: dict[str, float] = {}
    engine_free: dict[str, float] = {}
    arrived: dict[tuple[str, int], float] = {}
    cost_of: dict[tuple[str, str, int], StageCost] = {}
    starts, ends, used = [], [], []
    for step in schedule.steps:
        key = (step.unit, step.stage, len(step.reads))  # the first update does not read O
        cost = cost_of.get(key)
        if cost is None:
            cost = cost_of[key] = costs(step)
        begin = unit_free.get(step.unit, 0.0)
        for given in step.waits:
            begin = max(begin, arrived[given] + signal)
        for engine in cost.busy:
            begin = max(begin, engine_free.get(engine, 0.0))
        for engine, seconds in cost.busy.items():
            engine_free[engine] = begin + seconds
        end = begin + cost.work
        unit_free[step.unit] = end
        for given in step.gives:
            arrived[given] = end + cost.latency
        starts.append(begin)
        ends.append(end)
        used.append(cost)
    return Timeline(schedule, tuple(starts), tuple(ends), tuple(used))


class BlockTimes:
    """Seconds of a core for n KV blocks, for any n; exact, but simulated only until it repeats.

    Let every step in a range of blocks start the same time after the same step one period earlier.
    Then so do all later steps, because each time is a maximum of sums of earlier times. The rest is
    a multiplication. The range is a period and `_REACH` blocks, which is further than any order
    looks ahead.
    """

    _REACH = 8
    _LENGTHS = (32, 64, 128, 256)

    def __init__(self, order: Callable[[int], Schedule], costs: Costs, signal: float = 0.0) -> None:
        self._order, self._costs, self._signal = order, costs, signal
        self._known: dict[int, float] = {}
        self._steady: tuple[int, int, float] | None = None
        self._tried = 0

    def plain(self, num_blocks: int) -> float:
        """Returns the seconds of num_blocks blocks by simulating all of them."""
        if num_blocks not in self._known:
            line = run_schedule(self._order(num_blocks), self._costs, self._signal)
            self._known[num_blocks] = line.total
        return self._known[num_blocks]

    def __call__(self, num_blocks: int) -> float:
        for length in self._LENGTHS:
            if self._steady or length <= self._tried or length >= num_blocks:
                continue
            self._tried = length
            self._steady = self._find_steady(length)
        if not self._steady:
            return self.plain(num_blocks)
        start, period, step = self._steady
        if num_blocks <= start + period:
            return self.plain(num_blocks)
        repeats = (num_blocks - start) // period
        return self.plain(num_blocks - repeats * period) + repeats * step

    def _find_steady(self, length: int) -> tuple[int, int, float] | None:
        """Returns (blocks before it repeats, period, seconds per period), or None if unknown."""
        schedule = self._order(length)
        period, margin = schedule.period, schedule.period + self._REACH
        line = run_schedule(schedule, self._costs, self._signal)
        starts = {(s.stage, s.block): t for s, t in zip(schedule.steps, line.start, strict=True)}
        shifts: dict[int, list[float]] = {}
        for (stage, block), start in starts.items():
            if (stage, block + period) in starts:
                shifts.setdefault(block, []).append(starts[stage, block + period] - start)
        last = length - margin - period
        if last < margin:
            return None
        step = shifts[last][0]
        first = last + 1
        while first > 0 and all(abs(x - step) <= 1e-9 * step for x in shifts[first - 1]):
            first -= 1
        return (first + 2 * margin, period, step) if last - first >= margin else None
