"""Cases spread over processes that share a GPU: tracing and lowering is Python, seconds per case.

Every process compiles its own cases, waits until all have, and then runs their calls. If one ends
early (an illegal address takes its whole CUDA context with it), the call that ended it and those
that it had still to run are failures, and the other processes go on.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from .runner import Drawn, Outcome, Program, draw, run_call

ENVIRONMENT = {
    # Autotuning the reference would take longer than it saves in some ten calls.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    # Sixteen processes on one GPU, each of which takes what it needs.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.06",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A call: which case, and which data."""

    shape_seed: int
    shape: int
    data_seed: int
    call: int

    @property
    def name(self) -> str:
        """As `--replay` takes it."""
        return f"{self.shape_seed}.{self.shape}/{self.data_seed}.{self.call}"

    @staticmethod
    def parse(name: str) -> "Task":
        shape, data = name.split("/")
        return Task(*map(int, shape.split(".")), *map(int, data.split(".")))  # type: ignore[misc]


def tasks_of(seed: int, shapes: int, data_seeds: Sequence[int], calls: int) -> list[Task]:
    """`calls` calls for each data seed, which go round the cases."""
    return [Task(seed, call % shapes, data, call) for data in data_seeds for call in range(calls)]


def run_here(drawn: Drawn, tasks: Sequence[Task], *, on_device: bool) -> list[Outcome]:
    """All calls in this process, case by case, so that one program is alive at a time."""
    outcomes = []
    for shape in dict.fromkeys((task.shape_seed, task.shape) for task in tasks):
        program = Program(drawn.case(*shape), on_device=on_device)
        for task in tasks:
            if (task.shape_seed, task.shape) == shape:
                outcomes.append(_run(program, task))
    return outcomes


def run_in_processes(
    drawn: Drawn,
    tasks: Sequence[Task],
    *,
    processes: int,
    seconds: float,
    report: Callable[[Outcome], None],
) -> dict[str, float]:
    """All calls; `report` is given every outcome as it arrives.

    seconds: after which what still runs is ended, and fails. Returns the seconds that compiling
    and running took.
    """
    shapes = list(dict.fromkeys((task.shape_seed, task.shape) for task in tasks))
    context = multiprocessing.get_context("spawn")
    begun, crew = time.monotonic(), []
    with _environment():
        for number in range(min(processes, len(shapes))):
            mine = set(shapes[number::processes])
            part = [task for task in tasks if (task.shape_seed, task.shape) in mine]
            crew.append(_Member(context, drawn, part))
    try:
        deadline = begun + seconds
        _collect(crew, deadline, report, until_ready=True)
        compiled = time.monotonic()
        for member in crew:
            member.start()
        _collect(crew, deadline, report, until_ready=False)
        finished = time.monotonic()
    finally:
        for member in crew:
            member.end()
    for member in crew:
        for outcome in member.lost():
            report(outcome)
    return {"compiling": compiled - begun, "running": finished - compiled}


class _Member:
    """One process, as its parent sees it."""

    def __init__(self, context: Any, drawn: Drawn, tasks: list[Task]):
        self.tasks, self.drawn, self.ready, self.why = tasks, drawn, False, "was too slow"
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, drawn, tasks), daemon=True)
        self.process.start()
        theirs.close()

    def start(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("start")

    def receive(self, report: Callable[[Outcome], None]) -> None:
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            self.why = f"ended with exit code {self.process.exitcode}"
            self.pipe.close()
            return
        if message == "ready":
            self.ready = True
        elif isinstance(message, Outcome):
            self.tasks = [task for task in self.tasks if task.name != message.name]
            report(message)
            if not self.tasks:
                self.pipe.close()

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()

    def lost(self) -> Iterator[Outcome]:
        """Failures for the calls without an outcome: of the first it is not known why."""
        for number, task in enumerate(self.tasks):
            case = self.drawn.case(task.shape_seed, task.shape)
            yield Outcome(task.name, case, [f"its process {self.why}"], ran=number == 0)


def _collect(
    crew: list[_Member], deadline: float, report: Callable[[Outcome], None], *, until_ready: bool
) -> None:
    while True:
        open_ = [one for one in crew if not one.pipe.closed and not (until_ready and one.ready)]
        left = deadline - time.monotonic()
        if not open_ or left <= 0:
            return
        found = connection.wait([member.pipe for member in open_], timeout=left)
        for member in open_:
            if member.pipe in found:
                member.receive(report)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """ENVIRONMENT for the processes that are started inside; XLA's flags are added to."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    os.environ["XLA_FLAGS"] = f"{before['XLA_FLAGS'] or ''} {ENVIRONMENT['XLA_FLAGS']}".strip()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Any, drawn: Drawn, tasks: list[Task]) -> None:
    """The body of a process."""
    programs = {}
    for task in tasks:
        shape = (task.shape_seed, task.shape)
        if shape not in programs:
            programs[shape] = Program(drawn.case(*shape), on_device=True)
            # What can't be compiled or run says so in each of its calls.
            with contextlib.suppress(Exception):
                programs[shape].compile()
    pipe.send("ready")
    pipe.recv()
    for task in tasks:
        outcome = _run(programs[task.shape_seed, task.shape], task)
        pipe.send(outcome)
        if outcome.crashed:
            os._exit(1)


def _run(program: Program, task: Task) -> Outcome:
    return run_call(program, task.name, draw(program.case, task.data_seed, task.call))
