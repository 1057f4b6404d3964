"""Which tiles the Hopper kernels take on a device, from its hardware profile.

On an H200 they are those of `tuned.json`, which was tuned there ("measured"). For another profile
they are the fastest of the legal configs by the simulator, or those of the table where these are
about as fast ("simulated"). An int8 cache, and other widths than 512 + 64, get the table's
("table").

Only sizes count, since lengths are not known when a program is traced: every request is assumed to
be as long as its block table, or EXPECTED_LEN keys where that is not known.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from mla_jax.checks import require_one_of, require_type
from mla_jax.hal import HardwareProfile, Problem, TilePlanError, load_profile
from mla_jax.hal.choice import (
    MEASURED,
    TABLE,
    ProfileKey,
    TileChoice,
    fastest_tiles,
    quick_times,
    values_of,
)
from mla_jax.hal.simulator.hopper import STORED, HopperKernel, tuned_for_hopper
from mla_jax.splits.numpy_planner import plan_in_numpy
from pallas_kernels.hopper.config import (
    DecodeTransposedConfig,
    KernelConfig,
    can_be_in_pairs,
)
from pallas_kernels.hopper.plan.call import MOST_TILES
from pallas_kernels.hopper.simulated import kernel_of, sizes_of
from pallas_kernels.hopper.tuned import choose_config, config_of, tuned
from pallas_kernels.hopper.work_items import finish_of

TUNED_ON = "H200_SXM"
EXPECTED_LEN = 16384
# Longer requests do not change which tiles are the fastest.
LONGEST_LEN = 2**20
WIDTHS = (512, 64)  # kv_lora_rank and rope_dim that the simulator models
STAGES = tuple(  # of KV and of q that `decode_transposed` may have, the most first
    itertools.product(
        ((3, 3, 3), (3, 2, 3), (2, 2, 3), (2, 2, 2), (2, 2, 1), (2, 1, 2), (2, 1, 1), (1, 1, 1)),
        (2, 1),
    )
)


def is_measured(profile: HardwareProfile | None) -> bool:
    """Returns whether the table was tuned on such a device. None: no device is known."""
    return profile is None or values_of(profile) == values_of(load_profile(TUNED_ON))


def tiles_for(
    rows: int,
    *,
    batch: int,
    capacity: int | None = None,
    cache: str = "float",
    rescale: str = "multiply",
    profile: HardwareProfile | None = None,
    kv_lora_rank: int = WIDTHS[0],
    rope_dim: int = WIDTHS[1],
) -> tuple[KernelConfig, str]:
    """Returns the tiles of a plan and their source. Arguments as in `tuned.choose_config`.

    Raises:
        TilePlanError: no config is legal on this device; the message names the limit.
    """
    widths = {"kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    if cache == "float" and tuple(widths.values()) == WIDTHS and not is_measured(profile):
        assert profile is not None
        choice = _choice(ProfileKey.of(profile), rows, batch, capacity, rescale)
        return choice.tiles, choice.source
    tiles = choose_config(
        rows, batch=batch, capacity=capacity, cache=cache, rescale=rescale, profile=profile,
        **widths,
    )  # fmt: skip
    return tiles, MEASURED if is_measured(profile) and tuple(widths.values()) == WIDTHS else TABLE


def choose_tiles(
    profile: HardwareProfile, problem: Problem, *, rescale: str = "multiply"
) -> TileChoice:
    """Returns the tiles that a plan of a problem gets on a device, and the runners-up.

    problem: over a cache of bf16 or fp16. Block tables reach as far as its longest request.

    Raises:
        TilePlanError: no config is legal on this device; the message names the limit.
        TypeError: an argument of another type, such as the name of a profile.
        ValueError: a problem that the simulator has no model of.
    """
    require_type("profile", profile, HardwareProfile)
    require_type("problem", problem, Problem)
    require_one_of("problem.kv_dtype", problem.kv_dtype, ("bf16", "fp16"))
    return _choose(profile, problem, max(*problem.kv_lens, 1), rescale)


@lru_cache(maxsize=1024)
def _choice(
    profile: ProfileKey, rows: int, batch: int, capacity: int | None, rescale: str
) -> TileChoice:
    length = min(capacity or EXPECTED_LEN, LONGEST_LEN)
    return _choose(profile.profile, Problem((length,) * batch, rows), capacity, rescale)


def _choose(
    profile: HardwareProfile, problem: Problem, capacity: int | None, rescale: str
) -> TileChoice:
    configs = [
        with_split_costs(tiles, profile, problem.rows)
        for tiles in legal_configs(profile, rescale=rescale)
    ]
    tall = max(tiles.rows_per_tile for tiles in configs)
    kernels = [
        (tiles, planned_kernel(tiles, profile, problem))
        for tiles in configs
        if tiles.rows_per_tile == tall or _num_tiles(tiles, problem) <= MOST_TILES
    ]
    usual = _table_tiles(profile, problem, capacity, rescale)
    measured = is_measured(profile)
    return fastest_tiles(profile, problem, kernels, usual=usual, measured=measured)


def table_tiles(profile: HardwareProfile, problem: Problem) -> KernelConfig | None:
    """Returns the tiles that the table has for a problem; None where they do not fit the device.

    Block tables reach as far as the longest request.
    """
    return _table_tiles(profile, problem, max(*problem.kv_lens, 1), "multiply")


def _table_tiles(
    profile: HardwareProfile, problem: Problem, capacity: int | None, rescale: str
) -> KernelConfig | None:
    try:
        tiles = choose_config(
            problem.rows, batch=problem.batch, capacity=capacity, rescale=rescale, profile=profile
        )
    except TilePlanError:
        return None
    return with_split_costs(tiles, profile, problem.rows)


def _num_tiles(tiles: KernelConfig, problem: Problem) -> int:
    return problem.batch * -(-problem.rows // tiles.rows_per_tile)


def planned_kernel(tiles: KernelConfig, profile: HardwareProfile, problem: Problem) -> HopperKernel:
    """Returns the kernel with these tiles as it is simulated, with the plan for these lengths."""
    split = plan_in_numpy(
        problem.kv_lens,
        num_workers=tiles.num_workers(profile.cores),
        rows=problem.rows,
        rows_per_tile=tiles.rows_per_tile,
        overhead=tiles.split_overhead,
        merge_overhead=tiles.merge_overhead,
        in_pairs=tiles.in_pairs,
    )
    return kernel_of(tiles, split, problem, finish_of(tiles, workers_may_wait=True))


def legal_configs(
    profile: HardwareProfile, *, rescale: str = "multiply"
) -> tuple[KernelConfig, ...]:
    """Returns the configs that fit a device, of the kernels over a 16-bit cache.

    They differ in the height of tiles, the stages, and whether CTAs are in pairs. Registers and the
    costs of splitting are those of the table. Stages are those of the table, and those of STAGES to
    which no others that fit add any.

    Raises:
        TilePlanError: there is none; the message names the limit.
    """
    capability = profile.numbers.get("core.compute_capability")
    if capability is not None and not 9.0 <= capability.value < 10.0:
        raise TilePlanError(
            f"{profile.name}: core.compute_capability = {capability.value:g}, wanted at least 9 "
            "and below 10 (wgmma)"
        )
    found: list[KernelConfig] = []
    lacking = []
    for entry in tuned("float"):
        if rescale == "multiply" or entry["kernel"] == "decode":
            try:
                found += _configs_of(entry, profile)
            except TilePlanError as error:
                lacking.append(error)
    if not found:
        raise lacking[0]  # that of the lowest tiles
    return tuple(found)


def _configs_of(entry: Mapping[str, Any], profile: HardwareProfile) -> list[KernelConfig]:
    """Returns the legal configs of a height; raises TilePlanError if there is none."""
    found: list[KernelConfig] = []
    for variant in _variants(entry):
        try:
            tiles = config_of(variant, profile)
        except TilePlanError as error:
            lacking = error
            continue
        if not any(_adds_to(other, tiles) for other in found):
            found.append(tiles)
    if not found:
        raise lacking
    for tiles in tuple(found):
        in_pairs = can_be_in_pairs(tiles.rows_per_tile, tiles.kv_lora_rank)
        if isinstance(tiles, DecodeTransposedConfig) and in_pairs:
            with contextlib.suppress(TilePlanError):
                found.append(dataclasses.replace(tiles, in_pairs=True))
    found = [tiles for tiles in found if tiles.num_workers(profile.cores)]
    if not found:
        raise TilePlanError(f"{profile.name}: core.count = {profile.cores}, wanted at least 2")
    return found


def _variants(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the entry, then the entry with other stages."""
    yield entry
    if entry["kernel"] == "decode_transposed":
        for kv_stages, q_stages in STAGES:
            if (kv_stages, q_stages) != (tuple(entry["kv_stages"]), entry["q_stages"]):
                yield {**entry, "kv_stages": kv_stages, "q_stages": q_stages}


