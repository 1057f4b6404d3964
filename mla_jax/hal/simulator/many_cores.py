"""Many cores at once: pieces on workers that share the memory.

A piece has two times: with all cores at work, and with the memory to itself. While fewer cores are
at work (in the last wave, or after a ragged batch's short workers are done) it goes at a speed in
between: loads take time in proportion to the cores that load, so its time is interpolated over
their number. Where both times are the same only the hand-out is simulated.
"""

import heapq

import numpy as np


def makespan(crowded: np.ndarray, alone: np.ndarray, worker: np.ndarray, num_workers: int) -> float:
    """Seconds till the last piece is done.

    crowded [P], alone [P]: seconds of each piece with all workers busy, and by itself (at most
    crowded). worker [P]: whose queue a piece is in, or -1 where free workers take the next one.
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
    piece = np.full(num_workers, -1)
    left = np.zeros(num_workers)

    def hand_out(workers: np.ndarray) -> None:
        if worker[0] < 0:
            for w in workers:
                piece[w] = next(following, -1)
        else:
            more = position[workers] < last[workers + 1]
            places = np.minimum(position[workers], len(queue) - 1)
            piece[workers] = np.where(more, queue[places], -1)
            position[workers] += 1
        left[workers] = 1.0

    hand_out(np.arange(num_workers))
    busy = np.flatnonzero(piece >= 0)
    most, now = len(busy), 0.0
    while len(busy):
        mine = piece[busy]
        seconds = alone[mine] + (crowded[mine] - alone[mine]) * (len(busy) / most)
        step = float((left[busy] * seconds).min())
        now += step
        left[busy] -= step / seconds
        hand_out(busy[left[busy] <= 1e-9])
        busy = np.flatnonzero(piece >= 0)
    return now


def _queues(worker: np.ndarray, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces by worker, and where each worker's begin and end among them."""
    order = np.argsort(worker, kind="stable")
    return order, np.searchsorted(worker[order], np.arange(num_workers + 1))
