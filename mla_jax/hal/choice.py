"""The fastest of several tilings of our own Hopper kernels, by their simulated times.

`fastest_tiles` compares kernels that each have the plan of one call. It is for the trace of a
program, so it is quick: `quick_times` simulates a few short schedules per kernel, and continues
them in a straight line. These schedules are kept for the next problem on the same device.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.simulator.hopper import (
    KEPT,
    STORED,
    HopperKernel,
    hopper_costs,
    tuned_for_hopper,
)
from mla_jax.hal.simulator.hopper_times import BEFORE, Seconds, hopper_times
from mla_jax.hal.simulator.shared_engines import SharedBlockTimes
from mla_jax.hal.tiling import require_call
from mla_jax.hal.work import Problem, Work

MEASURED, SIMULATED, TABLE = "measured", "simulated", "table"
# A smaller simulated gain does not replace the usual tiles: it is the simulator's mean error on
# measured rows of our kernels.
MARGIN = 0.05


class TimedTiles(NamedTuple):
    """The config of a kernel and its simulated time."""

    tiles: Any
    seconds: float


@dataclass(frozen=True)
class TileChoice:
    """The tiles for a problem on a device.

    Attributes:
        tiles: config of a Hopper kernel (`pallas_kernels.hopper.config`).
        seconds: the simulated time of a call with them.
        source: "measured": a table has them, which was tuned on this very device. "simulated":
            they have the least simulated time, or the table's are less than MARGIN slower.
        runners_up: the other legal tiles, the fastest first.
    """

    tiles: Any
    seconds: float
    source: str
    runners_up: tuple[TimedTiles, ...]


def fastest_tiles(
    profile: HardwareProfile,
    problem: Problem,
    kernels: Iterable[tuple[Any, HopperKernel]],
    *,
    usual: Any = None,
    measured: bool = False,
) -> TileChoice:
    """Returns the tiles with the least simulated time.

    Args:
        kernels: pairs of a config and its kernel, with the plan that it gets for the problem.
        usual: the config that is taken unless another is more than MARGIN faster; None: there is
            none.
        measured: whether `usual` is taken in any case, because it was measured on this device.

    Raises TypeError for a profile or a problem of another type.
    """
    require_call(profile, problem)
    own = tuned_for_hopper(profile)
    timed = [TimedTiles(tiles, _seconds(own, problem, kernel)) for tiles, kernel in kernels]
    timed.sort(key=lambda each: each.seconds)  # stable, so that the order of kernels breaks ties
    chosen = timed[0]
    for each in timed:
        if each.tiles == usual and (measured or each.seconds <= chosen.seconds * (1 + MARGIN)):
            chosen = each
            break
    others = tuple(each for each in timed if each is not chosen)
    return TileChoice(*chosen, MEASURED if measured else SIMULATED, others)


def _seconds(profile: HardwareProfile, problem: Problem, kernel: HopperKernel) -> float:
    # With many items per worker, that the last ones have the memory to themselves is a detail.
    most = 8 * kernel.work.num_workers
    times = hopper_times(profile, problem, kernel, quick_times, most)
    return profile["latency.launch"] + times.cores + times.merge


def values_of(profile: HardwareProfile) -> tuple[float, ...]:
    """Returns the values of a profile's numbers, by which devices are equal."""
    return tuple(number.value for number in profile.numbers.values())


@dataclass(frozen=True)
class ProfileKey:
    """A profile as the key of a cache: equal to another if its name and all values are."""

    name: str
    values: tuple[float, ...]
    profile: HardwareProfile = field(compare=False)

    @staticmethod
    def of(profile: HardwareProfile) -> "ProfileKey":
        return ProfileKey(profile.name, values_of(profile), profile)


class QuickTimes:
    """Seconds of n KV blocks, simulated up to REACH blocks after `before`, and linear from there.

    Our schedules repeat after fewer blocks, so that the result is that of `SharedBlockTimes` but
    for rounding. A test compares them.

    times: of which the plain ones are used.
    like: times of a kernel that differs only in how an item ends; None: these.
    """

    REACH = 8

    def __init__(
        self,
        times: SharedBlockTimes,
        period: int,
        *,
        before: int = 0,
        like: "QuickTimes | None" = None,
    ) -> None:
        self._times, self._period, self._last = times, period, before + self.REACH
        self._like = like or self

    def __call__(self, num_blocks: int) -> float:
        beyond = num_blocks - self._last
        if beyond <= 0:
            return self._times.plain(num_blocks)
        periods = -(-beyond // self._period)
        near = num_blocks - periods * self._period
        return self._times.plain(near) + periods * self._like.of_a_period

    @cached_property
    def of_a_period(self) -> float:
        """Seconds of the blocks after which the schedule repeats."""
        times, last = self._times, self._last
        return times.plain(last + self._period) - times.plain(last)


@dataclass(frozen=True)
class _Sizes:
    """What the times of a kernel's work items depend on."""

    profile: ProfileKey
    fields: tuple[Any, ...]
    end: int
    kernel: HopperKernel = field(compare=False)


def quick_times(
    profile: HardwareProfile, kernel: HopperKernel, end: int
) -> tuple[Seconds, Seconds]:
    """Returns times as `simulator.hopper_times.exact_times` does, from short schedules alone."""
    return _quick_times(_sizes(profile, kernel, end))


def _sizes(profile: HardwareProfile, kernel: HopperKernel, end: int) -> _Sizes:
    fields = (
        *(kernel.kernel, kernel.rows_per_cta, kernel.ctas_per_tile),
        *(
            kernel.kv_stages,
            kernel.q_stages,
            kernel.computing,
            end != STORED and kernel.partial_bytes,
        ),
        end == KEPT and kernel.in_pairs,
    )
    return _Sizes(ProfileKey.of(profile), fields, end, _without_work(kernel))


def _without_work(kernel: HopperKernel) -> HopperKernel:
    none = np.zeros(0, int)
    return dataclasses.replace(kernel, work=Work(none, none, none, none, 0), kept=none, merging={})


@lru_cache(maxsize=512)
def _quick_times(sizes: _Sizes) -> tuple[QuickTimes, QuickTimes]:
    profile, kernel, end = sizes.profile.profile, sizes.kernel, sizes.end
    costs, signal = hopper_costs(profile, kernel, end), profile["latency.barrier"]
    period = kernel.order(1).period
    like = None if end == STORED else _quick_times(_sizes(profile, kernel, STORED))[0]
    first = QuickTimes(SharedBlockTimes(kernel.order, costs, signal), period, like=like)
    order = partial(kernel.order, before=BEFORE)
    later = SharedBlockTimes(order, costs, signal)
    return first, QuickTimes(later, period, before=BEFORE, like=like or first)