def _adds_to(tiles: KernelConfig, other: KernelConfig) -> bool:
    """Returns whether no stage count of `other` is higher than that of `tiles`."""
    counts = [
        (*each.kv_stages, each.q_stages)
        for each in (tiles, other)
        if isinstance(each, DecodeTransposedConfig)
    ]
    return all(a >= b for a, b in zip(*counts, strict=True))


def with_split_costs(tiles: KernelConfig, profile: HardwareProfile, rows: int) -> KernelConfig:
    """Returns the tiles with the table's costs of splitting, scaled from an H200 to a device.

    These costs are in blocks. They grow as what a work item takes besides its blocks does, and
    shrink as the time of a block grows.
    """
    if is_measured(profile):
        return tiles
    keys = ProfileKey.of(profile), ProfileKey.of(load_profile(TUNED_ON))
    here, there = (_item_in_blocks(key, tiles, -(-rows // tiles.rows_per_tile)) for key in keys)
    merge = round(tiles.merge_overhead * here / there)
    split = max(1, round(tiles.split_overhead * here / there))
    return dataclasses.replace(tiles, split_overhead=split, merge_overhead=merge)


@lru_cache(maxsize=1024)
def _item_in_blocks(device: ProfileKey, tiles: KernelConfig, num_row_tiles: int) -> float:
    """Returns the time of a work item besides its blocks over that of a block, on a busy device."""
    profile = tuned_for_hopper(device.profile)
    kernel = sizes_of(tiles)
    first, _ = quick_times(profile, kernel, STORED)
    step = (first(28) - first(16)) / 12  # The schedule repeats after 1, 2, 3 or 6 blocks.
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"] * num_row_tiles
    share = min(memory, profile["memory.l2_bandwidth"]) / profile.cores
    return (first(16) - 16 * step) / max(step, kernel.block_bytes / share)
