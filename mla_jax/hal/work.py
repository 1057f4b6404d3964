"""Who does what: requests cut into pieces for the cores, as each published kernel cuts them.

A piece is a stretch of KV blocks of one tile of query rows. Times of merging are counted from the
same plan, since it says how many parts each tile came in.
"""

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One attention call. `kv_lens` are tokens per request; rows of a request are s_q * heads."""

    kv_lens: tuple[int, ...]
    heads: int
    s_q: int = 1
    kv_dtype: str = "bf16"
    page_size: int = 64

    def __post_init__(self) -> None:
        for field in ("heads", "s_q", "page_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"Problem: {field} = {getattr(self, field)}, wanted at least 1")
        if not self.kv_lens or min(self.kv_lens) < 0:
            raise ValueError(f"Problem: kv_lens = {self.kv_lens}, wanted lengths of 0 and more")
        if self.kv_dtype not in ITEMSIZE:
            raise ValueError(
                f"Problem: kv_dtype = {self.kv_dtype!r}, wanted one of {set(ITEMSIZE)}"
            )

    @property
    def rows(self) -> int:
        return self.s_q * self.heads

    @property
    def batch(self) -> int:
        return len(self.kv_lens)

    @property
    def flops(self) -> float:
        """2 * rows * (576 + 512) for every token of KV."""
        return 2.0 * self.rows * sum(self.kv_lens) * (576 + 512)

    @property
    def token_bytes(self) -> float:
        """Bytes of one token of one layer's cache (int8: the 64 rope values stay bf16)."""
        return 512 + 128 if self.kv_dtype == "int8" else 576 * ITEMSIZE[self.kv_dtype]

    @property
    def query_bytes(self) -> float:
        """Bytes of q read and o written, bf16."""
        return 2.0 * self.batch * self.rows * (576 + 512)

    @property
    def bytes(self) -> float:
        """The KV read once, plus q and o."""
        return sum(self.kv_lens) * self.token_bytes + self.query_bytes


ITEMSIZE = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Work:
    """Pieces in the order they are handed out.

    blocks, rows: KV blocks and query rows of each piece; worker: the worker it belongs to, or -1
    where free workers take the next piece; tile: the row tile it is a part of. `sharers` row tiles
    read the same KV at about the same time. `cluster` cores run each piece together.
    """

    blocks: np.ndarray
    rows: np.ndarray
    worker: np.ndarray
    tile: np.ndarray
    num_workers: int
    sharers: int = 1
    cluster: int = 1
    limit: int = 0

    @property
    def parts(self) -> np.ndarray:
        """Parts of each tile; 1 where it was not cut."""
        return np.bincount(self.tile)

    @property
    def split(self) -> np.ndarray:
        """Does each piece write a partial result?"""
        return self.parts[self.tile] > 1


def _tiles(problem: Problem, tile_rows: int) -> list[int]:
    """Rows of each row tile of one request."""
    full, rest = divmod(problem.rows, tile_rows)
    return [tile_rows] * full + ([rest] if rest else [])


def whole_tiles(problem: Problem, *, tile_rows: int, block_kv: int, workers: int) -> Work:
    """No split: free workers take the next (request, row tile)."""
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
    """FlashMLA: workers / row tiles parts walk the blocks of all requests, each with a payload of
    ceil(sum(blocks + overhead) / parts) + overhead (csrc/smxx/decode/get_decoding_sched_meta)."""
    tiles = _tiles(problem, tile_rows)
    parts = max(workers // len(tiles), 1)
    blocks = [max(math.ceil(n / block_kv), 1) for n in problem.kv_lens]
    payload = math.ceil(sum(b + overhead for b in blocks) / parts) + overhead
    pieces: list[tuple[int, int, int]] = []
    request = done = 0
    for part in range(parts):
        left = payload
        while request < len(blocks):
            remaining = blocks[request] - done
            if left >= remaining + overhead:
                pieces.append((remaining, request, part))
                left -= remaining + overhead
                request, done = request + 1, 0
                continue
            if left > overhead:
                pieces.append((left - overhead, request, part))
                done += left - overhead
            break
    return _per_row_tile(pieces, tiles, parts)


def _per_row_tile(pieces: list[tuple[int, int, int]], tiles: list[int], parts: int) -> Work:
    """Every row tile has workers of its own that walk the same pieces."""
    size, request, part = (np.array(column) for column in zip(*pieces, strict=True))
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
    """The pieces of a `mla_jax.SplitPlan` (concrete arrays), for a kernel that executes it."""
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
    """FlashInfer: pieces of at most a common limit, each given to the least loaded cluster
    (include/flashinfer/attention/scheduler.cuh, MLAPlan). `steps_of` is what the limit is rounded
    to: 512 tokens in the first split-k version, 256 (and less for short work) later."""
    cluster = 2 if problem.rows > tile_rows else 1
    clusters = workers // cluster
    tiles = _tiles(problem, tile_rows * cluster)
    total = sum(problem.kv_lens) * len(tiles)
    average = max(math.ceil(total / clusters), 1)
    limit = _limit_512(average) if steps_of == 512 else _limit_256(average)
    heap = [(0.0, c) for c in range(clusters)]
    pieces: list[tuple[int, int, int, int]] = []
    for request, length in enumerate(problem.kv_lens):
        for t, rows in reversed(list(enumerate(tiles))):
            left = length
            while True:
                cost, c = heapq.heappop(heap)
                size = min(left, limit)
                heapq.heappush(heap, (cost + 2 * tile_rows * cluster + size, c))
                blocks = max(math.ceil(size / block_kv), 1)
                pieces.append((blocks, rows, c, request * len(tiles) + t))
                left -= size
                if left <= 0:
                    break
    blocks_, rows_, worker, tile = (np.array(column) for column in zip(*pieces, strict=True))
    return Work(blocks_, np.minimum(rows_, tile_rows), worker, tile, clusters,
                sharers=cluster * len(tiles), cluster=cluster, limit=limit)  # fmt: skip


def fixed_splits(
    problem: Problem, *, tile_rows: int, block_kv: int, workers: int, splits: int
) -> Work:
    """A grid of (request, row tile, split): every request is cut in the same number of parts,
    rounded up to whole blocks, and free workers take the next (SGLang's Triton decode)."""
    tiles = _tiles(problem, tile_rows)
    pieces: list[tuple[int, int, int]] = []
    for split in range(splits):
        for t, rows in enumerate(tiles):
            for request, length in enumerate(problem.kv_lens):
                part = math.ceil(math.ceil(length / splits) / block_kv) * block_kv
                size = min(part, length - part * split)
                if size > 0:
                    pieces.append((math.ceil(size / block_kv), rows, request * len(tiles) + t))
    blocks, rows_, tile = (np.array(column) for column in zip(*pieces, strict=True))
    return Work(blocks, rows_, np.full(len(blocks), -1), tile, workers, sharers=len(tiles))
