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

    In steady state each further `period` of blocks adds the same time; once `turns` periods in a
    row have added the same, the rest is a multiplication.
    """

    def __init__(
        self, order: Callable[[int], Schedule], costs: Costs, signal: float = 0.0, turns: int = 3
    ) -> None:
        self._order, self._costs, self._signal, self._turns = order, costs, signal, turns
        self._known: dict[int, float] = {}
        self._warm: dict[int, tuple[int, float]] = {}

    def plain(self, num_blocks: int) -> float:
        """The whole event loop."""
        if num_blocks not in self._known:
            schedule = self._order(num_blocks)
            self._known[num_blocks] = run_schedule(schedule, self._costs, self._signal).total
        return self._known[num_blocks]

    def __call__(self, num_blocks: int) -> float:
        period = self._order(max(min(num_blocks, 8), 1)).period
        phase = num_blocks % period
        if phase not in self._warm:
            found = self._find(phase, period, num_blocks)
            if found is None:
                return self.plain(num_blocks)
            self._warm[phase] = found
        base, step = self._warm[phase]
        if num_blocks <= base:
            return self.plain(num_blocks)
        return self.plain(base) + (num_blocks - base) // period * step

    def _find(self, phase: int, period: int, limit: int) -> tuple[int, float] | None:
        """The first length from which `turns` periods add the same time."""
        length = phase or period
        same, last = 0, -1.0
        while length + period <= limit:
            step = self.plain(length + period) - self.plain(length)
            same = same + 1 if abs(step - last) <= 1e-9 * max(step, 1e-12) else 0
            last = step
            if same >= self._turns:
                return length + period, step
            length += period
        return None
