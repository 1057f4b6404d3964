"""Runs rows of decode benchmarks: compiles, checks and times them, and can resume.

XLA compiles in threads. What is lowered before is Python, so many programs need processes, too.
Those of several pools are then compiled before the first one is timed, so that no process waits.

Every row is written to `rows.jsonl` (see journal.py) as soon as it is known. If that file exists,
its measured and failed rows are not run again, but skipped ones are. Pools of many rows run first,
so that a run that ends early leaves few rows. The contenders of a shape alternate, and so do its
page sizes, because the speed of a card changes from minute to minute.
"""

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.console import say, track
from experiments.framework.experiment import Row
from experiments.framework.journal import Journal, Key
from experiments.speed import baselines, timing
from experiments.speed.decode.bursts import time_bursts
from experiments.speed.decode.checks import errors_of
from experiments.speed.decode.contenders import Contender
from experiments.speed.decode.inputs import Inputs
from experiments.speed.decode.plain_jax import compile_jnp, lacks_contiguous_memory
from experiments.speed.decode.pools import Pool, lacks_memory
from experiments.speed.decode.programs import Lowered, Programs, Work
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.shapes import Shape
from mla_jax.reference.attention import attention_float64

WORKS_AT_A_TIME = 8  # groups of rows whose programs are compiled before they are timed
TASKS_PER_PROCESS = 4  # at least, of the pools that are compiled together

Task = tuple[Shape, Contender]
Entry = tuple[dict[str, timing.Burst], Row]  # bursts by time column, and the columns known before


class DeviceLostError(Exception):
    """Raised when the device no longer responds."""


