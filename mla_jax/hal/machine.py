"""Many cores at once: pieces on workers that share the memory.

A piece alone takes the time of its schedule on a core. While the pieces that run together ask for
more than the memory gives, all of them are served at the same fraction of their speed (the fluid
limit of a fair memory). Where the memory could never be asked for too much the pieces are
independent and only the hand-out is simulated; both ways give the same answer there.
"""

import heapq

import numpy as np


def makespan(
    seconds: np.ndarray, demand: np.ndarray, worker: np.ndarray, num_workers: int
) -> tuple[float, float]:
    """(end of the last piece, seconds during which the memory was full).

    seconds [P]: each piece alone; demand [P]: the share of the whole memory it asks for while it
    runs alone; worker [P]: whose queue it is in, or -1 where free workers take the next one.
    """
    if demand.max() * min(num_workers, len(demand)) <= 1.0:
        return _independent(seconds, worker, num_workers), 0.0
    return _shared(seconds, demand, worker, num_workers)


def _independent(seconds: np.ndarray, worker: np.ndarray, num_workers: int) -> float:
    if worker[0] >= 0:
        return float(np.bincount(worker, weights=seconds, minlength=num_workers).max())
    free = [0.0] * min(num_workers, len(seconds))
    heapq.heapify(free)
    for s in seconds.tolist():
        heapq.heapreplace(free, free[0] + s)
    return max(free)


def _shared(
    seconds: np.ndarray, demand: np.ndarray, worker: np.ndarray, num_workers: int
) -> tuple[float, float]:
    queues = _queues(worker, num_workers)
    taken = 0
    left = np.zeros(num_workers)
    wants = np.zeros(num_workers)
    active = np.zeros(num_workers, dtype=bool)
    position = np.zeros(num_workers, dtype=int)

    def next_piece(w: int) -> int:
        nonlocal taken
        if queues is None:
            if taken >= len(seconds):
                return -1
            taken += 1
            return taken - 1
        if position[w] >= len(queues[w]):
            return -1
        position[w] += 1
        return int(queues[w][position[w] - 1])

    def hand_out(workers: np.ndarray) -> None:
        for w in workers:
            piece = next_piece(w)
            active[w] = piece >= 0
            left[w], wants[w] = (seconds[piece], demand[piece]) if piece >= 0 else (0.0, 0.0)

    hand_out(np.arange(num_workers))
    now = full = 0.0
    while active.any():
        asked = float(wants[active].sum())
        speed = 1.0 / max(asked, 1.0)
        step = float(left[active].min()) / speed
        now += step
        full += step if asked >= 1.0 else 0.0
        left[active] -= step * speed
        hand_out(np.flatnonzero(active & (left <= 1e-12)))
    return now, full


def _queues(worker: np.ndarray, num_workers: int) -> list[np.ndarray] | None:
    if worker[0] < 0:
        return None
    order = np.argsort(worker, kind="stable")
    bounds = np.searchsorted(worker[order], np.arange(num_workers + 1))
    return [order[bounds[w] : bounds[w + 1]] for w in range(num_workers)]
