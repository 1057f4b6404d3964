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

    def unit_shares(self) -> dict[str, dict[str, float]]:
        """Returns, per unit, the shares of the total that add up to 1.

        "engines" is the time in which an engine works for the unit's steps, "held" that of barriers
        and other fixed costs, and "idle" that between steps, before the first and after the last.
        """
        shares = {unit: {"engines": 0.0, "held": 0.0, "idle": 1.0} for unit in self.schedule.units}
        for step, cost in zip(self.schedule.steps, self.costs, strict=True):
            share, held = shares[step.unit], cost.hold / self.total
            share["engines"] += cost.work / self.total - held
            share["held"] += held
            share["idle"] -= cost.work / self.total
        return shares


def run_schedule(schedule: Schedule, costs: Costs, signal: float = 0.0) -> Timeline:
    """Simulates a schedule. signal: seconds from giving a signal to its arrival.

    Raises IllegalScheduleError for a schedule that is not legal.
    """
    of_kind = [costs(step) for step in schedule.kinds]
    starts, ends, _ = _run(schedule, of_kind, signal)
    used = tuple(of_kind[kind] for kind, _, _ in schedule.program)
    return Timeline(schedule, tuple(starts), tuple(ends), used)


def _run(
    schedule: Schedule, of_kind: list[StageCost], signal: float
) -> tuple[list[float], list[float], list[float]]:
    """Returns when each step starts, ends, and has its result available.

    of_kind: the costs of `schedule.kinds`. Raises IllegalScheduleError for an illegal schedule.
    """
    schedule.check()
    shared = _shared_engines(schedule, of_kind)
    work, latency = [cost.work for cost in of_kind], [cost.latency for cost in of_kind]
    kinds = list(zip(shared, work, latency, strict=True))
    engine_free = dict.fromkeys((engine for held in shared for engine, _ in held), 0.0)
    unit_free = [0.0] * len(schedule.units)
    starts: list[float] = []
    arrival: list[float] = []  # of each step's signals
    for kind, unit, waits in schedule.program:
        begin = unit_free[unit]
        for given in waits:
            if arrival[given] > begin:
                begin = arrival[given]
        held, occupied, late = kinds[kind]
        for engine, _ in held:
            if engine_free[engine] > begin:
                begin = engine_free[engine]
        for engine, seconds in held:
            engine_free[engine] = begin + seconds
        end = unit_free[unit] = begin + occupied
        starts.append(begin)
        arrival.append(end + late + signal)
    order = [kind for kind, _, _ in schedule.program]
    ends = [begin + work[kind] for begin, kind in zip(starts, order, strict=True)]
    available = [end + latency[kind] for end, kind in zip(ends, order, strict=True)]
    return starts, ends, available


def _shared_engines(
    schedule: Schedule, of_kind: list[StageCost]
) -> list[tuple[tuple[str, float], ...]]:
    """Returns, for each kind, the engines that several units hold, each with its seconds.

    An engine that one unit alone holds is free again when the unit is, or earlier.
    """
    only: dict[str, str] = {}  # the unit that alone holds an engine
    shared: set[str] = set()
    for step, cost in zip(schedule.kinds, of_kind, strict=True):
        for engine in cost.busy:
            if only.setdefault(engine, step.unit) != step.unit:
                shared.add(engine)
    if not shared:
        return [()] * len(of_kind)
    return [tuple(held for held in cost.busy.items() if held[0] in shared) for cost in of_kind]


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
            self._known[num_blocks] = max(self._run(self._order(num_blocks))[2])
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
        last = length - margin - period
        if last < margin:
            return None
        starts, repeats = self._run(schedule)[0], schedule.repeats
        earlier, later = repeats[last][0]
        step = starts[later] - starts[earlier]
        first = last + 1
        while first > 0 and all(
            abs(starts[later] - starts[earlier] - step) <= 1e-9 * step
            for earlier, later in repeats[first - 1]
        ):
            first -= 1
        return (first + 2 * margin, period, step) if last - first >= margin else None

    def _run(self, schedule: Schedule) -> tuple[list[float], list[float], list[float]]:
        return _run(schedule, [self._costs(step) for step in schedule.kinds], self._signal)
