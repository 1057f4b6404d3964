"""An issue order as data, and the proof that it is legal.

A `Schedule` is one ordered list of `Step`s. A unit is an instruction stream: the cube core, a
vector core, a warpgroup, its queue of matrix instructions, or the copy engine. Steps of one unit
run in list order, one after the other. Steps of different units are ordered only by signals.

A step has a KV block that it works on. It lists the buffer slots that it reads and writes, with the
block whose data it expects or leaves there. It also lists the signals that it waits for and gives.
A slot is one of the equal parts of a buffer that hold successive blocks.

The simulator computes the time of a schedule, the blockwise kernel executes it, and the Gantt chart
draws it.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Access(NamedTuple):
    """Slot number `slot` of `buffer` while it holds the data of KV block `block`."""

    buffer: str
    slot: int
    block: int


class Signal(NamedTuple):
    """A signal that the step (stage, block) gives once."""

    stage: str
    block: int


@dataclass(frozen=True)
class Step:
    """One stage that a unit runs for KV block `block`, or -1 for a step before the first block."""

    unit: str
    stage: str
    block: int
    reads: tuple[Access, ...] = ()
    writes: tuple[Access, ...] = ()
    waits: tuple[Signal, ...] = ()
    gives: tuple[Signal, ...] = ()

    def __str__(self) -> str:
        return f"{self.stage}({self.block}) on {self.unit}"


class IllegalScheduleError(ValueError):
    """Raised for a schedule that breaks a rule; names the step and the rule."""


@dataclass(frozen=True)
class Schedule:
    """Steps in issue order for `num_blocks` KV blocks; the pattern repeats every `period` blocks.

    `buffers` gives the number of slots of each buffer. `name` is the name of the order.
    """

    name: str
    num_blocks: int
    period: int
    steps: tuple[Step, ...]
    buffers: dict[str, int] = field(default_factory=dict)

    @cached_property
    def units(self) -> tuple[str, ...]:
        """The names of the units, in order of their first step."""
        return tuple(dict.fromkeys(step.unit for step in self.steps))

    @cached_property
    def kinds(self) -> tuple[Step, ...]:
        """The first step of each kind; steps of a kind have one cost.

        A kind is a unit, a stage and a number of reads: the first update of O does not read O.
        """
        kinds: dict[tuple[str, str, int], Step] = {}
        for step in self.steps:
            kinds.setdefault(_kind(step), step)
        return tuple(kinds.values())

    @cached_property
    def program(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """The steps in numbers: the kind, the unit, and the steps whose signals it waits for."""
        kinds = {_kind(step): i for i, step in enumerate(self.kinds)}
        units = {unit: i for i, unit in enumerate(self.units)}
        giver: dict[Signal, int] = {}
        program = []
        for index, step in enumerate(self.steps):
            waits = tuple(giver[signal] for signal in step.waits)
            program.append((kinds[_kind(step)], units[step.unit], waits))
            giver.update(dict.fromkeys(step.gives, index))
        return tuple(program)

    @cached_property
    def repeats(self) -> dict[int, list[tuple[int, int]]]:
        """For each block, the indices of its steps, each with that of its stage a period later."""
        places = {(step.stage, step.block): i for i, step in enumerate(self.steps)}
        repeats: dict[int, list[tuple[int, int]]] = {}
        for (stage, block), index in places.items():
            if (later := places.get((stage, block + self.period))) is not None:
                repeats.setdefault(block, []).append((index, later))
        return repeats

    @cached_property
    def _stages(self) -> dict[str, set[int]]:
        stages: dict[str, set[int]] = {}
        for step in self.steps:
            stages.setdefault(step.stage, set()).add(step.block)
        return stages

    def blocks_of(self, stage: str) -> set[int]:
        """Returns the blocks that have a step of this stage; empty if there is no such stage."""
        return self._stages.get(stage, set())

    @cached_property
    def _touched(self) -> dict[str, tuple[set[str], set[str]]]:
        touched: dict[str, tuple[set[str], set[str]]] = {}
        for step in self.steps:
            reads = {a.buffer for a in step.reads if a.block in (step.block, -1)}
            writes = {a.buffer for a in step.writes if a.block in (step.block, -1)}
            if step.stage in touched:
                touched[step.stage][0].intersection_update(reads)
                touched[step.stage][1].intersection_update(writes)
            else:
                touched[step.stage] = reads, writes
        return touched

    def touched_by(self, stage: str) -> tuple[set[str], set[str]]:
        """Returns the buffers that every step of a stage reads, and those that it writes.

        Only the data of the step's own block counts, and data before the first block.
        """
        return self._touched.get(stage, (set(), set()))

    @property
    def num_signals(self) -> int:
        """The number of waits in the schedule, a measure of its synchronization."""
        return sum(len(step.waits) for step in self.steps)

    def check(self) -> None:
        """Proves the schedule legal or raises IllegalScheduleError naming the first bad step.

        Vector clocks record what certainly happened before what. Each step must be of a block that
        exists, and wait only for signals that are given. Each slot must exist. Each read must find
        the expected data, written before it. Each write must come after everything that still needs
        the slot. The proof is made once per schedule.
        """
        self._legal  # noqa: B018  the property raises the error

    @cached_property
    def _legal(self) -> bool:
        try:
            _check(self)
        except IllegalScheduleError as error:
            raise IllegalScheduleError(f"{self.name}: {error}") from None
        return True


def _kind(step: Step) -> tuple[str, str, int]:
    return step.unit, step.stage, len(step.reads)


def _require_progress(steps: tuple[Step, ...]) -> None:
    """Raises IllegalScheduleError unless the units can run and the list is an order they run in.

    The units run in order, each step as soon as its signals are given.
    """
    given = {signal for step in steps for signal in step.gives}
    streams: dict[str, list[tuple[int, Step]]] = {}
    for index, step in enumerate(steps):
        streams.setdefault(step.unit, []).append((index, step))
    position = dict.fromkeys(streams, 0)
    seen: set[Signal] = set()
    ran = True
    while ran:
        ran = False
        for unit, stream in streams.items():
            while position[unit] < len(stream):
                step = stream[position[unit]][1]
                if not seen.issuperset(step.waits):
                    break
                seen.update(step.gives)
                position[unit] += 1
                ran = True
    stuck = [stream[position[u]] for u, stream in streams.items() if position[u] < len(stream)]
    if stuck:
        index, step = min(stuck, key=lambda place: place[0])
        missing = next(signal for signal in step.waits if signal not in seen)
        why = "comes too late" if missing in given else "is never given"
        raise IllegalScheduleError(
            f"step {index}, {step}: deadlock, it waits for "
            f"{missing.stage}({missing.block}), which {why}"
        )


def _check(schedule: Schedule) -> None:
    """Raises IllegalScheduleError for a step that may run before what it needs."""
    if not schedule.steps or schedule.num_blocks < 1 or schedule.period < 1:
        raise IllegalScheduleError(
            f"{len(schedule.steps)} steps, num_blocks = {schedule.num_blocks}, period = "
            f"{schedule.period}, wanted at least 1 of each"
        )
    givers: dict[Signal, int] = {}
    for index, step in enumerate(schedule.steps):
        if not -1 <= step.block < schedule.num_blocks:
            raise IllegalScheduleError(
                f"step {index}, {step}: no such block, wanted 0 to {schedule.num_blocks - 1}, or "
                "-1 for a step before the first"
            )
        for signal in step.gives:
            first = givers.setdefault(signal, index)
            if first != index:
                raise IllegalScheduleError(
                    f"step {index}, {step}: gives {signal.stage}({signal.block}), as step {first}, "
                    f"{schedule.steps[first]} does; wanted one step of a stage per block"
                )
    clocks = _Clocks()
    last_write: dict[tuple[str, int], tuple[int, int]] = {}
    readers: dict[tuple[str, int], list[int]] = {}
    for index, step in enumerate(schedule.steps):
        try:
            clocks.run(index, step)
        except KeyError as late:
            _require_progress(schedule.steps)
            stage, block = late.args[0]
            raise IllegalScheduleError(
                f"step {index}, {step}: waits for {stage}({block}), which a later step of the "
                "list gives"
            ) from None
        for access in step.reads:
            slot = _require_slot(schedule, index, access)
            if slot not in last_write:
                raise IllegalScheduleError(
                    f"step {index}, {step}: reads {_name(access)} before anything is written there"
                )
            writer, block = last_write[slot]
            if block != access.block:
                raise IllegalScheduleError(
                    f"step {index}, {step}: expects block {access.block} in {_name(access)}, "
                    f"finds block {block} of step {writer}, {schedule.steps[writer]}"
                )
            if not clocks.before(writer, index):
                raise IllegalScheduleError(
                    f"step {index}, {step}: reads {_name(access)} without waiting for its "
                    f"write, step {writer}, {schedule.steps[writer]}"
                )
            readers.setdefault(slot, []).append(index)
        for access in step.writes:
            slot = _require_slot(schedule, index, access)
            pending = readers.get(slot, [])
            if slot in last_write:
                pending = [*pending, last_write[slot][0]]
            for earlier in pending:
                if earlier != index and not clocks.before(earlier, index):
                    raise IllegalScheduleError(
                        f"step {index}, {step}: overwrites {_name(access)} while step {earlier}, "
                        f"{schedule.steps[earlier]} may still need it"
                    )
            last_write[slot] = (index, access.block)
            readers[slot] = []


def _require_slot(schedule: Schedule, index: int, access: Access) -> tuple[str, int]:
    """Returns (buffer, slot) of an access; raises IllegalScheduleError if there is no such slot."""
    slots = schedule.buffers.get(access.buffer, 0)
    if not 0 <= access.slot < slots:
        raise IllegalScheduleError(
            f"step {index}, {schedule.steps[index]}: {_name(access)} does not exist, "
            f"{access.buffer} has {slots} slots"
        )
    return access.buffer, access.slot


def _name(access: Access) -> str:
    return f"{access.buffer}[{access.slot}]"


class _Clocks:
    """Vector clocks: for each step, how many steps of each unit certainly ended before it ends."""

    def __init__(self) -> None:
        self._unit: dict[str, dict[str, int]] = {}
        self._signal: dict[Signal, dict[str, int]] = {}
        self._end: dict[int, dict[str, int]] = {}
        self._place: dict[int, tuple[str, int]] = {}

    def run(self, index: int, step: Step) -> None:
        """Updates the clocks with a step, whose waits must have been given."""
        clock = dict(self._unit.get(step.unit, {}))
        for signal in step.waits:
            for unit, count in self._signal[signal].items():
                clock[unit] = max(clock.get(unit, 0), count)
        clock[step.unit] = clock.get(step.unit, 0) + 1
        self._unit[step.unit] = clock
        self._end[index] = clock
        self._place[index] = (step.unit, clock[step.unit])
        for signal in step.gives:
            self._signal[signal] = clock

    def before(self, first: int, second: int) -> bool:
        """Returns whether step `first` certainly ends before step `second` starts."""
        unit, count = self._place[first]
        return first != second and self._end[second].get(unit, 0) >= count

    def known(self, unit: str, waits: list[Signal], first: int) -> bool:
        """Returns whether a step added now to `unit` with these waits would start after `first`."""
        other, count = self._place[first]
        clocks = [self._unit.get(unit, {}), *(self._signal[signal] for signal in waits)]
        return any(clock.get(other, 0) >= count for clock in clocks)


class ScheduleBuilder:
    """Collects steps in issue order and adds the fewest signals that make them legal."""

    def __init__(self, name: str, num_blocks: int, period: int, buffers: dict[str, int]) -> None:
        self._name, self._num_blocks, self._period = name, num_blocks, period
        self._buffers = buffers
        self._steps: list[Step] = []
        self._clocks = _Clocks()
        self._writer: dict[tuple[str, int], int] = {}
        self._readers: dict[tuple[str, int], list[int]] = {}

    def slots_of(self, buffer: str) -> int:
        """Returns the number of slots of a buffer."""
        return self._buffers[buffer]

    def slot(self, buffer: str, block: int) -> Access:
        """Returns the slot of `buffer` for block `block`; blocks use the slots in turn.

        Raises IllegalScheduleError for a buffer that the schedule does not have.
        """
        if self._buffers.get(buffer, 0) < 1:
            raise IllegalScheduleError(
                f"{self._name}: no buffer {buffer!r}, wanted one of {', '.join(self._buffers)}"
            )
        return Access(buffer, block % self._buffers[buffer], block)

    def add(
        self,
        unit: str,
        stage: str,
        block: int,
        reads: tuple[Access, ...] = (),
        writes: tuple[Access, ...] = (),
    ) -> None:
        """Appends a step; its waits follow from what it reads and overwrites.

        Raises IllegalScheduleError for a slot that is read before anything is written there.
        """
        for access in reads:
            if access[:2] not in self._writer:
                raise IllegalScheduleError(
                    f"{self._name}: step {len(self._steps)}, {stage}({block}) on {unit}: reads "
                    f"{_name(access)} before anything is written there"
                )
        needed = [self._writer[a[:2]] for a in reads]
        for access in writes:
            slot = access[:2]
            needed += self._readers.get(slot, [])
            needed += [self._writer[slot]] if slot in self._writer else []
        waits: list[Signal] = []
        for index in sorted(set(needed), reverse=True):
            if not self._clocks.known(unit, waits, index):
                waits.append(Signal(self._steps[index].stage, self._steps[index].block))
        index = len(self._steps)
        step = Step(
            unit, stage, block, reads, writes, tuple(reversed(waits)), (Signal(stage, block),)
        )
        self._clocks.run(index, step)
        self._steps.append(step)
        for access in reads:
            self._readers.setdefault(access[:2], []).append(index)
        for access in writes:
            self._writer[access[:2]] = index
            self._readers[access[:2]] = []

    def build(self) -> Schedule:
        """Returns the schedule without the signals that no step waits for."""
        wanted = {signal for step in self._steps for signal in step.waits}
        steps = tuple(
            Step(s.unit, s.stage, s.block, s.reads, s.writes, s.waits,
                 tuple(g for g in s.gives if g in wanted))
            for s in self._steps
        )  # fmt: skip
        return Schedule(self._name, self._num_blocks, self._period, steps, dict(self._buffers))
