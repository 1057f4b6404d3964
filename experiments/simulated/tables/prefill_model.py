"""The time of a causal prefill kernel, MHA of 192 and 128 columns, from a profile.

A work item is a tile of query tokens of one head. A core multiplies it by the blocks of keys that
its tokens see, and free cores take the next item, the longest first. Nothing here is fitted.
"""

import numpy as np

from mla_jax.hal import HardwareProfile
from mla_jax.hal.prefill_orders import two_consumers
from mla_jax.hal.simulator.hopper_prefill import BLOCK, KEY, VALUE, PrefillStages, prefill_costs
from mla_jax.hal.simulator.many_cores import makespan
from mla_jax.hal.simulator.one_core import BlockTimes


def blocks_of(s_q: int, kv_len: int) -> np.ndarray:
    """Returns the key blocks of each query tile of one head, the longest first."""
    last = np.minimum(np.arange(BLOCK, s_q + BLOCK, BLOCK), s_q)
    return -(-(kv_len - s_q + last) // BLOCK)[::-1]


def gpu_prefill(
    profile: HardwareProfile, batch: int, heads: int, s_q: int, kv_len: int, fp8: bool = False
) -> float:
    """Returns the seconds of a call on a GPU, with the kernel that prepares its operands.

    Before, q and k are rotated and the cache is appended: q's and k's rope columns are read and
    written. fp8: all operands are converted to fp8 there, and multiplied at that rate.
    """
    item, barrier = 1 if fp8 else 2, profile["latency.barrier"]
    costs = prefill_costs(profile, PrefillStages(item=item, softmax=barrier, store=barrier))
    times = BlockTimes(two_consumers, costs, barrier)
    blocks = np.repeat(blocks_of(s_q, kv_len), batch * heads)
    seconds = np.array([times(n) for n in blocks.tolist()])
    cores = makespan(seconds, seconds, np.full(len(seconds), -1), profile.cores)
    rotated = 64 * batch * heads * (s_q + kv_len)
    values = batch * heads * (s_q * KEY + kv_len * (KEY + VALUE))
    prepared = values * 3 if fp8 else rotated * 4  # bytes read and written
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    before = profile["latency.second_launch"] + prepared / memory
    moved = values * item + batch * heads * s_q * VALUE * 2
    return profile["latency.launch"] + before + max(cores, moved / memory)


def prefill_seconds(
    profile: HardwareProfile, batch: int, heads: int, s_q: int, kv_len: int, dtype: str = "bf16"
) -> float:
    """Returns the seconds of a call; s_q new tokens of kv_len in all, of each of batch requests."""
    if not 1 <= s_q <= kv_len:
        raise ValueError(f"s_q = {s_q}, wanted at least 1 and at most kv_len = {kv_len}")
    if profile.family != "nvidia":
        raise ValueError(f"device = {profile.name}, wanted a GPU for a prefill kernel of GPUs")
    return gpu_prefill(profile, batch, heads, s_q, kv_len, dtype == "fp8")
