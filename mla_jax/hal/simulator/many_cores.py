"""Many cores at once: workers that run work items and share the memory.

An item has two times: with all cores working, and with the memory to itself. Fewer cores work in
the last wave, or after the workers of a batch with different lengths are done. Then an item's speed
is in between, and its time is interpolated over the number of working cores. If both times are
equal, only the assignment of items to workers is simulated.
"""

import heapq

import numpy as np


def makespan(crowded: np.ndarray, alone: np.ndarray, worker: np.ndarray, num_workers: int) -> float:
    """Returns the seconds until the last item is done.

    Args:
        crowded: [P] seconds of each item while all workers are busy.
        alone: [P] seconds of each item by itself, at most `crowded`.
        worker: [P] the worker whose queue an item is in, or -1 if free workers take the next item.
        num_workers: number of workers.
    """
    if np.array_equal(crowded, alone):
        return _independent(crowded, worker, num_workers)
    return _shared(crowded, alone, worker, num_workers)


def _independent(seconds: np.ndarray, worker: np.ndarray, num_workers: int) -> float:
    if worker[0] >= 0:
        return float(np.bincount(worker, weights=seconds, minlength=num_workers).max())
    free = [0.0] * min(num_workers, len(seconds))
    heapq.heapify(free)
    for s in seconds.tolist():
        heapq.heapreplace(free, free[0] + s)
    return max(free)


def _shared(crowded: np.ndarray, alone: np.ndarray, worker: np.ndarray, num_workers: int) -> float:
    queue, last = _queues(worker, num_workers)
    following = iter(range(len(crowded)))
    position = np.array(last[:-1])
    item = np.full(num_workers, -1)
    left = np.zeros(num_workers)

    def assign(workers: np.ndarray) -> None:
        if worker[0] < 0:
            for w in workers:
                item[w] = next(following, -1)
        else:
            more = position[workers] < last[workers + 1]
            places = np.minimum(position[workers], len(queue) - 1)
            item[workers] = np.where(more, queue[places], -1)
            position[workers] += 1
        left[workers] = 1.0

    assign(np.arange(num_workers))
    busy = np.flatnonzero(item >= 0)
    most, now = len(busy), 0.0
    while len(busy):
        mine = item[busy]
        seconds = alone[mine] + (crowded[mine] - alone[mine]) * (len(busy) / most)
        step = float((left[busy] * seconds).min())
        now += step
        left[busy] -= step / seconds
        assign(busy[left[busy] <= 1e-9])
        busy = np.flatnonzero(item >= 0)
    return now


def _queues(worker: np.ndarray, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items ordered by worker, and the range [W + 1] of each worker among them."""
    order = np.argsort(worker, kind="stable")
    return order, np.searchsorted(worker[order], np.arange(num_workers + 1))
