"""The time of a causal prefill kernel, MHA of 192 and 128 columns, from a profile.

A work item is a tile of query tokens of one head. A core multiplies it by the blocks of keys that
its tokens see, and free cores take the next item, the longest first. Nothing here is fitted.
"""

import functools

import numpy as np

from mla_jax.hal import Access, HardwareProfile, Schedule, ScheduleBuilder, Step
from mla_jax.hal.simulator.many_cores import makespan
from mla_jax.hal.simulator.one_core import BlockTimes, StageCost

KEY, VALUE = 192, 128  # columns of q and k, and of v
TILE = 128  # query tokens, and keys, of a tile; a warpgroup has half of the query tokens
SOFTMAX_OPS = 8  # as in the decode kernels of `mla_jax.hal`


@functools.lru_cache(maxsize=256)
def two_consumers(num_blocks: int) -> Schedule:
    """Returns the order of FlashAttention-3: a producer, and two consumers that take turns.

    Each consumer issues QK of its next block before PV of this one, so that its softmax runs while
    the tensor cores work for the other or for PV.
    """
    build = ScheduleBuilder("prefill", num_blocks, 2,
                            {"q": 1, "k": 2, "v": 2, "S0": 2, "S1": 2, "P0": 2, "P1": 2, "O0": 1,
                             "O1": 1})  # fmt: skip
    q = Access("q", 0, -1)
    build.add("load", "LOAD_Q", -1, writes=(q,))
    for block in range(num_blocks + 1):
        if block < num_blocks:
            build.add("load", "LOAD_K", block, writes=(build.slot("k", block),))
            build.add("load", "LOAD_V", block, writes=(build.slot("v", block),))
        for w in "01":
            if block < num_blocks:
                build.add(f"mma{w}", f"QK_{w}", block, reads=(q, build.slot("k", block)),
                          writes=(build.slot(f"S{w}", block),))  # fmt: skip
                build.add(f"wg{w}", f"SM_{w}", block, reads=(build.slot(f"S{w}", block),),
                          writes=(build.slot(f"P{w}", block),))  # fmt: skip
            if block:
                before = (Access(f"O{w}", 0, block - 2),) if block > 1 else ()
                reads = (build.slot(f"P{w}", block - 1), build.slot("v", block - 1), *before)
                build.add(f"mma{w}", f"PV_{w}", block - 1, reads=reads,
                          writes=(Access(f"O{w}", 0, block - 1),))  # fmt: skip
    for w in "01":
        build.add(
            f"wg{w}", f"STORE_{w}", num_blocks - 1, reads=(Access(f"O{w}", 0, num_blocks - 1),)
        )
    return build.build()


def blocks_of(s_q: int, kv_len: int) -> np.ndarray:
    """Returns the key blocks of each query tile of one head, the longest first."""
    last = np.minimum(np.arange(TILE, s_q + TILE, TILE), s_q)
    return -(-(kv_len - s_q + last) // TILE)[::-1]


def gpu_prefill(
    profile: HardwareProfile, batch: int, heads: int, s_q: int, kv_len: int, fp8: bool = False
) -> float:
    """Returns the seconds of a call on a GPU, with the kernel that prepares its operands.

    Before, q and k are rotated and the cache is appended: q's and k's rope columns are read and
    written. fp8: all operands are converted to fp8 there, and multiplied at that rate.
    """
    cycle, item = profile.cycle, 1 if fp8 else 2
    rate = profile["engine.tensor_int8" if fp8 else "engine.tensor_bf16"]
    flop = cycle / (rate * profile["engine.tensor_efficiency"])
    shared = cycle / (profile["engine.shared_pipe"] * profile["engine.shared_efficiency"])
    cuda = cycle / (profile["engine.cuda"] * profile["engine.cuda_efficiency"])
    share = min(profile["engine.copy"], profile["memory.l2_bandwidth"] / profile.cores)
    store = min(profile["engine.store"], profile["memory.l2_bandwidth"] / profile.cores)
    half, barrier = TILE // 2, profile["latency.barrier"]

    def load(columns: int) -> StageCost:
        return StageCost({"copy": TILE * columns * item / share}, latency=profile["latency.memory"])

    def costs(step: Step) -> StageCost:
        match step.stage[:2], step.stage:
            case _, "LOAD_Q" | "LOAD_K":
                return load(KEY)
            case _, "LOAD_V":
                return load(VALUE)
            case "QK", _:
                return StageCost({"tensor": 2.0 * half * TILE * KEY * flop,
                                  "shared": (half + TILE) * KEY * item * shared})  # fmt: skip
            case "SM", _:
                ops = half * TILE * SOFTMAX_OPS + half * VALUE
                exponentials = half * TILE * cycle / profile["engine.sfu"]
                return StageCost({"cuda": ops * cuda, "sfu": exponentials}, hold=barrier)
            case "PV", _:  # P is in registers
                return StageCost({"tensor": 2.0 * half * TILE * VALUE * flop,
                                  "shared": TILE * VALUE * item * shared})  # fmt: skip
        return StageCost({"copy": half * VALUE * 2 / store}, hold=barrier)

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
