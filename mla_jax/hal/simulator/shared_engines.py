"""The time of a schedule on one core whose engines serve all steps in hand at equal rates.

The tensor cores of an SM take turns with the products of its warpgroups. So two products that run
at the same time take twice as long each, and a warpgroup whose operands are late holds up nobody.
`one_core` serves steps in the order of the list instead, which is right for a queue of copies.
"""

from mla_jax.hal.schedule import Schedule
from mla_jax.hal.simulator.one_core import BlockTimes, Costs, StageCost, Timeline

_DONE = 1e-15  # seconds of an engine's work that count as none


def run_shared(schedule: Schedule, costs: Costs, signal: float = 0.0) -> Timeline:
    """Simulates a schedule. signal: seconds from giving a signal to its arrival.

    A step starts as soon as its unit is free and its signals have arrived. It ends `hold` after
    its engines are done. Raises IllegalScheduleError for a schedule that is not legal.
    """
    of_kind = [costs(step) for step in schedule.kinds]
    starts, ends, _ = _run_shared(schedule, of_kind, signal)
    used = tuple(of_kind[kind] for kind, _, _ in schedule.program)
    return Timeline(schedule, tuple(starts), tuple(ends), used)


class SharedBlockTimes(BlockTimes):
    """`BlockTimes` with shared engines."""

    def _run(self, schedule: Schedule) -> tuple[list[float], list[float], list[float]]:
        of_kind = [self._costs(step) for step in schedule.kinds]
        return _run_shared(schedule, of_kind, self._signal)


def _run_shared(
    schedule: Schedule, of_kind: list[StageCost], signal: float
) -> tuple[list[float], list[float], list[float]]:
    """Returns when each step starts, ends, and has its result available."""
    schedule.check()
    program = schedule.program
    queues: list[list[int]] = [[] for _ in schedule.units]
    for index, (_, unit, _) in enumerate(program):
        queues[unit].append(index)
    count = len(program)
    starts, ends, available = [0.0] * count, [-1.0] * count, [0.0] * count
    position = [0] * len(queues)
    running: list[_Running | None] = [None] * len(queues)
    now, left = 0.0, count
    while left:
        now = _next_event(running, queues, position, program, ends, available, signal, now)
        for unit, step in enumerate(running):
            if step is not None and step.ended(now):
                ends[step.index] = now
                available[step.index] = now + of_kind[program[step.index][0]].latency
                running[unit] = None
                left -= 1
        for unit, queue in enumerate(queues):
            if running[unit] is None and position[unit] < len(queue):
                index = queue[position[unit]]
                kind, _, waits = program[index]
                if all(ends[w] >= 0 and available[w] + signal <= now for w in waits):
                    starts[index] = now
                    running[unit] = _Running(index, of_kind[kind], now)
                    position[unit] += 1
    return starts, ends, available


class _Running:
    """A step in hand: the work that its engines have left, then the end of its hold."""

    def __init__(self, index: int, cost: StageCost, now: float) -> None:
        self.index, self.hold = index, cost.hold
        self.work = {engine: seconds for engine, seconds in cost.busy.items() if seconds > _DONE}
        self.end = now + self.hold if not self.work else None

    def ended(self, now: float) -> bool:
        return self.end is not None and self.end <= now


def _next_event(
    running: list[_Running | None],
    queues: list[list[int]],
    position: list[int],
    program: tuple[tuple[int, int, tuple[int, ...]], ...],
    ends: list[float],
    available: list[float],
    signal: float,
    now: float,
) -> float:
    """Advances all engines to the next time at which something ends or arrives; returns it."""
    users: dict[str, int] = {}
    for step in running:
        for engine in step.work if step is not None else ():
            users[engine] = users.get(engine, 0) + 1
    times: list[float] = []
    for unit, step in enumerate(running):
        if step is None:
            if position[unit] < len(queues[unit]):
                waits = program[queues[unit][position[unit]]][2]
                if all(ends[w] >= 0 for w in waits):
                    times.append(max([now, *(available[w] + signal for w in waits)]))
        elif step.end is not None:
            times.append(step.end)
        else:
            times.extend(now + work * users[engine] for engine, work in step.work.items())
    then = min(times)
    for step in running:
        if step is None or not step.work:
            continue
        for engine in list(step.work):
            step.work[engine] -= (then - now) / users[engine]
            if step.work[engine] <= _DONE:
                del step.work[engine]
        if not step.work:
            step.end = then + step.hold
    return then
