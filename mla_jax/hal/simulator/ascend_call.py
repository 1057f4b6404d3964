"""Divides a call over the cores of an Ascend die, times its work items, and merges partials.

A work item is a range of keys of one tile of query rows. Kernels with `splits` divide all keys of a
batch equally among the cores, in blocks of `block_kv`. So a long request gets several cores, each
of which writes a partial, and vector cores merge the partials (flash decoding). Others give a
request's tile to the next free core.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from mla_jax.hal.orders import ScheduleFn
from mla_jax.hal.profiles.profile import HardwareProfile
from mla_jax.hal.simulator import limits
from mla_jax.hal.simulator.ascend_costs import (
    AscendKernel,
    ascend_costs,
    job_rows,
    output_in_ub,
    port_bytes,
)
from mla_jax.hal.simulator.many_cores import makespan
from mla_jax.hal.simulator.one_core import BlockTimes, Costs, Timeline, run_schedule
from mla_jax.hal.tiling import FRACTAL, TilePlan, ascend_tiles
from mla_jax.hal.work import ITEMSIZE, Problem, Work


@dataclass(frozen=True)
class AscendCall:
    """A call on a die.

    tokens: [P] keys of each work item.
    cores: seconds until the last core is done, with its late start.
    merge: seconds of merging partials.
    timeline: of a number of KV blocks of the largest tile.
    flops, bytes: of the call.
    """

    work: Work
    tokens: np.ndarray
    cores: float
    merge: float
    timeline: Callable[[int], Timeline]
    flops: float
    bytes: float


def divide(
    profile: HardwareProfile, problem: Problem, kernel: AscendKernel, block_kv: int
) -> tuple[Work, np.ndarray]:
    """Returns the work items and the keys of each."""
    rows, end, tile = _row_tiles(problem, kernel)
    if kernel.splits and not kernel.expanded:
        return _split(rows, end, tile, block_kv, profile.cores, len(job_rows(kernel, problem.rows)))
    worker = np.full(len(rows), -1)
    if kernel.splits:
        worker = _balanced(rows * (end + block_kv / 4), profile.cores)
    sharers = 1 if kernel.expanded else len(job_rows(kernel, problem.rows))
    blocks = np.maximum(-(-end // block_kv), 1)
    return Work(blocks, rows, worker, tile, profile.cores, sharers), end


def _row_tiles(problem: Problem, kernel: AscendKernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of each tile, the keys that it reads, and its number."""
    lengths = np.array(problem.kv_lens)
    sizes = np.array(job_rows(kernel, problem.s_q if kernel.expanded else problem.rows))
    copies = problem.heads if kernel.expanded else 1
    rows = np.tile(sizes, problem.batch * copies)
    end = np.repeat(lengths, len(sizes) * copies)
    if kernel.expanded:  # the causal mask: a tile reads the keys up to its last token
        last = np.tile(np.cumsum(sizes), problem.batch * copies)
        end = np.maximum(end - problem.s_q + last, 0)
    return rows, end, np.arange(len(rows))


def _balanced(costs: np.ndarray, cores: int) -> np.ndarray:
    """Returns the core of each item: consecutive items, equal sums of costs."""
    middle = np.cumsum(costs) - costs / 2
    return np.minimum((middle * (min(cores, len(costs)) / costs.sum())).astype(int), cores - 1)


