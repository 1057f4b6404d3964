"""Which config of which Hopper kernel suits a problem: a lookup in `tuned.json`.

The table has an entry for each class of query rows: `most_rows`, the kernel, the fields of its
config, and what was timed. `python -m experiments.speed.tune_hopper` times
candidates on a GPU and writes it.
"""

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from mla_jax.checks import require_one_of
from mla_jax.hal import HardwareProfile, TilePlanError, load_profile
from pallas_kernels.hopper.config import (
    MOST_COLUMNS,
    DecodeConfig,
    DecodeInt8Config,
    DecodeTransposedConfig,
    DecodeTransposedInt8Config,
    KernelConfig,
    SmLimits,
    can_be_in_pairs,
)

CONFIGS: dict[str, type[KernelConfig]] = {
    "decode_transposed": DecodeTransposedConfig,
    "decode": DecodeConfig,
    "decode_transposed_int8": DecodeTransposedInt8Config,
    "decode_int8": DecodeInt8Config,
}
_NOT_FIELDS = ("cache", "most_rows", "kernel", "timed")  # of a config, in an entry


def choose_config(
    rows: int,
    *,
    batch: int | None = None,
    capacity: int | None = None,
    cache: str = "float",
    rescale: str = "multiply",
    profile: HardwareProfile | None = None,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> KernelConfig:
    """Returns the tuned config for `rows` query rows per request (tokens * heads).

    Args:
        batch: requests; None: not known.
        capacity: keys that a request's block table reaches; None: not known. A few short requests
            get tiles of few rows: each tile reads the cache again, but all SMs have work, and there
            are fewer and smaller partial results to combine.
        cache: "float" (16 bits) or "int8".
        rescale: "multiply" or "exponent_add"; the latter only `decode` has.
        profile: of the GPU; None: of an H200.

    Raises:
        ValueError: another cache, or one that no kernel takes with this rescale.
    """
    require_one_of("cache", cache, tuple(few_tokens()))

    def of_height(height: int) -> KernelConfig:
        return config_of_height(
            height,
            num_tiles=None if batch is None else batch * -(-rows // height),
            cache=cache,
            profile=profile,
            kv_lora_rank=kv_lora_rank,
            rope_dim=rope_dim,
        )

    known = batch is not None and capacity is not None
    if known and rows > MOST_COLUMNS and rescale == "multiply":
        few = few_tokens()[cache]
        for height in few["rows_per_tile"]:
            if -(-rows // height) * batch * capacity <= few["most"]:
                return of_height(height)
    for entry in tuned(cache):
        if entry["most_rows"] is not None and rows > entry["most_rows"]:
            continue
        if rescale == "multiply" or entry["kernel"] == "decode":
            return of_height(entry["rows_per_tile"])
    raise ValueError(f"{cache} cache, rescale = {rescale!r}, {rows} rows: not in tuned.json")


def config_of_height(
    rows_per_tile: int,
    *,
    num_tiles: int | None = None,
    cache: str = "float",
    profile: HardwareProfile | None = None,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> KernelConfig:
    """Returns the tuned config for tiles of so many rows, as a split plan has them."""
    widths = {"kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    for entry in tuned(cache):
        if entry["rows_per_tile"] == rows_per_tile:
            return config_of(entry, profile, num_tiles=num_tiles, **widths)
    heights = ", ".join(map(str, tile_heights(cache)))
    raise ValueError(f"rows_per_tile must be one of {heights}, got {rows_per_tile}")


def tile_heights(cache: str = "float", *, rescale: str = "multiply") -> tuple[int, ...]:
    """Returns the rows_per_tile of split plans that the kernels take."""
    return tuple(
        entry["rows_per_tile"]
        for entry in tuned(cache)
        if rescale == "multiply" or entry["kernel"] == "decode"
    )


def config_of(
    entry: Mapping[str, Any],
    profile: HardwareProfile | None = None,
    *,
    num_tiles: int | None = None,
    **widths: Any,
) -> KernelConfig:
    """Returns the config of one entry of the table.

    num_tiles: tiles of all requests; None: not known. Workers of `decode_transposed` are in pairs
    if more than half of the pairs get a tile and none gets two. Fewer tiles are split into more
    than two items. With more tiles, clusters cost a launch more time than they save in the merge.
    """
    profile = profile or load_profile("H200_SXM")
    if entry["kernel"] not in CONFIGS:
        raise TilePlanError(f"kernel = {entry['kernel']!r}, wanted {' or '.join(CONFIGS)}")
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry.items()
        if name not in _NOT_FIELDS
    }
    if entry["kernel"] == "decode_transposed" and num_tiles is not None:
        a_tile_each = profile.cores // 4 < num_tiles <= profile.cores // 2
        latent = widths.get("kv_lora_rank", 512)
        fields["in_pairs"] = a_tile_each and can_be_in_pairs(entry["rows_per_tile"], latent)
    return CONFIGS[entry["kernel"]](limits=SmLimits.of(profile), **fields, **widths)


@functools.cache
def tuned(cache: str | None = None) -> tuple[dict[str, Any], ...]:
    """Returns the entries of tuned.json for a cache, "float" or "int8"; None: all of them.

    They are in the order of rising rows; each is for up to `most_rows` rows, None for any number.
    """
    classes = _table()["classes"]
    return tuple(entry for entry in classes if cache in (None, entry.get("cache", "float")))


def few_tokens() -> dict[str, dict[str, Any]]:
    """Returns, per cache, which `rows_per_tile` to try in order for batches of few tokens.

    The first is taken whose tiles, all together, read `most` tokens or fewer.
    """
    return _table()["few_tokens"]


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(files("pallas_kernels.hopper").joinpath("tuned.json").read_text())
