"""An engine that serves a model: continuous batching over one paged cache.

A step of the engine runs at most one prefill step and one decode step on the device:

- Prefill: the next chunks of up to `prefill_rows` prompts, each of at most `chunk` tokens. The
  last chunk of a prompt gives its first new token.
- Decode: every request whose prompt is done gets its last token and up to `drafts` guesses of the
  next ones, in one row. The model says what comes after each of them. Guesses are kept up to the
  first that is not what the model says; the rest leave the cache by `truncate`. Results are those
  of one token at a time, as in multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Both steps have static shapes, so that each is traced once. Requests enter and leave between steps.
Full pages of tokens are committed to the allocator's prefix cache, and a request that begins with
the same tokens starts with these pages. If the pool is full, the youngest request gives its pages
back and starts over later; the tokens that it has are then part of its prompt.
"""

import collections
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.generate.model import ModelConfig, ModelParams, forward, logits_of, next_tokens
from experiments.generate.requests import Drafter, Request, lookup_drafter
from experiments.generate.sharded import on_mesh
from mla_jax import OutOfPagesError, PageAllocator, PagedKVCache, plan_decode
from mla_jax.problem import AttentionProblem
from mla_jax.registry import available_implementations

TRACES: collections.Counter[tuple[Any, ...]] = collections.Counter()  # by step and shapes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of an engine."""

    slots: int = 8  # requests that run at a time
    drafts: int = 1  # guesses per request and decode step
    prefill_rows: int = 2  # requests in a prefill step
    chunk: int = 16  # tokens per request in a prefill step
    max_tokens: int = 128  # of a request, prompt and new ones
    num_pages: int = 64
    page_size: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "drafts" else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name} must be an integer from {least} on, got {value!r}")

    @property
    def max_pages(self) -> int:
        return -(-self.max_tokens // self.page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of a step. A row without a request has lengths of 0."""

    tokens: Any  # [B, S] int32
    block_tables: Any  # [B, max_pages] int32
    seq_lens: Any  # [B] int32, with the tokens of this step
    query_lens: Any  # [B] int32, tokens of this step
    temperatures: Any  # [B] float32
    top_ps: Any  # [B] float32
    seeds: Any  # [B] uint32


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="pool")
def prefill_step(
    params: ModelParams,
    config: ModelConfig,
    pool: PagedKVCache,
    batch: Batch,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, jax.Array, PagedKVCache]:
    """Computes chunks of prompts.

    Returns the token after each row's last, [B], the hidden state that it is chosen from,
    [B, hidden], and the pool.
    """
    TRACES["prefill", config, batch.tokens.shape, batch.block_tables.shape, pool.num_pages] += 1

    def step(params: ModelParams, pool: PagedKVCache, batch: Batch, axis: str | None) -> Any:
        tables = batch.block_tables, batch.seq_lens, batch.query_lens
        hidden, pool = forward(params, config, batch.tokens, pool, *tables, axis=axis)
        last = jnp.maximum(batch.query_lens - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        logits = logits_of(params, config, hidden)
        sampling = batch.temperatures, batch.top_ps, batch.seeds
        return next_tokens(logits, *sampling, batch.seq_lens), hidden, pool

    return on_mesh(mesh, step, params, config, pool, batch)


@functools.partial(jax.jit, static_argnames=("config", "with_plan", "mesh"), donate_argnames="pool")
def decode_step(
    params: ModelParams,
    config: ModelConfig,
    pool: PagedKVCache,
    batch: Batch,
    with_plan: bool,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Decodes tokens and drafts; returns the token after each of them, [B, S], and the pool."""
    TRACES["decode", config, batch.tokens.shape, batch.block_tables.shape, pool.num_pages] += 1
    rows, width = batch.tokens.shape

    def step(params: ModelParams, pool: PagedKVCache, batch: Batch, axis: str | None) -> Any:
        heads = config.attention.num_heads // (1 if mesh is None else mesh.size)
        plan = decode_plan(pool, batch, heads) if with_plan else None
        tables = batch.block_tables, batch.seq_lens, batch.query_lens
        hidden, pool = forward(params, config, batch.tokens, pool, *tables, plan=plan, axis=axis)
        logits = logits_of(params, config, hidden.reshape(rows * width, -1))
        sampling = [jnp.repeat(x, width) for x in (batch.temperatures, batch.top_ps, batch.seeds)]
        first = batch.seq_lens - batch.query_lens + 1  # position of the token after a row's first
        positions = (first[:, None] + jnp.arange(width)).reshape(-1)
        chosen = next_tokens(logits, sampling[0], sampling[1], sampling[2], positions)
        return chosen.reshape(rows, width), pool

    return on_mesh(mesh, step, params, config, pool, batch)


def decode_plan(pool: PagedKVCache, batch: Batch, num_heads: int) -> Any:
    """Returns one plan for the attention of all layers of a decode step, with heads of a device."""
    return plan_decode(
        batch.seq_lens,
        cache=pool,
        num_heads=num_heads,
        num_query_tokens=batch.tokens.shape[1],
        max_seq_len=batch.block_tables.shape[1] * pool.page_size,
        query_lens=batch.query_lens,
    )


@dataclasses.dataclass(eq=False)
class _Running:
    """A request, its tokens so far, and how many of them are in the cache."""

    request: Request
    arrival: int
    tokens: np.ndarray  # [most tokens] int32, of which `count` are known
    count: int
    done: int = 0
    has_pages: bool = False

    @property
    def known(self) -> np.ndarray:
        return self.tokens[: self.count]

    @property
    def left(self) -> int:
        """Tokens that are known and not in the cache. Decoding needs exactly 1."""
        return self.count - self.done

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.request.prompt) : self.count].tolist()

    def take(self, tokens: Iterable[int]) -> bool:
        """Appends new tokens up to the request's last one; returns whether that was reached."""
        for token in tokens:
            self.tokens[self.count] = token
            self.count += 1
            if token in self.request.stop_tokens or self.count == len(self.tokens):
                return True
        return False


class Engine:
    """The running and waiting requests, their pages, and the cache of all layers.

    `finished` has the new tokens of each request that has ended. `counts` counts events.
    """

    def __init__(
        self,
        params: ModelParams,
        config: ModelConfig,
        sizes: Sizes,
        drafter: Drafter = lookup_drafter,
        pool: PagedKVCache | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Makes an engine without requests; it takes over the memory of `pool` if there is one.

        mesh: over which `params` are split, by `sharded.placed`.
        """
        self.mesh = mesh
        self.params, self.config, self.sizes, self.drafter = params, config, sizes, drafter
        self.pool = new_pool(params, config, sizes, mesh) if pool is None else pool
        self.allocator = PageAllocator(sizes.num_pages, sizes.page_size)
        self.slots: list[_Running | None] = [None] * sizes.slots
        self.waiting: collections.deque[_Running] = collections.deque()
        self.finished: dict[Hashable, list[int]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.with_plan = hopper_runs(config, self.pool, sizes, 1 if mesh is None else mesh.size)
        self._ids: set[Hashable] = set()

    def submit(self, request: Request) -> None:
        """Adds a request to the queue. Raises ValueError if it is not valid or can never run."""
        room = min(self.sizes.max_tokens, self.sizes.num_pages * self.sizes.page_size)
        request.check(self.config.vocab_size, room)
        if request.id in self._ids:
            raise ValueError(f"id must be a new one, got {request.id!r}")
        self._ids.add(request.id)
        tokens = np.zeros(len(request.prompt) + request.max_new_tokens, np.int32)
        tokens[: len(request.prompt)] = request.prompt
        self.waiting.append(_Running(request, len(self._ids), tokens, len(request.prompt)))

    def run(self, requests: Iterable[Request] = ()) -> dict[Hashable, list[int]]:
        """Submits requests, steps until all have ended, and returns `finished`."""
        for request in requests:
            self.submit(request)
        while self.is_busy:
            self.step()
        return self.finished

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting) or any(self.slots)

    def step(self) -> None:
        """Fills free slots, then runs a prefill step and a decode step, if a request needs them."""
        for slot, running in enumerate(self.slots):
            if running is None and self.waiting:
                self.slots[slot] = self.waiting.popleft()
        self._prefill()
        self._decode()

    def _prefill(self) -> None:
        rows: list[tuple[_Running, np.ndarray]] = []
        is_full = False  # then younger requests do not start either, but those that run go on
        for running in self._by_arrival():
            if len(rows) == self.sizes.prefill_rows:
                break
            if not running.has_pages:  # not before now: others may have committed its prefix
                is_full = is_full or not self._has_room(running)
                if is_full:
                    continue
                running.done = self.allocator.allocate(running.request.id, 0, running.known)
                running.has_pages = True
                self.counts["tokens from the prefix cache"] += running.done
            if running.left > 1:
                count = min(running.left, self.sizes.chunk)
                if self._reserve(running, running.done + count):
                    rows.append((running, running.tokens[running.done : running.done + count]))
        if not rows:
            return
        batch = self._batch(rows, self.sizes.prefill_rows, self.sizes.chunk)
        chosen, _, self.pool = prefill_step(self.params, self.config, self.pool, batch, self.mesh)
        self.counts["prefill steps"] += 1
        for (running, tokens), token in zip(rows, np.asarray(chosen), strict=False):
            self.counts["prefilled tokens"] += len(tokens)
            running.done += len(tokens)
            self._commit(running, [int(token)] if running.left == 0 else [])

    def _decode(self) -> None:
        rows = []
        for running in self._by_arrival():
            if running.has_pages and running.left == 1:
                most = min(self.sizes.drafts, len(running.tokens) - running.count - 1)
                drafts = list(self.drafter(running.known, most))[:most] if most > 0 else []
                if self._reserve(running, running.count + len(drafts)):
                    rows.append((running, np.array([running.known[-1], *drafts], np.int32)))
        if not rows:
            return
        batch = self._batch(rows, self.sizes.slots, 1 + self.sizes.drafts)
        chosen, self.pool = decode_step(
            self.params, self.config, self.pool, batch, self.with_plan, self.mesh
        )
        self.counts["decode steps"] += 1
        for (running, tokens), row in zip(rows, np.asarray(chosen), strict=False):
            guessed = tokens[1:]
            is_wrong = guessed != row[: len(guessed)]
            kept = int(is_wrong.argmax()) if is_wrong.any() else len(guessed)
            self.counts["drafts"] += len(guessed)
            self.counts["drafts kept"] += kept
            self.counts["decoded tokens"] += kept + 1
            running.done += 1 + kept
            self.allocator.truncate(running.request.id, running.done)
            self._commit(running, row[: kept + 1].tolist())

    def _commit(self, running: _Running, new: Sequence[int]) -> None:
        """Lets other requests share the full pages; takes new tokens, which may be the last."""
        self.allocator.commit(running.request.id, running.tokens[: running.done])
        if running.take(new):
            self.finished[running.request.id] = running.new_tokens
            self._release(running)

    def _reserve(self, running: _Running, count: int) -> bool:
        """Gives a request pages for `count` tokens; returns False if it was preempted itself.

        No page that another request has is written to, because shared pages are full ones and a
        request writes after them. Therefore `take_copies` has nothing to copy.
        """
        while True:
            try:
                self.allocator.extend(running.request.id, count)
                return True
            except OutOfPagesError:
                youngest = [r for r in self._by_arrival() if r.has_pages][-1]
                self._release(youngest)
                youngest.done, youngest.has_pages = 0, False
                self.waiting.appendleft(youngest)
                self.counts["preempted"] += 1
                if youngest is running:
                    return False

    def _has_room(self, running: _Running) -> bool:
        """Whether a request can start: the pages that are free now have room for its prompt."""
        others = any(r is not None and r.has_pages for r in self.slots)
        return not others or self.allocator.num_free * self.sizes.page_size > running.left

    def _release(self, running: _Running) -> None:
        self.allocator.free(running.request.id)
        self.slots[self.slots.index(running)] = None

    def _by_arrival(self) -> list[_Running]:
        return sorted((r for r in self.slots if r is not None), key=lambda r: r.arrival)

    def _batch(self, rows: Sequence[tuple[_Running, np.ndarray]], height: int, width: int) -> Batch:
        """Returns new arrays for rows of (request, its tokens of this step)."""
        tokens = np.zeros((height, width), np.int32)
        lengths, counts = np.zeros((2, height), np.int32)
        tables = np.full((height, self.sizes.max_pages), -1, np.int32)
        temperatures, top_ps = np.zeros((2, height), np.float32)
        seeds = np.zeros(height, np.uint32)
        ids = [running.request.id for running, _ in rows]
        tables[: len(rows)] = self.allocator.block_tables(ids, self.sizes.max_pages)
        for i, (running, new) in enumerate(rows):
            tokens[i, : len(new)], counts[i] = new, len(new)
            lengths[i] = running.done + len(new)
            temperatures[i], top_ps[i] = running.request.temperature, running.request.top_p
            seeds[i] = running.request.seed
        return Batch(tokens, tables, lengths, counts, temperatures, top_ps, seeds)


def new_pool(
    params: ModelParams,
    config: ModelConfig,
    sizes: Sizes,
    mesh: jax.sharding.Mesh | None = None,
) -> PagedKVCache:
    """Returns an empty cache of all layers, in the dtype of the model; whole on each device."""
    pool = PagedKVCache.create(
        sizes.num_pages,
        page_size=sizes.page_size,
        kv_lora_rank=config.attention.kv_lora_rank,
        rope_dim=config.attention.qk_rope_head_dim,
        dtype=params.embedding.dtype,
        num_layers=config.num_layers,
    )
    if mesh is None:
        return pool
    return jax.device_put(pool, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def hopper_runs(config: ModelConfig, pool: PagedKVCache, sizes: Sizes, devices: int) -> bool:
    """Whether the Hopper kernels take the decode step here, so that a plan helps."""
    if jax.default_backend() != "gpu":
        return False
    heads = config.attention.num_heads // devices
    shape = (sizes.slots, 1 + sizes.drafts, heads, config.attention.latent_dim)
    lengths = jnp.zeros(sizes.slots, jnp.int32)
    problem = AttentionProblem(
        q=jnp.zeros(shape, pool.dtype),
        cache=pool.layer(0),
        block_tables=jnp.zeros((sizes.slots, sizes.max_pages), jnp.int32),
        seq_lens=lengths,
        query_lens=lengths,
        plan=None,
        softmax_scale=config.attention.softmax_scale,
        causal=True,
        rescale="multiply",
        partial_dtype=None,
    )
    return available_implementations(problem)["hopper"] is None
