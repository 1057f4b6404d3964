"""Sizes of the Hopper kernels: what each keeps in shared memory, and what it refuses.

One function per kernel returns its sizes as a `TilePlan`, checked against a hardware profile:
shared memory to the byte, registers, and the shapes that the instructions take.
"""

from collections.abc import Sequence
from typing import Any

from mla_jax.hal import HardwareProfile, TilePlan, TilePlanError
from mla_jax.hal.tiling import WGMMA_ROWS, BufferUse, Tile
from pallas_kernels.hopper.work_items import BLOCK

ROW_GROUP = 8  # rows of a swizzled tile in shared memory, and the step of wgmma's n
MOST_COLUMNS = 32  # rows of the transposed kernels: each takes 4 registers per thread for O^T
MOST_COLUMNS_OF_TWO = 16  # where two warpgroups hold an O^T each, and hand half of it over
ALIGNMENT = 1024  # bytes that Mosaic GPU rounds every array in shared memory up to
BARRIER_BYTES = 8
ITEMSIZE = 2  # bfloat16 or float16
FLOAT32 = 4


def decode_tiles(
    profile: HardwareProfile,
    *,
    rows_per_tile: int,
    registers: Sequence[int] = (240, 24),
    split_overhead: int = 5,
    merge_overhead: int = 0,
    kv_lora_rank: int = 512,
    rope_dim: int = 64,
) -> TilePlan:
    """Returns sizes of `decode`: 64 rows per CTA and workers in pairs, or 128 rows per cluster.

    Two warpgroups compute, each with half of the latent columns, and one loads.

    Args:
        registers: per thread of the computing warpgroups and of the loader, as setmaxnreg takes.

    Raises:
        TilePlanError: what does not fit, or what the instructions can't do.
    """
    _check_widths(profile, kv_lora_rank, rope_dim)
    if rows_per_tile not in (WGMMA_ROWS, 2 * WGMMA_ROWS):
        raise refused(profile, "rows_per_tile", rows_per_tile, "64, or 128 (a cluster of two)")
    _check_setmaxnreg(profile, registers)
    rows, half = WGMMA_ROWS, kv_lora_rank // 2
    # fp32: its half of O, and S of a block; the rest of a thread is scales, addresses, P.
    needed = rows * (half + BLOCK) // 128 + 32
    if registers[0] < needed:
        raise refused(profile, "registers", registers[0], f">= {needed} where O and S are kept")
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
            BufferUse("shared", "work items", ALIGNMENT),
            BufferUse("shared", "row max and sum of the other CTA", ALIGNMENT, 2 * pairs),
            # q full and empty, l ready; full (in two ways) of the three kinds of slots, empty of
            # the halves, P ready (in two ways); of a pair: told of the other's maxima and sums,
            # sent its columns
            BufferUse("shared", "barriers", BARRIER_BYTES, 3 + 2 * (6 + 2 + 2) + 2 * pairs),
        ),
        capacity=_capacity(profile),
    )


def decode_transposed_tiles(
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
    """Returns sizes of `decode_transposed`: up to 32 rows, one warpgroup computes and one loads.

    pairs: whether workers are in pairs, which takes clusters of two.
    depths: stages of the left half of the latent, of its right half and of the rope columns.
    """
    _check_widths(profile, kv_lora_rank, rope_dim)
    _check_columns(profile, rows_per_tile, MOST_COLUMNS)
    if pairs and not can_be_in_pairs(rows_per_tile, kv_lora_rank):
        wanted = f"False for {rows_per_tile} rows and kv_lora_rank {kv_lora_rank}"
        raise refused(profile, "pairs", pairs, wanted)
    if len(depths) != 3 or min(depths) < 1:
        raise refused(profile, "depths", tuple(depths), "3 counts of stages, each >= 1")
    if q_buffers < 1:
        raise refused(profile, "q_buffers", q_buffers, ">= 1")
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
            BufferUse("shared", "invalid items", ALIGNMENT),
            BufferUse("shared", "row max and sum of the other CTA", ALIGNMENT, pairs),
            # full and empty; of a pair: told of the other's maxima and sums, sent its columns
            BufferUse(
                "shared", "barriers", BARRIER_BYTES, 2 * (q_buffers + sum(depths)) + 2 * pairs
            ),
        ),
        capacity=_capacity(profile),
    )


