"""How long a schedule takes on one core: discrete events, deterministic.

A step starts when its unit has ended its previous step, when the engines it uses are free and when
the signals it waits for have arrived; it holds each engine for that engine's share of the work.
Engines serve steps in issue order, so every time is a maximum of sums of durations: it never falls
when a duration rises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla_jax.hal.schedule import Schedule, Step


@dataclass(frozen=True)
class StageCost:
    """Seconds a stage holds each engine; `hold`: what the unit spends on top, on no engine;
    `latency`: from the unit's being free again to the result's being there."""

    busy: Mapping[str, float]
    hold: float = 0.0
    latency: float = 0.0

    @property
    def work(self) -> float:
        """Seconds the unit is taken."""
        return max(self.busy.values(), default=0.0) + self.hold


Costs = Callable[[Step], StageCost]


@dataclass(frozen=True)
class Timeline:
    """Start and end of every step (seconds), the order of `schedule.steps`."""

    schedule: Schedule
    start: tuple[float, ...]
    end: tuple[float, ...]
    costs: tuple[StageCost, ...]

    @property
    def total(self) -> float:
        return max(e + c.latency for e, c in zip(self.end, self.costs, strict=True))

    def engine_busy(self) -> dict[str, float]:
        """Seconds each engine is held in all."""
        busy: dict[str, float] = {}
        for cost in self.costs:
            for engine, seconds in cost.busy.items():
                busy[engine] = busy.get(engine, 0.0) + seconds
        return busy


def run_schedule(schedule: Schedule, costs: Costs, signal: float = 0.0) -> Timeline:
    """The plain event loop. `signal`: seconds from a signal's being given to its being seen."""
    unit_free: dict[str, float] = {}
    engine_free: dict[str, float] = {}
    arrived: dict[tuple[str, int], float] = {}
    cost_of: dict[tuple[str, str, int], StageCost] = {}
    starts, ends, used = [], [], []
    for step in schedule.steps:
        key = (step.unit, step.stage, len(step.reads))  # a first update reads no O
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
    """Seconds of a core for n KV blocks, for any n: exact, but simulated only until it repeats.

    Where every step of a stretch of blocks starts the same time after its like one period before,
    all that follows does too (each time is a maximum of sums of the times before it), so the rest
    is a multiplication. The stretch is a period and `_REACH` blocks, further than any order looks
    ahead.
    """

    _REACH = 8
    _LENGTHS = (32, 64, 128, 256)

    def __init__(self, order: Callable[[int], Schedule], costs: Costs, signal: float = 0.0) -> None:
        self._order, self._costs, self._signal = order, costs, signal
        self._known: dict[int, float] = {}
        self._steady: tuple[int, int, float] | None = None
        self._tried = 0

    def plain(self, num_blocks: int) -> float:
        """The whole event loop."""
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
        turns = (num_blocks - start) // period
        return self.plain(num_blocks - turns * period) + turns * step

    def _find_steady(self, length: int) -> tuple[int, int, float] | None:
        """(length from which it repeats, period, seconds a period), if `length` blocks show it."""
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
