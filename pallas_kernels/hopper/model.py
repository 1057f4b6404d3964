"""The decode kernels as the hardware-abstraction layer simulates them, with the plan they get.

    from pallas_kernels.hopper.model import simulated_kernel
    report = simulate(profile, problem, simulated_kernel(profile, problem))

docs/hopper_decode.md describes the kernels, and `mla_jax.hal.hopper_orders` has their schedules.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.hal import HardwareProfile, Problem
from mla_jax.hal.simulator.hopper import HopperKernel, Merging
from mla_jax.hal.work import split_plan_work
from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper.config import DecodeConfig, DecodeTransposedConfig
from pallas_kernels.hopper.mosaic.primitives import Backend
from pallas_kernels.hopper.parts.combine import Divisions, divide_into_columns, divide_into_rows
from pallas_kernels.hopper.planning import plan_decode, work_of
from pallas_kernels.hopper.work_items import BLOCK, PARTIAL

FLOAT16, FLOAT32 = 2, 4  # bytes
WARPGROUPS = 2  # per CTA that combine


def simulated_kernel(
    profile: HardwareProfile,
    problem: Problem,
    *,
    capacity: int | None = None,
    plan: DecodePlan | None = None,
) -> HopperKernel:
    """Returns the kernel that `attend` runs for a problem, with its plan.

    Args:
        profile: of a Hopper GPU.
        problem: over a cache of bf16 or fp16.
        capacity: tokens that block tables reach; None: those of the longest request.
        plan: with tiles; None: `plan_decode` makes it.

    Raises:
        ValueError: a problem that the model does not cover, such as one over an int8 cache.
    """
    if problem.kv_dtype not in ("bf16", "fp16"):
        raise ValueError(
            f"kv_dtype = {problem.kv_dtype!r}, wanted bf16 or fp16: there is no model of the "
            "Hopper kernels over an int8 cache"
        )
    if plan is None:
        plan = _plan(profile, problem, capacity or max(*problem.kv_lens, 1))
    tiles, split = plan.tiles, plan.split
    work, work_list = split_plan_work(split, problem), work_of(plan, plan.finish or "merge")
    kept = np.asarray(work_list.items)[: len(work.blocks), PARTIAL] < -1
    backend = Backend(interpreting=True)
    if isinstance(tiles, DecodeConfig):
        divisions = divide_into_columns(backend, split, tiles.kv_lora_rank, WARPGROUPS)
        name, rows = "decode", BLOCK
    elif isinstance(tiles, DecodeTransposedConfig):
        rows = tiles.rows_per_tile
        divisions = divide_into_rows(backend, split, rows, tiles.kv_lora_rank, WARPGROUPS)
        name = "decode_transposed"
    else:
        raise ValueError(f"plan.tiles = {tiles!r:.60}, wanted those of a kernel of 16-bit caches")
    return HopperKernel(
        kernel=name,
        work=dataclasses.replace(
            work,
            cores_per_item=tiles.ctas_per_tile,
            sharers=work.sharers * tiles.ctas_per_tile,  # of the same KV, 64 rows each
        ),
        kept=kept,
        rows_per_cta=rows,
        ctas_per_tile=tiles.ctas_per_tile,
        in_pairs=tiles.in_pairs,
        partial_bytes=FLOAT16 if name == "decode" else FLOAT32,
        merging={int(n): _merging(divisions, int(n)) for n in np.unique(work.parts)},
    )


def _plan(profile: HardwareProfile, problem: Problem, capacity: int) -> DecodePlan:
    lengths = np.asarray(problem.kv_lens, np.int32)
    with jax.default_device(jax.devices("cpu")[0]):
        make = functools.partial(plan_decode, rows=problem.rows, capacity=capacity, profile=profile)
        return jax.device_get(make(jnp.asarray(lengths)))


def _merging(divisions: Divisions, partials: int) -> Merging:
    """Returns how a tile of so many partials is combined."""
    division = divisions.usual if partials <= divisions.most else divisions.many
    return Merging(division.number, division.partials_at_once, WARPGROUPS)
