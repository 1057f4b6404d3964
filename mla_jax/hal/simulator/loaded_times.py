"""Times of work items while all cores share the memory."""

import math
from collections.abc import Callable

from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.schedule import Schedule
from mla_jax.hal.simulator.one_core import BlockTimes, Costs, Timeline, run_schedule
from mla_jax.hal.work import Work


def active(plan: Work) -> int:
    """Returns the number of cores that have work items."""
    return min(plan.num_workers, len(plan.blocks)) * plan.cores_per_item


def fair_share(profile: HardwareProfile, plan: Work, in_flight: float, multicast: int = 1) -> float:
    """Returns bytes per second per core while all cores work.

    Row tiles that read the same KV get it from the L2 cache. HBM serves it once, and L2 once per
    cluster that shares the loading. If L2 does not hold what the cores have in flight, HBM serves
    each of them.

    in_flight: bytes of KV that one core has in flight.
    """
    busy = active(plan)
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    held = busy * in_flight <= profile["buffer.l2"]
    sharers = min(plan.sharers, busy) if held else multicast
    return min(memory * sharers / multicast, profile["memory.l2_bandwidth"]) / busy


class LoadedTimes:
    """Times of blocks on a memory that this kernel keeps busy for a fraction of the time.

    While all cores work, the memory gives each its share. If it is busy for only a fraction f of
    the time, it serves a load at share / f. The result uses the f at which both agree: n blocks
    take max(time with loads at share / f, bytes / (share * f)), and the smallest over f counts.
    Each term falls when an engine becomes faster, and so does the result.
    """

    FRACTIONS = (1.0, 0.9, 0.8, 0.71, 0.63, 0.56, 0.5, 0.42, 0.35, 0.28, 0.2, 0.1)

    def __init__(
        self,
        orders: tuple[Callable[[int], Schedule], ...],
        costs_at: Callable[[float], Costs],
        share: float,
        bytes_per_block: float,
        signal: float,
    ) -> None:
        self._orders, self._costs_at, self._signal = orders, costs_at, signal
        self._share, self._bytes = share, bytes_per_block
        self._times: dict[float, list[BlockTimes]] = {}
        self._known: dict[int, tuple[float, float]] = {}

    def _at(self, fraction: float, num_blocks: int) -> float:
        if fraction not in self._times:
            costs = self._costs_at(self._share / fraction if fraction else math.inf)
            self._times[fraction] = [BlockTimes(o, costs, self._signal) for o in self._orders]
        return min(times(num_blocks) for times in self._times[fraction])

    def __call__(self, num_blocks: int) -> tuple[float, float]:
        """Returns (seconds of num_blocks blocks, the fraction)."""
        if num_blocks not in self._known:
            self._known[num_blocks] = self._search(num_blocks)
        return self._known[num_blocks]

    def _search(self, num_blocks: int) -> tuple[float, float]:
        loads = num_blocks * self._bytes / self._share
        low, high = 0, len(self.FRACTIONS) - 1  # the fraction falls with the index
        while low < high:
            middle = (low + high) // 2
            fraction = self.FRACTIONS[middle]
            if self._at(fraction, num_blocks) <= loads / fraction:
                high = middle
            else:
                low = middle + 1
        near = {self.FRACTIONS[max(low - 1, 0)], self.FRACTIONS[low]}
        return min((max(self._at(f, num_blocks), loads / f), f) for f in near)

    def alone(self, num_blocks: int) -> float:
        """Returns the seconds with the memory to itself, at most those with all cores working."""
        return min(self._at(0.0, num_blocks), self(num_blocks)[0])

    def timeline(self, num_blocks: int) -> Timeline:
        """Returns the timeline of the fastest order, at the fraction of so many blocks."""
        costs = self._costs_at(self._share / self(num_blocks)[1])
        lines = [run_schedule(order(num_blocks), costs, self._signal) for order in self._orders]
        return min(lines, key=lambda line: line.total)
