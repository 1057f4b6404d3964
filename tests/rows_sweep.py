"""Every number of query rows, on a GPU, by many processes: tracing a kernel is work for Python."""

import concurrent.futures
import multiprocessing
import os
import traceback

# Each process has few buffers, and the GPU is shared.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def failures(tasks: list[tuple[str, int, int]], processes: int | None = None) -> dict[str, str]:
    """Runs `check_rows` for (kind, rows, rows_per_tile); what failed, with its last lines."""
    os.environ.update(ENVIRONMENT)
    context = multiprocessing.get_context("spawn")
    count = processes or os.cpu_count()
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
        results = pool.map(_failure, tasks, chunksize=1)
        return {
            " ".join(map(str, task)): found
            for task, found in zip(tasks, results, strict=True)
            if found
        }


def _failure(task: tuple[str, int, int]) -> str:
    from guarded_rows import check_rows  # (imports JAX, with this process's environment)

    try:
        check_rows(*task, workers=6)
    except Exception:
        return "\n".join(traceback.format_exc().splitlines()[-4:])
    return ""
