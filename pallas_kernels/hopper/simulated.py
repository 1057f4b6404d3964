"""The decode kernels as the hardware-abstraction layer simulates them: a config and a split plan.

It works on plans whose arrays are NumPy's, without a program of JAX.
"""

import dataclasses
from typing import Any

import numpy as np

from mla_jax.hal import Problem
from mla_jax.hal.simulator.hopper import HopperKernel, Merging
from mla_jax.hal.work import Work, split_plan_work
from mla_jax.splits.plan import SplitPlan
from pallas_kernels.hopper.config import (
    DecodeConfig,
    DecodeInt8Config,
    DecodeTransposedConfig,
    DecodeTransposedInt8Config,
    KernelConfig,
)
from pallas_kernels.hopper.kernels.decode_int8_refs import COMBINE_REGISTERS
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.parts.combine import Divisions, divide_into_columns, divide_into_rows
from pallas_kernels.hopper.work_items import BLOCK

FLOAT16, FLOAT32 = 2, 4  # bytes
WARPGROUPS = 2  # per CTA that combine


def kernel_of(tiles: KernelConfig, split: SplitPlan, problem: Problem, finish: str) -> HopperKernel:
    """Returns the kernel with these tiles, which runs a split plan of concrete arrays.

    finish: how split tiles are combined (`work_items.work_list`).

    Raises ValueError for tiles of a kernel that has no model.
    """
    work, kernel = split_plan_work(split, problem), sizes_of(tiles)
    backend, width = Backend(interpreting=True), tiles.kv_lora_rank
    warpgroups = kernel.computing if kernel.kernel == "decode_transposed_int8" else WARPGROUPS
    if kernel.kernel == "decode":
        divisions = divide_into_columns(backend, split, width, warpgroups)
    else:
        in_flight = COMBINE_REGISTERS if kernel.kernel == "decode_int8" else None
        divisions = divide_into_rows(
            backend, split, tiles.rows_per_tile, width, warpgroups, in_flight
        )
    return dataclasses.replace(
        kernel,
        work=dataclasses.replace(
            work,
            cores_per_item=tiles.ctas_per_tile,
            sharers=work.sharers * tiles.ctas_per_tile,  # of the same KV, 64 rows each
        ),
        kept=kept_items(split, finish)[: len(work.blocks)],
        merging={int(n): _merging(divisions, int(n), warpgroups) for n in np.unique(work.parts)},
    )


def sizes_of(tiles: KernelConfig) -> HopperKernel:
    """Returns the kernel with these tiles, without work."""
    none = np.zeros(0, int)
    fields: dict[str, Any] = {
        "work": Work(none, none, none, none, 0),
        "kept": none,
        "merging": {},
        "ctas_per_tile": tiles.ctas_per_tile,
        "in_pairs": tiles.in_pairs,
    }
    if isinstance(tiles, DecodeConfig):
        return HopperKernel("decode", rows_per_cta=BLOCK, partial_bytes=FLOAT16, **fields)
    if isinstance(tiles, DecodeTransposedConfig):
        return HopperKernel(
            "decode_transposed",
            rows_per_cta=tiles.rows_per_tile,
            partial_bytes=FLOAT32,
            kv_stages=tiles.kv_stages,
            q_stages=tiles.q_stages,
            **fields,
        )
    fields["partial_bytes"] = FLOAT32
    if isinstance(tiles, DecodeInt8Config):
        stages = (tiles.kv_stages,) * 3
        return HopperKernel("decode_int8", rows_per_cta=BLOCK, kv_stages=stages, **fields)
    if isinstance(tiles, DecodeTransposedInt8Config):
        return HopperKernel(
            "decode_transposed_int8",
            rows_per_cta=tiles.rows_per_tile,
            kv_stages=(tiles.kv_stages,) * 3,
            computing=tiles.computing,
            **fields,
        )
    raise ValueError(f"plan.tiles = {tiles!r:.60}, wanted the config of a Hopper kernel")


def kept_items(split: SplitPlan, finish: str) -> np.ndarray:
    """Returns [P] bool: which items of `work_items.work_list` keep their partial."""
    request, partial = np.asarray(split.request), np.asarray(split.partial)
    batch = split.num_tiles // split.num_row_tiles
    tile = np.asarray(split.row_tile) * batch + np.maximum(request, 0)
    starts = np.asarray(split.tile_partial_start)
    kept = np.zeros(len(request), bool)
    if finish == "merge" or split.fixed:
        return kept
    of_two = (request >= 0) & (starts[tile + 1] - starts[tile] == 2)
    if finish == "by_first":
        return of_two & (partial == starts[tile])
    at = np.append(np.asarray(split.worker_start), split.worker_start[-1])
    at = at[: 2 * (split.num_workers // 2 + split.num_workers % 2) + 1]
    begin, middle, end = at[:-1:2], at[1::2], at[2::2]
    left, right = np.maximum(middle - 1, 0), np.minimum(middle, len(kept) - 1)
    shared = (begin < middle) & (middle < end) & (tile[left] == tile[right]) & of_two[left]
    splits = np.append(0, np.cumsum(partial >= 0))
    shared &= splits[end] - splits[begin] == 2
    kept[np.concatenate([left[shared], right[shared]])] = True
    return kept


def _merging(divisions: Divisions, partials: int, warpgroups: int) -> Merging:
    """Returns how a tile of so many partials is combined."""
    division = divisions.usual if partials <= divisions.most else divisions.many
    return Merging(division.number, division.partials_at_once, warpgroups)
