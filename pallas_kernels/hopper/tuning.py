"""Tile sizes of the Hopper kernels: what each keeps in shared memory, and which suits a problem.

`choose_tile_plan` looks a problem up in `tuned.json` (an entry for each class of query rows, from
`python -m experiments.speed.tune_hopper`) and returns a `TilePlan` that was checked against the
profile: shared memory to the byte, registers, and the shapes that the instructions take.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from mla_jax.checks import require_one_of
from mla_jax.hal import HardwareProfile, TilePlan, TilePlanError, load_profile
from mla_jax.hal.tiling import WGMMA_ROWS, BufferUse, Tile
from pallas_kernels.hopper.work_items import BLOCK

ROW_GROUP = 8  # rows of a swizzled tile in shared memory, and the step of wgmma's n
MOST_COLUMNS = 32  # rows of the transposed kernels: O^T takes 4 registers a thread for each
MOST_COLUMNS_OF_TWO = 16  # where two warpgroups hold an O^T each, and hand half of it over
ALIGNMENT = 1024  # bytes that Mosaic GPU rounds every array in shared memory up to
BARRIER_BYTES = 8
ITEMSIZE = 2  # bfloat16 or float16
FLOAT32 = 4


def seesaw_tiles(
    profile: HardwareProfile,
    *,
    rows_per_tile: int,
    registers: Sequence[int] = (240, 24),
    split_overhead: int = 5,
    merge_overhead: int = 0,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """Of `decode`: 64 rows a CTA, workers in pairs, or 128 a cluster of two.

    Two warpgroups compute, each with half of the latent columns, one loads. registers: (of the
    computing warpgroups, of the loading one), what setmaxnreg takes. Raises TilePlanError for what
    does not fit or what the instructions can't do.
    """
    _check_widths(profile, kv_lora_rank, rope_dim)
    if rows_per_tile not in (WGMMA_ROWS, 2 * WGMMA_ROWS):
        raise _refused(profile, "rows_per_tile", rows_per_tile, "64, or 128 (a cluster of two)")
    _check_setmaxnreg(profile, registers)
    rows, half = WGMMA_ROWS, kv_lora_rank // 2
    # fp32: its half of O, and S of a block; the rest of a thread is scales, addresses, P.
    needed = rows * (half + BLOCK) // 128 + 32
    if registers[0] < needed:
        raise _refused(profile, "registers", registers[0], f">= {needed} where O and S are kept")
    cluster = rows_per_tile // rows
    pairs = cluster == 1
    return TilePlan(
        profile=profile.name,
        block_q=rows,
        block_kv=BLOCK,
        kv_stages=2,
        cluster=cluster,
        pairs=pairs,
        num_workers=profile.cores // cluster,
        split_overhead=split_overhead,
        merge_overhead=merge_overhead,
        registers=(registers[0], registers[0], registers[1]),
        tiles=(
            Tile("shared", "QK", rows, kv_lora_rank + rope_dim, BLOCK),
            Tile("registers", "PV", rows, BLOCK, half),
        ),
        uses=(
            BufferUse("shared", "q left", rows * half * ITEMSIZE),
            BufferUse("shared", "q right", rows * half * ITEMSIZE),
            BufferUse("shared", "q rope", rows * rope_dim * ITEMSIZE),
            BufferUse("shared", "kv left", BLOCK * half * ITEMSIZE, 2),
            BufferUse("shared", "kv right", BLOCK * half * ITEMSIZE, 2),
            BufferUse("shared", "kv rope / P", BLOCK * max(rope_dim, BLOCK) * ITEMSIZE, 2),
            BufferUse("shared", "row max", ALIGNMENT),
            BufferUse("shared", "row sum", ALIGNMENT),
            BufferUse("shared", "piece record", ALIGNMENT),
            BufferUse("shared", "row max and sum of the peer", ALIGNMENT, 2 * pairs),
            # q full and empty, l ready; full (in two ways) of the three kinds of slots, empty of
            # the halves, P ready (in two ways); of a pair: told of the other's maxima and sums,
            # sent its columns
            BufferUse("shared", "barriers", BARRIER_BYTES, 3 + 2 * (6 + 2 + 2) + 2 * pairs),
        ),
        capacity=_capacity(profile),
    )


def transposed_tiles(
    profile: HardwareProfile,
    *,
    rows_per_tile: int,
    pairs: bool = False,
    depths: Sequence[int] = (2, 2, 2),
    q_buffers: int = 2,
    split_overhead: int = 2,
    merge_overhead: int = 0,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """Of `decode_transposed`: up to 32 rows are columns of S^T; one warpgroup computes, one loads.

    pairs: whether workers are in pairs, which takes clusters of two.
    depths: slots of the left half of the latent, of its right half and of the rope columns.
    """
    _check_widths(profile, kv_lora_rank, rope_dim)
    _check_columns(profile, rows_per_tile, MOST_COLUMNS)
    if pairs and not _can_be_in_pairs(rows_per_tile, kv_lora_rank):
        wanted = f"False for {rows_per_tile} rows and kv_lora_rank {kv_lora_rank}"
        raise _refused(profile, "pairs", pairs, wanted)
    if len(depths) != 3 or min(depths) < 1:
        raise _refused(profile, "depths", tuple(depths), "3 counts of slots, each >= 1")
    if q_buffers < 1:
        raise _refused(profile, "q_buffers", q_buffers, ">= 1")
    rows, half = rows_per_tile, kv_lora_rank // 2
    left, right, rope = depths
    return TilePlan(
        profile=profile.name,
        block_q=rows,
        block_kv=BLOCK,
        kv_stages=min(depths),
        pairs=pairs,
        num_workers=profile.cores,
        split_overhead=split_overhead,
        merge_overhead=merge_overhead,
        registers=(255, 255),
        tiles=(
            Tile("shared", "QK", BLOCK, kv_lora_rank + rope_dim, rows),
            Tile("registers", "PV", kv_lora_rank, BLOCK, rows),
        ),
        uses=(
            BufferUse("shared", "q", rows * (kv_lora_rank + rope_dim) * ITEMSIZE, q_buffers),
            BufferUse("shared", "kv left", BLOCK * half * ITEMSIZE, left),
            BufferUse("shared", "kv right", BLOCK * half * ITEMSIZE, right),
            BufferUse("shared", "kv rope", BLOCK * rope_dim * ITEMSIZE, rope),
            BufferUse("shared", "P", rows * BLOCK * ITEMSIZE),
            BufferUse("shared", "row max", ALIGNMENT),
            BufferUse("shared", "row sum", ALIGNMENT),
            BufferUse("shared", "lost pages", ALIGNMENT),
            BufferUse("shared", "row max and sum of the peer", ALIGNMENT, pairs),
            # full and empty; of a pair: told of the other's maxima and sums, sent its columns
            BufferUse(
                "shared", "barriers", BARRIER_BYTES, 2 * (q_buffers + sum(depths)) + 2 * pairs
            ),
        ),
        capacity=_capacity(profile),
    )


def transposed_int8_tiles(
    profile: HardwareProfile,
    *,
    rows_per_tile: int,
    computing: int = 2,
    depth: int = 4,
    registers: Sequence[int] = (232, 40),
    split_overhead: int = 2,
    merge_overhead: int = 0,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """Of `decode_transposed_int8`: up to 32 rows, or 16 if two warpgroups compute; one loads.

    computing: warpgroups, 1 or 2. depth: slots of a block, a multiple of `computing`. registers: as
    in `seesaw_tiles`, where two compute; one computing thread can have as many as there are.
    """
    _check_int8_widths(profile, kv_lora_rank, rope_dim)
    if computing not in (1, 2):
        raise _refused(profile, "computing", computing, "1 or 2 warpgroups")
    _check_columns(profile, rows_per_tile, MOST_COLUMNS if computing == 1 else MOST_COLUMNS_OF_TWO)
    if depth < 1 or depth % computing:
        raise _refused(profile, "depth", depth, f"a multiple of computing = {computing}")
    _check_setmaxnreg(profile, registers)
    rows, half = rows_per_tile, kv_lora_rank // 2
    handed = FLOAT32 * half * (rows if computing == 2 else 1)
    return TilePlan(
        profile=profile.name,
        block_q=rows,
        block_kv=BLOCK,
        kv_stages=depth,
        num_workers=profile.cores,
        split_overhead=split_overhead,
        merge_overhead=merge_overhead,
        registers=(255, 255) if computing == 1 else (registers[0], registers[0], registers[1]),
        tiles=(
            Tile("shared", "QK", BLOCK, kv_lora_rank + rope_dim, rows),
            Tile("registers", "PV", kv_lora_rank, BLOCK, rows),
        ),
        uses=(
            BufferUse("shared", "q latent", rows * kv_lora_rank, 2),
            BufferUse("shared", "q rope", rows * rope_dim * ITEMSIZE),
            BufferUse("shared", "q steps", ALIGNMENT),
            BufferUse("shared", "kv latent", BLOCK * kv_lora_rank, depth),
            BufferUse("shared", "kv rope", BLOCK * rope_dim * ITEMSIZE, depth),
            BufferUse("shared", "token scales", _aligned(depth * BLOCK * FLOAT32)),
            BufferUse("shared", "P", rows * BLOCK * ITEMSIZE, computing),
            BufferUse("shared", "row max", ALIGNMENT),
            BufferUse("shared", "row sum", ALIGNMENT),
            BufferUse("shared", "handed over", handed, computing),
            BufferUse("shared", "its max and sum", ALIGNMENT),
            BufferUse("shared", "lost pages", ALIGNMENT),
            # full and empty of the slots; two pieces known and done; q ready, handed over, taken
            BufferUse("shared", "barriers", BARRIER_BYTES, 2 * depth + 7),
        ),
        capacity=_capacity(profile),
    )


def roles_int8_tiles(
    profile: HardwareProfile,
    *,
    rows_per_tile: int,
    depth: int = 3,
    registers: Sequence[int] = (176, 136, 24),
    split_overhead: int = 5,
    merge_overhead: int = 0,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """Of `decode_int8`: 64 rows a CTA; two warpgroups make O, one P, one loads.

    Each that makes O owns half of the latent columns, as rows of O^T. depth: slots of a block.
    registers: (of a warpgroup that makes O, of that which makes P, of the loading one), what
    setmaxnreg takes.
    """
    _check_int8_widths(profile, kv_lora_rank, rope_dim)
    if rows_per_tile != WGMMA_ROWS:
        raise _refused(profile, "rows_per_tile", rows_per_tile, WGMMA_ROWS)
    if depth < 2:  # S of the next block is made before O takes P of this one
        raise _refused(profile, "depth", depth, ">= 2")
    _check_setmaxnreg(profile, registers)
    rows, half = WGMMA_ROWS, kv_lora_rank // 2
    makers, scoring, loading = registers
    # fp32 half of O^T, V^T of half a group twice and addresses; S as two of int32 and one of fp32.
    for got, needed in ((makers, rows * half // 128 + 48), (scoring, 3 * rows * BLOCK // 128 + 40)):
        if got < needed:
            raise _refused(profile, "registers", got, f">= {needed} where O^T or S are kept")
    return TilePlan(
        profile=profile.name,
        block_q=rows,
        block_kv=BLOCK,
        kv_stages=depth,
        num_workers=profile.cores,
        split_overhead=split_overhead,
        merge_overhead=merge_overhead,
        registers=(makers, makers, scoring, loading),
        tiles=(
            Tile("shared", "QK", BLOCK, kv_lora_rank + rope_dim, rows),
            Tile("registers", "PV", half, BLOCK, rows),
        ),
        uses=(
            BufferUse("shared", "q latent", rows * kv_lora_rank, 2),
            BufferUse("shared", "q rope", rows * rope_dim * ITEMSIZE),
            BufferUse("shared", "q steps", ALIGNMENT),
            BufferUse("shared", "keys of queries", ALIGNMENT),
            BufferUse("shared", "kv latent", BLOCK * kv_lora_rank, depth),
            BufferUse("shared", "kv rope", BLOCK * rope_dim * ITEMSIZE, depth),
            BufferUse("shared", "P", rows * BLOCK * ITEMSIZE, depth),
            BufferUse("shared", "token scales", _aligned(depth * BLOCK * FLOAT32)),
            BufferUse("shared", "row max", ALIGNMENT),
            BufferUse("shared", "row max of each warp", ALIGNMENT),
            BufferUse("shared", "rescaling factors", _aligned(depth * rows * FLOAT32)),
            BufferUse("shared", "whether to rescale", ALIGNMENT),
            BufferUse("shared", "1 / row sum", ALIGNMENT),
            BufferUse("shared", "where O belongs", ALIGNMENT),
            BufferUse("shared", "piece record", ALIGNMENT),
            # piece known and done, q there, row sums full and empty; slots full and empty, P ready
            BufferUse("shared", "barriers", BARRIER_BYTES, 5 + 3 * depth),
        ),
        capacity=_capacity(profile),
    )


KERNELS: dict[str, Callable[..., TilePlan]] = {
    "transposed": transposed_tiles,
    "seesaw": seesaw_tiles,
    "transposed_int8": transposed_int8_tiles,
    "roles_int8": roles_int8_tiles,
}


def choose_tile_plan(
    rows: int,
    *,
    batch: int | None = None,
    capacity: int | None = None,
    cache: str = "float",
    rescale: str = "multiply",
    profile: HardwareProfile | None = None,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """The tuned plan for `rows` query rows a request (tokens * heads).

    batch: requests, and capacity: the most tokens of one, where they are known. So few tokens that
    no SM has much to do get low tiles: the cache is read once for each, but there are fewer pieces
    to merge, of fewer rows. And by the number of tiles workers are in pairs (`plan_of`).
    cache: "float" (16 bits) or "int8". rescale: "exponent_add" is AMLA's, which only the seesaw
    kernel has. profile: None for an H200; num_workers is of that profile.

    Raises ValueError for another cache, or one that no kernel takes with this rescale.
    """
    require_one_of("cache", cache, tuple(few_tokens()))

    def of_height(height: int) -> TilePlan:
        return tile_plan_of_height(
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
        if rescale == "multiply" or entry["kernel"] == "seesaw":
            return of_height(entry["rows_per_tile"])
    raise ValueError(f"{cache} cache, rescale = {rescale!r}, {rows} rows: not in tuned.json")


def tile_plan_of_height(
    rows_per_tile: int,
    *,
    num_tiles: int | None = None,
    cache: str = "float",
    profile: HardwareProfile | None = None,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """The tuned plan whose tiles have so many rows: for a split plan that says them."""
    widths = {"kv_lora_rank": kv_lora_rank, "rope_dim": rope_dim}
    for entry in tuned(cache):
        if entry["rows_per_tile"] == rows_per_tile:
            return plan_of(entry, profile, num_tiles=num_tiles, **widths)
    heights = ", ".join(map(str, tile_heights(cache)))
    raise ValueError(f"rows_per_tile must be one of {heights}, got {rows_per_tile}")


def tile_heights(cache: str = "float", *, rescale: str = "multiply") -> tuple[int, ...]:
    """The rows_per_tile of split plans that the kernels take."""
    return tuple(
        entry["rows_per_tile"]
        for entry in tuned(cache)
        if rescale == "multiply" or entry["kernel"] == "seesaw"
    )


def plan_of(
    entry: Mapping[str, Any],
    profile: HardwareProfile | None = None,
    *,
    num_tiles: int | None = None,
    **widths: Any,
) -> TilePlan:
    """The checked plan of one entry of the table.

    num_tiles: of all requests, where it is known. The transposed kernel has its workers in pairs if
    more than half of the pairs get a tile and none gets two: fewer tiles are cut in more pieces
    than two, and with more of them a cluster costs a launch more than it spares the merge.
    """
    profile = profile or load_profile("H200_SXM")
    if entry["kernel"] not in KERNELS:
        raise _refused(profile, "kernel", entry["kernel"], " or ".join(KERNELS))
    sizes = {k: v for k, v in entry.items() if k not in ("cache", "most_rows", "kernel", "timed")}
    if entry["kernel"] == "transposed" and num_tiles is not None:
        a_tile_each = profile.cores // 4 < num_tiles <= profile.cores // 2
        latent = widths.get("kv_lora_rank", 512)
        sizes["pairs"] = a_tile_each and _can_be_in_pairs(entry["rows_per_tile"], latent)
    return KERNELS[entry["kernel"]](profile, **sizes, **widths)


@functools.cache
def tuned(cache: str | None = None) -> tuple[dict[str, Any], ...]:
    """The entries of tuned.json for a cache, "float" or "int8" (None: all of them).

    By rising rows: each for up to `most_rows` rows (None: any). Those of int8 caches say so.
    """
    classes = _table()["classes"]
    return tuple(entry for entry in classes if cache in (None, entry.get("cache", "float")))


def few_tokens() -> dict[str, dict[str, Any]]:
    """For each cache: the first of `rows_per_tile` whose tiles read `most` tokens or fewer."""
    return _table()["few_tokens"]


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(files("pallas_kernels.hopper").joinpath("tuned.json").read_text())


def _check_widths(profile: HardwareProfile, kv_lora_rank: int, rope_dim: int) -> None:
    if kv_lora_rank % 128 or not 0 < kv_lora_rank <= 512:
        raise _refused(profile, "kv_lora_rank", kv_lora_rank, "a multiple of 128 up to 512")
    if rope_dim % 64 or rope_dim <= 0:
        raise _refused(profile, "rope_dim", rope_dim, "a multiple of 64")


def _check_int8_widths(profile: HardwareProfile, kv_lora_rank: int, rope_dim: int) -> None:
    """A warp widens one swizzled tile of 128 columns. Other rope keys were never tried."""
    if kv_lora_rank != 512:
        raise _refused(profile, "kv_lora_rank", kv_lora_rank, 512)
    if rope_dim != BLOCK:
        raise _refused(profile, "rope_dim", rope_dim, BLOCK)


def _check_columns(profile: HardwareProfile, rows_per_tile: int, most: int) -> None:
    if rows_per_tile % ROW_GROUP or not 0 < rows_per_tile <= most:
        raise _refused(profile, "rows_per_tile", rows_per_tile, f"a multiple of 8 up to {most}")


def _can_be_in_pairs(rows_per_tile: int, kv_lora_rank: int) -> bool:
    """Half of a transposed tile goes to the peer in two parts of whole registers of a warpgroup."""
    return rows_per_tile * kv_lora_rank // 2 % 1024 == 0


def _check_setmaxnreg(profile: HardwareProfile, registers: Sequence[int]) -> None:
    for count in registers:
        if count % 8 or not 24 <= count <= 256:
            raise _refused(profile, "registers", count, "multiples of 8 in 24 .. 256 (setmaxnreg)")


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _refused(profile: HardwareProfile, name: str, got: Any, wanted: Any) -> TilePlanError:
    return TilePlanError(f"{profile.name}: {name} = {got!r}, wanted {wanted}")


def _capacity(profile: HardwareProfile) -> dict[str, int]:
    return {name: profile.bytes(f"buffer.{name}") for name in ("shared", "registers")}