@dataclasses.dataclass
class Runner:
    """Times tasks, one pool after the other."""

    setup: Setup
    journal: Journal
    seconds: float  # time after which no work starts; 0 is no limit
    processes: int = 0  # that lower programs; 0: this one does

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds if self.seconds else float("inf")
        self._lowering: ProcessPoolExecutor | None = None

    def run(self, tasks: Sequence[Task], peer_names: Sequence[str] = ()) -> int:
        """Runs the tasks without a row; returns how many were left for lack of time."""
        shared: dict[tuple, list[Shape]] = {}
        for row in dict.fromkeys(row for row, _ in tasks):
            if lacks_memory(row, self.setup) is None:
                shared.setdefault((row.batch, row.dtype), []).append(row)
        pools = {key: Pool.of(rows, self.setup) for key, rows in shared.items()}
        left = [task for task in tasks if not self._done(task[0], task[1].name)]
        todo = [task for task in left if not self._skips(task, pools)]
        say(f"{len(tasks)} tasks: {len(tasks) - len(left)} done before, {len(todo)} to run")
        if self.processes:
            self._lowering = ProcessPoolExecutor(
                self.processes, multiprocessing.get_context("spawn"), _share_the_gpu
            )
        works = []
        for key, pool in sorted(pools.items(), key=lambda item: -len(shared[item[0]])):
            if mine := [t for t in todo if (t[0].batch, t[0].dtype) == key]:
                works.append((pool, mine))
        try:
            for window in self._windows(works):
                if self._late():
                    break
                ahead = self._compile_ahead(window) if self.processes else [None] * len(window)
                for (pool, mine), programs in zip(window, ahead, strict=True):
                    if not self._late():
                        self._run_pool(pool, mine, peer_names, programs)
        except DeviceLostError as error:
            say(f"stopped: {error}", style="red")
        finally:
            if self._lowering is not None:
                self._lowering.shutdown(wait=False, cancel_futures=True)
        return sum((row, who.name) not in self.journal.rows for row, who in todo)

    def _windows(
        self, works: Iterable[tuple[Pool, list[Task]]]
    ) -> Iterator[list[tuple[Pool, list[Task]]]]:
        """Yields pools whose programs are compiled together, with work for all processes.

        Without processes it is one pool. If all pools were one window, a run that ends early would
        have compiled programs and timed none.
        """
        window: list[tuple[Pool, list[Task]]] = []
        for work in works:
            window.append(work)
            if sum(len(tasks) for _, tasks in window) >= TASKS_PER_PROCESS * self.processes:
                yield window
                window = []
        if window:
            yield window

    def _late(self) -> bool:
        return time.monotonic() > self._end

    def _done(self, row: Shape, name: str) -> bool:
        return (row, name) in self.journal.rows

    def _skips(self, task: Task, pools: Mapping[tuple, Pool]) -> bool:
        """Returns whether a task can't be run, and records the reason."""
        row, who = task
        reason = lacks_memory(row, self.setup)
        if reason is None and who.implementation is None:
            reason = lacks_contiguous_memory(row, self.setup)
        if reason is None:
            reason = Work(row, pools[row.batch, row.dtype], self.setup).refuses(who)
        if reason is None and who.most_tokens and sum(row.seq_lens) > who.most_tokens:
            reason = f"timed up to {who.most_tokens} KV tokens, because it is not made to be fast"
        if reason is not None:
            self.journal.add(row, who.name, "skipped", reason=reason)
        return reason is not None

    def _run_pool(
        self,
        pool: Pool,
        tasks: list[Task],
        baseline_names: Sequence[str],
        ahead: "dict[Any, Future] | None",
    ) -> None:
        """Runs the tasks of a pool. ahead: their programs; None: they are compiled here."""
        layers: list[Any] = []
        for chunk in self._chunks(pool, tasks):
            if self._late():
                return
            programs = self._compile(pool, chunk) if ahead is None else ahead
            layers = layers or pool.fill(self.setup)
            matches: dict[Shape, list[Task]] = {}
            for task in (task for group in chunk for task in group):
                matches.setdefault(task[0].without_pages, []).append(task)
            label = f"batch {chunk[0][0][0].batch}, {pool.dtype}"
            for match in track(matches.values(), label):
                if self._late():
                    return
                self._run_match(match, pool, layers, programs, baseline_names)

    def _chunks(self, pool: Pool, tasks: Iterable[Task]) -> Iterator[list[list[Task]]]:
        """Yields groups of tasks that share programs, about WORKS_AT_A_TIME at once.

        Tasks that differ only in page size stay together.
        """
        families: dict[tuple, dict[tuple, list[Task]]] = {}
        for row, who in tasks:
            key = heads, s_q, _, capacity = Work(row, pool, self.setup).key
            family = families.setdefault((heads, s_q, capacity), {})
            family.setdefault(key, []).append((row, who))
        chunk: list[list[Task]] = []
        for family in families.values():
            chunk += family.values()
            if len(chunk) >= WORKS_AT_A_TIME:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _compile(self, pool: Pool, chunk: Sequence[Sequence[Task]]) -> dict[Any, Future]:
        """Compiles in threads; returns programs by the keys of `_jobs`."""
        return _in_threads(self._jobs(pool, chunk))

    def _compile_ahead(self, works: Sequence[tuple[Pool, list[Task]]]) -> list[dict[Any, Future]]:
        """Compiles the programs of some pools, and returns those of each."""
        of_pools = [
            self._jobs(pool, [group for chunk in self._chunks(pool, tasks) for group in chunk])
            for pool, tasks in works
        ]
        jobs = {(i, key): job for i, own in enumerate(of_pools) for key, job in own.items()}
        futures = _in_threads(jobs)
        return [{key: futures[i, key] for key in own} for i, own in enumerate(of_pools)]

    def _jobs(self, pool: Pool, chunk: Sequence[Sequence[Task]]) -> dict[Any, Callable[[], Any]]:
        """Returns what compiles, by contender and `Work.key`, or row for `jnp`."""
        jobs: dict[Any, Callable[[], Any]] = {}
        for group in chunk:
            for who in dict.fromkeys(who for _, who in group):
                rows = [row for row, other in group if other == who]
                if who.implementation is None:
                    for row in rows:
                        jobs[who.name, row] = functools.partial(compile_jnp, row, self.setup)
                    continue
                work = Work(rows[0], pool, self.setup)
                lowered = self._lower(work, who)
                jobs[who.name, work.key] = functools.partial(_compile, work, who, rows, lowered)
        return jobs

    def _lower(self, work: Work, who: Contender) -> "Future[Lowered] | None":
        """Starts to lower a work in another process; None if `_compile` must do it."""
        if self._lowering is None:
            return None
        try:
            return self._lowering.submit(work.lower, who)
        except BrokenProcessPool:
            return None

    def _run_match(
        self,
        tasks: Sequence[Task],
        pool: Pool,
        layers: list[Any],
        programs: dict[Any, Future],
        baseline_names: Sequence[str],
    ) -> None:
        """Times rows that differ only in page size, all of them in turn."""
        entries: dict[Key, Entry] = {}
        for row in dict.fromkeys(row for row, _ in tasks):
            contenders = [who for other, who in tasks if other == row]
            entries |= self._enter_row(row, pool, layers, contenders, programs, baseline_names)

        def label(key: Key, column: str) -> str:
            return f"{key[0].label}, {key[1]}, {column}"

        several_sizes = len({row.page_size for row, _ in entries}) > 1
        try:
            timings = time_bursts(
                {
                    label(key, column): burst
                    for key, (bursts, _) in entries.items()
                    for column, burst in bursts.items()
                },
                rounds=self.setup.page_rounds if several_sizes else self.setup.rounds,
                pause=self.setup.pause,
            )
        except Exception as error:
            for row, name in entries:
                self._fail(row, name, error)
            return
        for (row, name), (bursts, columns) in entries.items():
            for column in bursts:
                t = timings[label((row, name), column)]
                columns |= {column: t.us, f"{column}_low": t.low, f"{column}_high": t.high}
                columns[f"{column}_host_bound"] = t.host_bound
            self.journal.add(row, name, "measured", launches=bursts["us"].launches, **columns)

    def _enter_row(
        self,
        row: Shape,
        pool: Pool,
        layers: list[Any],
        contenders: Iterable[Contender],
        programs: dict[Any, Future],
        baseline_names: Sequence[str],
    ) -> dict[Key, Entry]:
        """Returns the entries whose output is right; records the others as failed."""
        work = Work(row, pool, self.setup)
        inputs = Inputs.make(row, self.setup, layers, work.capacity)
        oracles: dict[int, Any] = {}

        def oracle(layer: int) -> Any:
            if layer not in oracles:
                oracles[layer] = inputs.oracle(layer)
            return oracles[layer]

        found: dict[Key, Entry] = {}

        def enter(name: str, make: Callable[[], Entry]) -> None:
            try:
                mine, columns = make()
            except Exception as error:
                self._fail(row, name, error)
                return
            if columns.pop("correct"):
                found[row, name] = mine, columns
            else:
                why = f"wrong: error {columns['error']:.2e}, of lse {columns['lse_error']:.2e}"
                self.journal.add(row, name, "failed", reason=why, **columns)

        for who in contenders:
            if who.implementation is None:
                make = functools.partial(self._enter_jnp, inputs, programs[who.name, row])
            else:
                program = programs[who.name, work.key]
                make = functools.partial(self._enter_op, who, inputs, program, oracle)
            enter(who.name, make)
        bursts = [burst for mine, _ in found.values() for burst in mine.values()]
        launches = max((burst.launches for burst in bursts), default=0)
        for name in baseline_names if launches else ():
            if not self._done(row, name) and row.dtype == "bf16":
                enter(name, functools.partial(_enter_baseline, name, inputs, launches, oracle))
        return found

    def _enter_op(
        self,
        who: Contender,
        inputs: Inputs,
        compiled: "Future[Programs]",
        oracle: Callable[[int], Any],
    ) -> Entry:
        programs, rows = compiled.result(), []
        layers = inputs.layers[: programs.layers]
        arguments, count = (inputs.q, layers, inputs.shared(programs)), len(layers)
        for program in programs.bursts.values():
            layer = (program.launches - 1) % count
            output = program.last_output(*arguments)
            rows.append(errors_of(output, oracle(layer), inputs.row.dtype, who.implementation))
        columns = max(rows, key=lambda row: (not row["correct"], row["error"]))
        tokens = sum(inputs.row.seq_lens) * count
        rotated = tokens * self.setup.token_bytes(inputs.row.dtype)
        return (
            {column: program.burst(*arguments) for column, program in programs.bursts.items()},
            {**columns, "layers": count, "rotated_mb": rotated / 1e6},
        )

    def _enter_jnp(self, inputs: Inputs, compiled: "Future[timing.ModelProgram]") -> Entry:
        """Makes the entry of `jnp`, checked on one request with a reference for its own KV."""
        program = compiled.result()
        kv = inputs.contiguous()
        arguments = inputs.q, kv, inputs.seq_lens
        o, lse = program.last_output(*arguments)
        request = inputs.sample()[0]
        length = inputs.row.seq_lens[request]
        exact = attention_float64(
            np.asarray(inputs.q[request]),
            np.asarray(kv[(program.launches - 1) % len(kv)][request])[:length],
            softmax_scale=SCALE,
            kv_lora_rank=self.setup.kv_lora_rank,
        )
        columns = errors_of((o, lse), {request: exact}, "bf16")
        rotated = sum(x.nbytes for x in kv)
        columns |= {"layers": len(kv), "rotated_mb": rotated / 1e6}
        return {"us": program.burst(*arguments)}, columns

    def _fail(self, row: Shape, name: str, error: Exception) -> None:
        """Records a failure. Raises DeviceLostError instead if the device does not respond."""
        try:
            jax.block_until_ready(jnp.zeros(8) + 1)
        except Exception as lost:
            raise DeviceLostError(
                f"the device is lost after {row.label}, {name}: {error}"
            ) from lost
        reason = f"{type(error).__name__}: {error}".strip()[:500]
        say(f"failed: {row.label}, {name}: {reason}", style="red")
        self.journal.add(row, name, "failed", reason=reason)


def _in_threads(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Future]:
    """Runs the jobs, and returns their futures when all are done."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        futures = {key: executor.submit(job) for key, job in jobs.items()}
        try:
            for _ in track(as_completed(futures.values()), "compiling", total=len(futures)):
                pass
        except BaseException:  # an interrupt does not wait for programs
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return futures


def _compile(
    work: Work, who: Contender, rows: Sequence[Shape], lowered: "Future[Lowered] | None"
) -> Programs:
    try:
        found = None if lowered is None else lowered.result()
    except BrokenProcessPool:  # One that was killed, for its memory say, must not fail this row.
        found = None
    return work.compile(who, rows, found)


def _share_the_gpu() -> None:
    """Keeps a process that only lowers programs from taking the memory of the GPU."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _enter_baseline(
    name: str, inputs: Inputs, launches: int, oracle: Callable[[int], Any]
) -> Entry:
    baseline = baselines.FlashInfer(name, inputs)
    columns = errors_of(baseline.output(0), oracle(0), inputs.row.dtype)
    return baseline.bursts(launches), {**columns, "layers": len(inputs.layers)}
