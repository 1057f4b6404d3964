"""Division of work: requests split into work items for the cores, as each published kernel does it.

A work item is a range of KV blocks of one tile of query rows. The time of merging follows from the
same plan, which says how many items each tile has.
"""

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_jax import checks


@dataclass(frozen=True)
class Problem:
    """One attention call: `kv_lens` tokens per request, s_q * heads query rows per request.

    kv_lens may also be a list or an [N] array of numpy; the field is a tuple of ints.

    Raises TypeError or ValueError that names the field.
    """

    kv_lens: tuple[int, ...]
    heads: int
    s_q: int = 1
    kv_dtype: str = "bf16"
    page_size: int = 64

    def __post_init__(self) -> None:
        for field in ("heads", "s_q", "page_size"):
            size = checks.require_positive(f"Problem: {field}", getattr(self, field))
            object.__setattr__(self, field, size)
        lengths = checks.require_ints("Problem: kv_lens", self.kv_lens, 0)
        checks.require_positive("Problem: the number of kv_lens", len(lengths))
        object.__setattr__(self, "kv_lens", lengths)
        checks.require_one_of("Problem: kv_dtype", self.kv_dtype, tuple(ITEMSIZE))

    @property
    def rows(self) -> int:
        """Query rows per request."""
        return self.s_q * self.heads

    @property
    def batch(self) -> int:
        """The number of requests."""
        return len(self.kv_lens)

    @property
    def flops(self) -> float:
        """Operations of the call: 2 * rows * (576 + 512) per token of KV."""
        return 2.0 * self.rows * sum(self.kv_lens) * (576 + 512)

    @property
    def token_bytes(self) -> float:
        """Bytes per token in one layer's cache; with int8 the 64 rope values stay bf16."""
        return 512 + 128 if self.kv_dtype == "int8" else 576 * ITEMSIZE[self.kv_dtype]

    @property
    def query_bytes(self) -> float:
        """Bytes of q read and of o written, in bf16."""
        return 2.0 * self.batch * self.rows * (576 + 512)

    @property
    def bytes(self) -> float:
        """Bytes of KV, read once, plus q and o."""
        return sum(self.kv_lens) * self.token_bytes + self.query_bytes


ITEMSIZE = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Work:
    """Work items in the order in which they are assigned.

    blocks, rows: KV blocks and query rows of each item.
    worker: the worker of each item, or -1 if free workers take the next item.
    tile: the row tile of each item.
    sharers: number of row tiles that read the same KV at about the same time.
    cores_per_item: number of cores that run an item together.
    limit: tokens per item at most, where the kernel has such a limit.
    """

    blocks: np.ndarray
    rows: np.ndarray
    worker: np.ndarray
    tile: np.ndarray
    num_workers: int
    sharers: int = 1
    cores_per_item: int = 1
    limit: int = 0

    @property
    def parts(self) -> np.ndarray:
        """Work items of each tile; 1 if it is not split."""
        return np.bincount(self.tile)

    @property
    def split(self) -> np.ndarray:
        """Whether each work item writes a partial."""
        return self.parts[self.tile] > 1


def _tiles(problem: Problem, tile_rows: int) -> list[int]:
    """Returns the rows of each row tile of one request."""
    full, rest = divmod(problem.rows, tile_rows)
    return [tile_rows] * full + ([rest] if rest else [])


def whole_tiles(problem: Problem, *, tile_rows: int, block_kv: int, workers: int) -> Work:
    """Returns work without splits: free workers take the next (request, row tile)."""
    tiles = _tiles(problem, tile_rows)
    blocks = np.repeat([max(math.ceil(n / block_kv), 1) for n in problem.kv_lens], len(tiles))
    return Work(
        blocks=blocks,
        rows=np.tile(tiles, problem.batch),
        worker=np.full(len(blocks), -1),
        tile=np.arange(len(blocks)),
        num_workers=workers,
        sharers=len(tiles),
    )


