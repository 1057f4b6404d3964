"""One run of the fuzz, for the program and for the tests."""

import secrets
import time
from collections.abc import Sequence

from .cases import CPU, GPU
from .pool import Task, run_here, run_in_processes, tasks_of
from .report import Report
from .runner import Drawn

DEFAULT_SEED = 117
# On a GPU mostly the kernels: what the others do there, they do on a CPU as well.
ON_A_GPU = ("hopper",) * 10 + ("xla", "split_kv")


def number_or_random(text: str) -> int:
    """A seed; "random" is a fresh one."""
    return secrets.randbelow(10**9) if text == "random" else int(text)


def fuzz(
    *,
    seed: int,
    data_seeds: Sequence[int] = (),
    calls: int,
    shapes: int,
    implementations: tuple[str, ...] = (),
    sizes: str = "gpu",
    processes: int = 16,
    seconds: float = 480,
    replay: str = "",
    json: str = "",
) -> Report:
    """Runs and prints; arguments as in `__main__`."""
    drawn = Drawn(implementations or ON_A_GPU, {"gpu": GPU, "cpu": CPU}[sizes])
    report, begun = Report(), time.monotonic()
    tasks = tasks_of(seed, shapes, list(data_seeds) or [seed], calls)
    print(f"seed {seed}, data seeds {sorted({task.data_seed for task in tasks})}", flush=True)
    if replay:
        tasks, processes = [Task.parse(replay)], 0
    if processes:
        took = run_in_processes(
            drawn, tasks, processes=processes, seconds=seconds, report=report.take
        )
    else:
        for outcome in run_here(drawn, tasks, on_device=True):
            report.take(outcome)
        took = {"compiling and running": time.monotonic() - begun}
    report.print(took)
    if json:
        report.write(json, took)
    return report
