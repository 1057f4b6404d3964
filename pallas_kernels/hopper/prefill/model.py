"""The prefill kernel as the hardware-abstraction layer simulates it, with the work list it gets.

    from pallas_kernels.hopper.prefill.model import simulated_prefill
    report = simulate(profile, problem, simulated_prefill(profile, problem))

docs/hopper_prefill.md describes the kernel, and `mla_jax.hal.prefill_orders` has its schedule.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax.checks import require_one_of, require_type
from mla_jax.hal import HardwareProfile, Problem
from mla_jax.hal.simulator.hopper_prefill import HopperPrefill
from mla_jax.hal.work import Work
from pallas_kernels.hopper.config import ITEMSIZE
from pallas_kernels.hopper.prefill.config import TILE_ROWS, PrefillConfig, SmLimits
from pallas_kernels.hopper.prefill.work_items import Tile, place_of_item, work_list


def simulated_prefill(
    profile: HardwareProfile, problem: Problem, query_lens: Sequence[int] | None = None
) -> HopperPrefill:
    """Returns the kernel that `attend_ragged` runs with a causal mask, with its work list.

    Args:
        profile: of a Hopper GPU.
        problem: s_q query tokens per request, the last of its kv_lens keys, in bf16 or fp16 and the
            widths of DeepSeek-V3.
        query_lens: query tokens of each request, where they differ; s_q is the largest of them.

    Raises:
        TilePlanError: the kernel does not fit the device.
        TypeError: an argument of another type, such as the name of a profile.
        ValueError: a problem that the kernel does not take, such as more queries than keys.
    """
    require_type("profile", profile, HardwareProfile)
    require_type("problem", problem, Problem)
    require_one_of("kv_dtype", problem.kv_dtype, ("bf16", "fp16"))
    lens = tuple(query_lens or (problem.s_q,) * problem.batch)
    fits = len(lens) == problem.batch and all(
        1 <= n <= kv for n, kv in zip(lens, problem.kv_lens, strict=False)
    )
    if not fits:
        raise ValueError(
            f"query tokens = {lens!r:.60}, wanted from 1 to its kv_lens for each request"
        )
    config = PrefillConfig(limits=SmLimits.of(profile))
    with jax.default_device(jax.devices("cpu")[0]):
        cu_q_lens, cu_kv_lens = (
            jnp.asarray(np.cumsum([0, *each]), jnp.int32) for each in (lens, problem.kv_lens)
        )
        made = work_list(
            cu_q_lens,
            cu_kv_lens,
            sum(lens),
            sum(problem.kv_lens),
            causal=True,
            num_heads=problem.heads,
            bytes_per_key=(config.nope_dim + config.v_dim) * ITEMSIZE,
        )
        num_tiles, heads_at_once = np.asarray(made.counts).tolist()
        index = jnp.arange(num_tiles * problem.heads)
        tile, _ = map(np.asarray, place_of_item(index, num_tiles, problem.heads, heads_at_once))
    tiles = Tile(*np.asarray(made.tiles).T)
    blocks = np.asarray(tiles.num_blocks)
    # The rows of the first warpgroup end where the first half of the tile's last block does.
    trimmed = tiles.limit - (blocks - 1) * TILE_ROWS <= 0
    return HopperPrefill(
        work=Work(
            blocks[tile], np.asarray(tiles.num_rows)[tile], np.full(len(tile), -1),
            np.arange(len(tile)), profile.cores,
        ),
        trimmed=(trimmed & config.trims)[tile],
        query_lens=lens,
        kv_lens=problem.kv_lens,
        heads=problem.heads,
        stages=config.stages,
    )  # fmt: skip
