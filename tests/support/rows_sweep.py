"""Every number of query rows, on a GPU, by many processes: tracing a kernel is work for Python."""

import concurrent.futures
import multiprocessing
import os
import sys
import time
import traceback

# Each process has few buffers, and the GPU is shared.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
NOT_RUN = "not run before the deadline"


def failures(
    tasks: list[tuple[str, int, int]],
    *,
    workers: int,
    processes: int | None = None,
    seconds: float = 480,
) -> dict[str, str]:
    """Runs `check_rows` for (kind, rows, rows_per_tile); what failed, with its error.

    workers: of the kernels' plans. processes: of this machine; None: one per core.

    Says every 20 s how far it is. What is not run after so many seconds counts as failed: a kernel
    that waits for ever ends this too.
    """
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    found = dict.fromkeys(tasks, NOT_RUN)
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
    futures = {pool.submit(_failure, task, workers): task for task in tasks}
    pending = set(futures)
    while pending and time.monotonic() - started < seconds:
        done, pending = concurrent.futures.wait(pending, timeout=20)
        for future in done:
            error = future.exception()
            found[futures[future]] = str(error) if error else future.result()
        bad = sum(bool(text) for text in found.values()) - len(pending)
        print(
            f"{len(tasks) - len(pending)} of {len(tasks)} numbers of rows, {bad} failed, "
            f"{time.monotonic() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    running = list(pool._processes.values())
    pool.shutdown(wait=False, cancel_futures=True)
    if pending:
        for process in running:
            process.kill()
    return {" ".join(map(str, task)): text for task, text in found.items() if text}


def _failure(task: tuple[str, int, int], workers: int) -> str:
    from guarded_rows import check_rows  # (imports JAX, with this process's environment)

    try:
        check_rows(*task, workers=workers)
    except Exception as error:
        return "".join(traceback.format_exception_only(error))[:500]
    return ""