def decode_transposed_int8_tiles(
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
    """Returns sizes of `decode_transposed_int8`: up to 32 rows, or 16 if two warpgroups compute.

    computing: warpgroups, 1 or 2. depth: stages of KV blocks, a multiple of `computing`.
    registers: as in `decode_tiles`, where two compute; where one does, all that there are.
    """
    _check_int8_widths(profile, kv_lora_rank, rope_dim)
    if computing not in (1, 2):
        raise refused(profile, "computing", computing, "1 or 2 warpgroups")
    _check_columns(profile, rows_per_tile, MOST_COLUMNS if computing == 1 else MOST_COLUMNS_OF_TWO)
    if depth < 1 or depth % computing:
        raise refused(profile, "depth", depth, f"a multiple of computing = {computing}")
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
            BufferUse("shared", "partial O", handed, computing),
            BufferUse("shared", "its row max and sum", ALIGNMENT),
            BufferUse("shared", "invalid items", ALIGNMENT),
            # full and empty of the slots; two pieces known and done; q ready, handed over, taken
            BufferUse("shared", "barriers", BARRIER_BYTES, 2 * depth + 7),
        ),
        capacity=_capacity(profile),
    )


def decode_int8_tiles(
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
    """Returns sizes of `decode_int8`: 64 rows per CTA; two warpgroups make O, one P, one loads.

    Each that makes O owns half of the latent columns, as rows of O^T. depth: stages of KV blocks.
    registers: (of a warpgroup that makes O, of that which makes P, of the loading one), what
    setmaxnreg takes.
    """
    _check_int8_widths(profile, kv_lora_rank, rope_dim)
    if rows_per_tile != WGMMA_ROWS:
        raise refused(profile, "rows_per_tile", rows_per_tile, WGMMA_ROWS)
    if depth < 2:  # S of the next block is made before O takes P of this one
        raise refused(profile, "depth", depth, ">= 2")
    _check_setmaxnreg(profile, registers)
    rows, half = WGMMA_ROWS, kv_lora_rank // 2
    makers, scoring, loading = registers
    # fp32 half of O^T, V^T of half a group twice and addresses; S as two of int32 and one of fp32.
    for got, needed in ((makers, rows * half // 128 + 48), (scoring, 3 * rows * BLOCK // 128 + 40)):
        if got < needed:
            raise refused(profile, "registers", got, f">= {needed} where O^T or S are kept")
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
            BufferUse("shared", "work items", ALIGNMENT),
            # piece known and done, q there, row sums full and empty; slots full and empty, P ready
            BufferUse("shared", "barriers", BARRIER_BYTES, 5 + 3 * depth),
        ),
        capacity=_capacity(profile),
    )


def _check_widths(profile: HardwareProfile, kv_lora_rank: int, rope_dim: int) -> None:
    if kv_lora_rank % 128 or not 0 < kv_lora_rank <= 512:
        raise refused(profile, "kv_lora_rank", kv_lora_rank, "a multiple of 128 up to 512")
    if rope_dim % 64 or rope_dim <= 0:
        raise refused(profile, "rope_dim", rope_dim, "a multiple of 64")


def _check_int8_widths(profile: HardwareProfile, kv_lora_rank: int, rope_dim: int) -> None:
    """A warp dequantizes one swizzled tile of 128 columns. Other rope widths were never tried."""
    if kv_lora_rank != 512:
        raise refused(profile, "kv_lora_rank", kv_lora_rank, 512)
    if rope_dim != BLOCK:
        raise refused(profile, "rope_dim", rope_dim, BLOCK)


def _check_columns(profile: HardwareProfile, rows_per_tile: int, most: int) -> None:
    if rows_per_tile % ROW_GROUP or not 0 < rows_per_tile <= most:
        raise refused(profile, "rows_per_tile", rows_per_tile, f"a multiple of 8 up to {most}")


def can_be_in_pairs(rows_per_tile: int, kv_lora_rank: int) -> bool:
    """Whether half of a transposed tile is two parts of whole registers of a warpgroup.

    So the other CTA of the cluster receives it.
    """
    return rows_per_tile * kv_lora_rank // 2 % 1024 == 0


def _check_setmaxnreg(profile: HardwareProfile, registers: Sequence[int]) -> None:
    for count in registers:
        if count % 8 or not 24 <= count <= 256:
            raise refused(profile, "registers", count, "multiples of 8 in 24 .. 256 (setmaxnreg)")


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def refused(profile: HardwareProfile, name: str, got: Any, wanted: Any) -> TilePlanError:
    return TilePlanError(f"{profile.name}: {name} = {got!r}, wanted {wanted}")


def _capacity(profile: HardwareProfile) -> dict[str, int]:
    return {name: profile.bytes(f"buffer.{name}") for name in ("shared", "registers")}