def _split(
    rows: np.ndarray, end: np.ndarray, tile: np.ndarray, block_kv: int, cores: int, sharers: int
) -> tuple[Work, np.ndarray]:
    """Returns work in which each core has equally many keys, cut between blocks."""
    blocks = np.maximum(-(-end // block_kv), 1)
    unit_tile = np.repeat(tile, blocks)
    index = np.arange(len(unit_tile)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    tokens = np.minimum(end[unit_tile] - index * block_kv, block_kv)
    core = _balanced(tokens + block_kv / 4, cores)
    starts = np.ones(len(core), bool)
    starts[1:] = (core[1:] != core[:-1]) | (unit_tile[1:] != unit_tile[:-1])
    first = np.flatnonzero(starts)
    keys = np.add.reduceat(tokens, first)
    count = np.diff(np.append(first, len(core)))
    owner = unit_tile[first]
    return Work(count, rows[owner], core[first], owner, cores, sharers), keys


def merge_seconds(profile: HardwareProfile, kernel: AscendKernel, work: Work) -> float:
    """Returns the seconds of merging: the cores meet, then read all partials once."""
    if not work.split.any():
        return 0.0
    partials = work.rows[work.split].sum() * kernel.widths[1] * 4.0
    cycles = partials / 4 / profile["core.vector_cores"] / profile["engine.vector_wide"]
    busy = partials / profile["engine.gm_read"] + cycles * profile.cycle
    return 3 * profile["latency.cross_core"] + busy / profile.cores


def _whole_fractals(keys: int) -> int:
    return max(-(-keys // FRACTAL) * FRACTAL, FRACTAL)


_ROUNDS = 12  # at most, of the search for the T of `_Times`


class _Times:
    """Seconds of a work item of some rows, by its keys, at some share of the memory.

    A cube core and its vector cores share the port through which they read. Each finds it free for
    the share of the time that the other leaves. A block takes the time T at which both agree: with
    c bytes for the cube core and v for the vector cores, they read at port - v / T and at
    port - c / T. The first block of a run finds the port free.
    """

    def __init__(
        self,
        block_kv: int,
        order: ScheduleFn,
        costs: Callable[[int, tuple[float, float]], Costs],
        reads: Callable[[int], tuple[float, float]],
        port: float,
        signal: float,
    ) -> None:
        self._block_kv, self._order, self._signal = block_kv, order, signal
        self._costs, self._reads, self._port = costs, reads, port
        self._runs: dict[int, tuple[BlockTimes, float, float]] = {}

    def __call__(self, keys: int) -> float:
        """Returns the seconds of whole blocks, and of a last one in proportion to its keys."""
        blocks, rest = divmod(keys, self._block_kv)
        if not blocks:
            return self._run(_whole_fractals(rest))[2]
        seconds = self._of_blocks(blocks)
        if rest:
            seconds += (self._of_blocks(blocks + 1) - seconds) * rest / self._block_kv
        return seconds

    def _of_blocks(self, blocks: int) -> float:
        times, _, first = self._run(self._block_kv)
        return times(blocks) - times(1) + first

    def next(self, keys: int) -> float:
        """Returns the seconds that an item adds to a core whose units never drain before it."""
        blocks, rest = divmod(keys, self._block_kv)
        seconds = blocks * self._run(self._block_kv)[1]
        if rest or not blocks:
            seconds += self._run(_whole_fractals(rest))[1]
        return seconds

    def fill(self, keys: int) -> float:
        """Returns the seconds by which a first block takes longer than one that follows others."""
        _, each, first = self._run(_whole_fractals(min(keys, self._block_kv)))
        return max(first - each, 0.0)

    def _run(self, keys: int) -> tuple[BlockTimes, float, float]:
        """Returns the times of blocks of so many keys, the seconds per block, and of the first."""
        if keys not in self._runs:
            first = BlockTimes(self._order, self._costs(keys, (self._port,) * 2), self._signal)(1)
            times, each = self._agree(keys)
            self._runs[keys] = times, each, first
        return self._runs[keys]

    def _agree(self, keys: int) -> tuple[BlockTimes, float]:
        """Returns the times of blocks and the T at which both agree, found by the secant method."""
        lowest = sum(self._reads(keys)) / self._port

        def at(each: float) -> tuple[BlockTimes, float]:
            costs = self._costs(keys, self._rates(keys, each))
            times = BlockTimes(self._order, costs, self._signal)
            return times, max((times(16) - times(8)) / 8, lowest)

        times, found = at(lowest)
        tried, off, each = lowest, found - lowest, found
        for _ in range(_ROUNDS):
            times, found = at(each)
            if abs(found - each) <= 1e-10 * each or found - each == off:
                break
            step = (found - each) * (each - tried) / (off - (found - each))
            tried, off, each = each, found - each, max(each + step, lowest)
        return times, found

    def _rates(self, keys: int, each: float) -> tuple[float, float]:
        """Returns what the cube core and the vector cores read per second, if a block takes T."""
        cube, vector = self._reads(keys)
        return self._port - vector / each, self._port - cube / each

    def timeline(self, num_blocks: int) -> Timeline:
        """Returns the timeline of whole blocks."""
        each = self._run(self._block_kv)[1]
        costs = self._costs(self._block_kv, self._rates(self._block_kv, each))
        return run_schedule(self._order(num_blocks), costs, self._signal)


def call_on_ascend(profile: HardwareProfile, problem: Problem, kernel: AscendKernel) -> AscendCall:
    """Simulates the work items of a call on all cores."""
    limits.require_ascend_dtype(problem, kernel)
    item = ITEMSIZE[kernel.kv_dtype]
    most = max(job_rows(kernel, problem.s_q if kernel.expanded else problem.rows))
    shape = Problem((512,), heads=most, kv_dtype=kernel.kv_dtype)
    tile = ascend_tiles(profile, shape, block_kv=kernel.block_kv, widths=kernel.widths)
    work, tokens = divide(profile, problem, kernel, tile.block_kv)
    order = limits.checked_order(kernel.order, limits.require_whole_on_ascend)
    longest = int(work.blocks.max())
    workers = len(np.unique(work.worker)) if work.worker[0] >= 0 else len(work.blocks)
    active = min(workers, profile.cores)
    workspace = kernel.order.workspace_bytes(longest, most, tile.block_kv, item)
    limits.require_memory(profile, problem, workspace * active)
    flops, moved, cached = _totals(problem, kernel, work, tokens)
    # PV finds its values in L2 if they are still there after the QK of all blocks ahead of it.
    key_bytes = sum(kernel.widths) * item if kernel.expanded else problem.token_bytes
    in_flight = kernel.order.slots(longest)["P"] * tile.block_kv * key_bytes
    kept = active * in_flight <= profile["buffer.l2"]
    resident = kernel.replayed and cached <= profile["buffer.l2"]
    if kernel.expanded and problem.s_q > most:  # the tiles of a head follow each other on a core
        head = max(problem.kv_lens) * key_bytes
        resident = resident or active * head <= profile["buffer.l2"]
    sharers = work.sharers if kept else 1
    memory = profile["memory.hbm_bandwidth"] * profile["memory.hbm_efficiency"]
    share = min(memory * min(sharers, active), profile["memory.l2_bandwidth"]) / active

    # Cores that are still busy when others are done get no faster if all read from L2 anyway.
    fast = share >= profile["engine.gm_to_l1"] * profile["engine.dma_scale"]
    steady = fast or (resident and kept)

    @cache
    def tiles(keys: int) -> TilePlan:
        return ascend_tiles(profile, shape, block_kv=keys, widths=kernel.widths)

    @cache
    def times(rows: int, alone: bool) -> _Times:
        def costs(keys: int, port: tuple[float, float]) -> Costs:
            return ascend_costs(
                profile, kernel, tiles(keys), rows, math.inf if alone else share,
                values_in_l2=resident if kernel.expanded else kept, keys_in_l2=resident, port=port,
            )  # fmt: skip

        in_ub = output_in_ub(tile, kernel, rows, profile["core.vector_cores"])
        return _Times(
            tile.block_kv, order, costs, partial(port_bytes, kernel, rows, in_ub=in_ub),
            profile["engine.gm_read"], profile["latency.cross_core"],
        )  # fmt: skip

    first = _first_of_stream(problem, kernel, work) if kernel.splits else np.ones(len(tokens), int)
    code = (work.rows * (int(tokens.max()) + 1) + tokens) * 2 + first
    _, example, which = np.unique(code, return_index=True, return_inverse=True)
    seconds = np.empty((2, len(example)))
    for i, at in enumerate(example.tolist()):
        rows, keys, starts = int(work.rows[at]), int(tokens[at]), int(first[at])
        query = rows * kernel.widths[0] * item / profile["engine.gm_to_l1"]
        pair = []
        for one in (times(rows, False), times(rows, True))[: 1 if steady else 2]:
            if kernel.splits:
                pair.append(one.next(keys) + starts * one.fill(keys) + query)
            else:
                pair.append(one(keys) + query)
        seconds[:, i] = pair[0], min(pair)
    crowded, alone = seconds[:, which.reshape(-1)]
    cores = makespan(crowded, alone, work.worker, work.num_workers)
    start = profile["latency.core_start"] * active
    merge = merge_seconds(profile, kernel, work)
    shown = times(most, False).timeline
    return AscendCall(work, tokens, float(start + cores), float(merge), shown, flops, moved)


def _first_of_stream(problem: Problem, kernel: AscendKernel, work: Work) -> np.ndarray:
    """Returns 1 for the items before which a core's units have drained, else 0.

    The absorbed form goes on to the next request without a pause. The expanded form drains after
    each head of a request.
    """
    stream = work.worker
    if kernel.expanded:
        tiles = len(job_rows(kernel, problem.s_q))
        stream = stream * (problem.batch * problem.heads) + work.tile // tiles
    return np.concatenate([[1], (stream[1:] != stream[:-1]).astype(int)])


def _totals(
    problem: Problem, kernel: AscendKernel, work: Work, tokens: np.ndarray
) -> tuple[float, float, float]:
    """Returns operations, bytes of memory traffic, and bytes of keys and values."""
    if not kernel.expanded:
        cached = sum(problem.kv_lens) * problem.token_bytes
        return problem.flops, problem.bytes, cached
    width, item = sum(kernel.widths), ITEMSIZE[kernel.kv_dtype]
    masked = problem.s_q * (problem.s_q - 1) / 2
    pairs = sum(max(n * problem.s_q - masked, 0.0) for n in problem.kv_lens)
    cached = float(sum(problem.kv_lens)) * problem.heads * width * item
    queries = problem.batch * problem.rows * width * item
    return 2.0 * width * pairs * problem.heads, cached + queries, cached