def walk_parts(
    problem: Problem, *, tile_rows: int, block_kv: int, workers: int, overhead: int = 5
) -> Work:
    """Returns FlashMLA's plan (csrc/smxx/decode/get_decoding_sched_meta).

    Each of workers / row tiles parts takes blocks of the requests in order, up to a payload of
    ceil(sum(blocks + overhead) / parts) + overhead.
    """
    tiles = _tiles(problem, tile_rows)
    parts = max(workers // len(tiles), 1)
    blocks = [max(math.ceil(n / block_kv), 1) for n in problem.kv_lens]
    payload = math.ceil(sum(b + overhead for b in blocks) / parts) + overhead
    items: list[tuple[int, int, int]] = []
    request = done = 0
    for part in range(parts):
        left = payload
        while request < len(blocks):
            remaining = blocks[request] - done
            if left >= remaining + overhead:
                items.append((remaining, request, part))
                left -= remaining + overhead
                request, done = request + 1, 0
                continue
            if left > overhead:
                items.append((left - overhead, request, part))
                done += left - overhead
            break
    return _per_row_tile(items, tiles, parts)


def _per_row_tile(items: list[tuple[int, int, int]], tiles: list[int], parts: int) -> Work:
    """Returns work in which each row tile has its own workers, with the same items."""
    size, request, part = (np.array(column) for column in zip(*items, strict=True))
    count = len(tiles)
    return Work(
        blocks=np.tile(size, count),
        rows=np.repeat(tiles, len(size)),
        worker=np.concatenate([part * count + t for t in range(count)]),
        tile=np.concatenate([request * count + t for t in range(count)]),
        num_workers=parts * count,
        sharers=count,
    )


def split_plan_work(plan: Any, problem: Problem) -> Work:
    """Returns the work items of a `SplitPlan` with concrete arrays, for a kernel that runs it."""
    request, start = np.asarray(plan.request), np.asarray(plan.worker_start)
    used = request >= 0
    row_tile = np.asarray(plan.row_tile)[used]
    worker = np.searchsorted(start, np.arange(len(request)), side="right") - 1
    return Work(
        blocks=np.maximum(np.asarray(plan.block_end) - np.asarray(plan.block_start), 1)[used],
        rows=np.minimum(plan.rows_per_tile, problem.rows - row_tile * plan.rows_per_tile),
        worker=worker[used],
        tile=plan.tile_of(request[used], row_tile),
        num_workers=plan.num_workers,
        sharers=plan.num_row_tiles,
    )


def _limit_256(tokens: int) -> int:
    for bound, limit in ((8, 32), (16, 64), (32, 128), (64, 192)):
        if tokens <= bound:
            return limit
    return math.ceil(tokens / 256) * 256


def _limit_512(tokens: int) -> int:
    return math.ceil(tokens / 512) * 512


def heap_parts(
    problem: Problem, *, tile_rows: int, block_kv: int, workers: int, steps_of: int
) -> Work:
    """Returns FlashInfer's plan (include/flashinfer/attention/scheduler.cuh, MLAPlan).

    Work items have at most a common number of tokens, and each goes to the least loaded cluster.
    steps_of: what the limit is rounded up to, 512 tokens in the first split-k version, later 256
    and less for short work.
    """
    cores = 2 if problem.rows > tile_rows else 1
    clusters = workers // cores
    tiles = _tiles(problem, tile_rows * cores)
    total = sum(problem.kv_lens) * len(tiles)
    average = max(math.ceil(total / clusters), 1)
    limit = _limit_512(average) if steps_of == 512 else _limit_256(average)
    heap = [(0.0, c) for c in range(clusters)]
    items: list[tuple[int, int, int, int]] = []
    for request, length in enumerate(problem.kv_lens):
        for t, rows in reversed(list(enumerate(tiles))):
            left = length
            while True:
                cost, c = heapq.heappop(heap)
                size = min(left, limit)
                heapq.heappush(heap, (cost + 2 * tile_rows * cores + size, c))
                blocks = max(math.ceil(size / block_kv), 1)
                items.append((blocks, rows, c, request * len(tiles) + t))
                left -= size
                if left <= 0:
                    break
    blocks_, rows_, worker, tile = (np.array(column) for column in zip(*items, strict=True))
    return Work(blocks_, np.minimum(rows_, tile_rows), worker, tile, clusters,
                sharers=cores * len(tiles), cores_per_item=cores, limit=limit)  # fmt: skip


def fixed_splits(
    problem: Problem, *, tile_rows: int, block_kv: int, workers: int, splits: int
) -> Work:
    """Returns the plan of SGLang's Triton decode, a grid of (request, row tile, split).

    Every request is split in the same number of parts, rounded up to whole blocks, and free workers
    take the next part.
    """
    tiles = _tiles(problem, tile_rows)
    lengths = np.array(problem.kv_lens)
    part = -(-lengths // (splits * block_kv)) * block_kv
    columns = []
    for split in range(splits):
        size = np.minimum(part, lengths - part * split)
        (request,) = np.nonzero(size > 0)
        blocks = -(-size[request] // block_kv)
        for t, rows in enumerate(tiles):
            columns.append((blocks, np.full(len(blocks), rows), request * len(tiles) + t))
    blocks, rows_, tile = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Work(blocks, rows_, np.full(len(blocks), -1), tile, workers, sharers=len(tiles))
