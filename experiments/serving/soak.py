"""Simulates a small server with an almost full cache, and checks every step.

Requests arrive, are prefilled in chunks, decode one or two tokens per step, fork, finish and are
cancelled. Some begin with tokens that are in the cache already. Some steps decode drafts, which are
then rejected. If a page is needed and none is free, a request is evicted and starts over. The
attention of each step is compared with the float64 reference, which has its own contiguous copy of
every request's latents. In each step, rows that hold no token are filled with NaN, and unused
entries of block tables with random numbers.
"""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework.console import show_table, track
from experiments.framework.errors import LSE_BOUND, OUTPUT_BOUND, lse_error, relative_error
from experiments.framework.experiment import InputError, Outcome, Output, reading
from experiments.framework.implementations import require_runs
from experiments.framework.options import flag, seed_flag
from experiments.serving.soak_requests import Arrivals, Request
from mla_jax.allocator import OutOfPagesError, PageAllocator
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.problem import AttentionProblem
from mla_jax.reference.attention import attention_float64
from mla_jax.registry import IMPLEMENTATIONS, check_names, choose
from mla_jax.sharding.target import Target

SUMMARY = "a small server on a nearly full cache: shared pages, eviction; every step checked"


@dataclasses.dataclass(frozen=True)
class Options:
    steps: int = flag(3000, "steps of the server", lower_bound=1)
    seed: int = seed_flag("of everything that is random")
    pages: int = flag(48, "in the cache", lower_bound=1)
    page_size: int = flag(16, "tokens per page", choices=PAGE_SIZES)
    layout: str = flag("ND", "of the pages", choices=LAYOUTS)
    dtype: str = flag("float32", "of queries and cache", choices=tuple(OUTPUT_BOUND))
    slots: int = flag(8, "requests that run at a time", lower_bound=1)
    chunk: int = flag(8, "tokens per request in a prefill step", lower_bound=2)
    max_tokens: int = flag(320, "tokens per request", lower_bound=1)
    heads: int = flag(4, "query heads", lower_bound=1)
    kv_lora_rank: int = flag(128, "width of V", lower_bound=1)
    rope_dim: int = flag(32, "width of the rope part", lower_bound=1)
    implementation: str | None = flag(
        None, "of the attention; by default the best here", choices=tuple(IMPLEMENTATIONS)
    )


def run(options: Options, output: Output) -> Outcome:
    if options.max_tokens > options.pages * options.page_size:
        raise InputError(
            f"--max_tokens must fit in the cache of {options.pages} pages of {options.page_size}, "
            f"got {options.max_tokens}"
        )
    require_runs(options.implementation)
    with reading("layout"):
        server = Server(options)
    require_runs(options.implementation, server.problem())
    problem = server.problem()
    choice = choose(check_names(options.implementation), problem)
    name = choice.on(Target.here(problem), problem).name
    for step in track(range(options.steps), "steps"):
        server.step(step)
    server.shut_down()

    counts = dict(server.counts)
    show_table("What happened", [{"event": k, "times": v} for k, v in counts.items()])
    for failure in server.failures[:10]:
        show_table("Failure", [failure])
    return Outcome(
        passed=not server.failures,
        summary=(
            f"{options.steps} steps with {name}, {counts['tokens']} tokens, "
            f"{counts['evicted']} requests and {counts['evicted_pages']} cached pages evicted, "
            f"{counts['forked']} forks, {counts['rejected']} drafts rejected, "
            f"{counts['cached_tokens']} tokens from the prefix cache, "
            f"{np.mean(server.occupancy):.0%} of the pages in use "
            f"on average: {len(server.failures)} failures, largest error "
            f"{server.largest_error:.1e}."
        ),
        rows=server.failures,
        headline={
            "steps": options.steps,
            "implementation": name,
            "failures": len(server.failures),
            "counts": counts,
            "largest_error": server.largest_error,
            "mean_occupancy": float(np.mean(server.occupancy)),
            "peak_occupancy": float(np.max(server.occupancy)),
            "traces": server.traces,
        },
    )


class Server:
    """The cache, its allocator, and the running and waiting requests; collects `failures`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rng = np.random.default_rng(options.seed)
        self.allocator = PageAllocator(options.pages, options.page_size)
        cache = PagedKVCache.create(
            options.pages,
            page_size=options.page_size,
            kv_lora_rank=options.kv_lora_rank,
            rope_dim=options.rope_dim,
            dtype=options.dtype,
            layout=options.layout,
        )
        self.cache = dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))
        self.max_pages = -(-options.max_tokens // options.page_size)
        self.slots: list[Request | None] = [None] * options.slots
        self.waiting: collections.deque[Request] = collections.deque()
        self.arrivals = Arrivals(self.rng, options.max_tokens, cache.latent_dim, self._dtype)
        self.counts = collections.Counter(
            arrived=0,
            forked=0,
            prefix_hits=0,
            cached_tokens=0,
            finished=0,
            cancelled=0,
            evicted=0,
            evicted_pages=0,
            copied_pages=0,
            rejected=0,
            tokens=0,
            steps_without_room=0,
        )
        self.failures: list[dict[str, Any]] = []
        self.occupancy: list[float] = []
        self.largest_error = 0.0
        self.traces = 0
        self._attend = jax.jit(self._attend_traced, donate_argnums=0)

    def problem(self) -> AttentionProblem:
        """Returns the attention problem of every step, in shapes and dtypes."""
        o = self.options
        q = jnp.zeros((o.slots, o.chunk, o.heads, o.kv_lora_rank + o.rope_dim), self._dtype)
        counts = jnp.zeros(o.slots, jnp.int32)
        return AttentionProblem(
            q=q,
            cache=self.cache,
            block_tables=jnp.zeros((o.slots, self.max_pages), jnp.int32),
            seq_lens=counts,
            query_lens=counts,
            plan=None,
            softmax_scale=self._scale,
            causal=True,
            rescale="multiply",
            partial_dtype=None,
        )

    def step(self, step: int) -> None:
        """Runs one step: requests arrive and leave, caches grow, attention runs and is checked."""
        self._fork()
        self._arrive()
        self._cancel()
        self._grow()
        self._compute(step)
        self._keep_accepted()
        self._finish()
        self._check_pages(step)

    def shut_down(self) -> None:
        """Frees all requests and checks that every page is free."""
        for request in self._running():
            self.allocator.free(request.id)
        if self.allocator.num_free != self.allocator.num_pages:
            lost = self.allocator.num_pages - self.allocator.num_free
            self._fail(self.options.steps, f"{lost} pages lost at the end")

    def _fork(self) -> None:
        """Forks a random running request now and then, if a slot is free."""
        parents = [r for r in self._running() if 0 < r.done < self.options.max_tokens]
        has_room = len(self.waiting) < 8 and None in self.slots
        if parents and has_room and self.rng.random() < 0.35:
            parent = parents[self.rng.integers(len(parents))]
            child = self.arrivals.fork(parent)
            self.allocator.fork(parent.id, child.id)
            self.slots[self.slots.index(None)] = child
            self.counts["forked"] += 1

    def _arrive(self) -> None:
        """Adds new requests to the queue, and moves requests from the queue to free slots."""
        if len(self.waiting) < 4 and self.rng.random() < 0.5:
            self.waiting.append(self.arrivals.request())
            self.counts["arrived"] += 1
        for slot, request in enumerate(self.slots):
            if request is None and self.waiting:
                newcomer = self.waiting.popleft()
                newcomer.done = self.allocator.allocate(newcomer.id, 0, newcomer.tokens)
                self.slots[slot] = newcomer
                self.counts["prefix_hits"] += newcomer.done > 0
                self.counts["cached_tokens"] += newcomer.done

    def _cancel(self) -> None:
        """Cancels a random running request now and then."""
        if self.rng.random() < 0.03 and (running := self._running()):
            self._release(running[self.rng.integers(len(running))])
            self.counts["cancelled"] += 1

    def _grow(self) -> None:
        """Chooses the next tokens of every request and allocates pages for them."""
        cached = len(self.allocator.cached_pages)
        for request in self._running():
            self._choose_tokens(request)
        for request in self._running():
            total = request.done + request.new + len(request.drafts)
            while request in self.slots:  # until it has pages, or is itself evicted
                try:
                    self.allocator.extend(request.id, total)
                    break
                except OutOfPagesError:
                    self._evict()
        self.counts["evicted_pages"] += cached - len(self.allocator.cached_pages)

    def _choose_tokens(self, request: Request) -> None:
        """Chooses a chunk of the prompt, or one or two tokens and up to two drafts, or none."""
        prefill = request.prompt - request.done
        most = min(prefill, self.options.chunk) if prefill > 0 else int(self.rng.integers(1, 3))
        most = min(most, len(request.latents) - request.done)
        request.new = 0 if self.rng.random() < 0.1 else most
        room = min(self.options.chunk, self.options.max_tokens - request.done) - request.new
        drafts = min(int(self.rng.integers(0, 3)), room) if prefill <= 0 and request.new else 0
        request.drafts = self.arrivals.latents(drafts)

    def _evict(self) -> None:
        """Moves a random running request to the end of the queue, where it starts over."""
        running = [request for request in self._running() if self.allocator.pages(request.id)]
        victim = running[self.rng.integers(len(running))]
        self._release(victim)
        victim.done = 0
        self.waiting.append(victim)
        self.counts["evicted"] += 1

    def _compute(self, step: int) -> None:
        """Appends the new latents, computes attention, and compares it with the reference."""
        o = self.options
        sources, targets = self.allocator.take_copies(o.slots)
        self.counts["copied_pages"] += int((targets >= 0).sum())
        live = self._live_rows()
        q = self.rng.normal(size=(o.slots, o.chunk, o.heads, o.kv_lora_rank + o.rope_dim))
        queries = q.astype(self._dtype)
        latents = np.zeros((o.slots, o.chunk, o.kv_lora_rank + o.rope_dim), self._dtype)
        tables = self.rng.integers(-(2**31), 2**31, (o.slots, self.max_pages)).astype(np.int32)
        lengths, counts = np.zeros((2, o.slots), np.int32)
        for slot, request in enumerate(self.slots):
            if request is not None:
                pages = self.allocator.pages(request.id)
                tables[slot, : len(pages)] = pages
                keys = request.keys()
                counts[slot], lengths[slot] = len(keys) - request.done, len(keys)
                latents[slot, : counts[slot]] = keys[request.done :]
        got, lse, self.cache = self._attend(
            self.cache, queries, latents, tables, lengths, counts, (sources, targets), live
        )
        got, lse = np.asarray(got), np.asarray(lse)
        self.counts["tokens"] += int(counts.sum())
        self.counts["steps_without_room"] += bool(self.allocator.num_free == 0)

        for slot, (request, count) in enumerate(zip(self.slots, counts, strict=True)):
            wanted = np.zeros(got.shape[1:]), np.full(lse.shape[1:], -np.inf)
            if request is not None:
                wanted[0][:count], wanted[1][:count] = attention_float64(
                    queries[slot, :count],
                    request.keys(),
                    softmax_scale=self._scale,
                    kv_lora_rank=o.kv_lora_rank,
                )
            error = relative_error(got[slot], wanted[0])
            self.largest_error = max(self.largest_error, error)
            in_bounds = error <= OUTPUT_BOUND[o.dtype]
            if not (in_bounds and lse_error(lse[slot], wanted[1]) <= LSE_BOUND):
                self._fail(step, f"slot {slot}: error {error:.2e} with {lengths[slot]} keys")

    def _attend_traced(
        self,
        cache: PagedKVCache,
        q: jax.Array,
        latents: jax.Array,
        block_tables: jax.Array,
        lengths: jax.Array,
        counts: jax.Array,
        copies: tuple[jax.Array, jax.Array],
        live: jax.Array,
    ) -> tuple[jax.Array, jax.Array, PagedKVCache]:
        self.traces += 1
        cache = _poison(cache.copy_pages(*copies), live)
        cache = cache.append(latents, block_tables, lengths - counts, counts)
        o, lse = paged_mla_attention(
            q,
            cache,
            block_tables,
            lengths,
            query_lens=counts,
            softmax_scale=self._scale,
            implementation=self.options.implementation,
        )
        return o, lse, cache

    def _live_rows(self) -> np.ndarray:
        """Returns which rows hold a token before this step, [num_pages, page_size]."""
        page_size = self.options.page_size
        live = np.zeros((self.allocator.num_pages, page_size), bool)
        live[list(self.allocator.cached_pages)] = True
        for request in self._running():
            position = np.arange(request.done)
            pages = np.array(self.allocator.pages(request.id), int)
            live[pages[position // page_size], position % page_size] = True
        return live

    def _keep_accepted(self) -> None:
        """Rejects the drafts, and makes full pages of tokens available to other requests."""
        for request in self._running():
            request.done += request.new
            self.allocator.truncate(request.id, request.done)
            self.allocator.commit(request.id, request.tokens[: request.done])
            self.counts["rejected"] += len(request.drafts)

    def _finish(self) -> None:
        """Releases the requests whose latents are all in the cache."""
        for request in self._running():
            if request.done == len(request.latents):
                self._release(request)
                self.counts["finished"] += 1

    def _release(self, request: Request) -> None:
        """Frees a running request's pages and slot."""
        self.allocator.free(request.id)
        self.slots[self.slots.index(request)] = None

    def _check_pages(self, step: int) -> None:
        """Checks the reference counts, and that requests have no extra pages."""
        held: collections.Counter[int] = collections.Counter()
        for request in self._running():
            pages = self.allocator.pages(request.id)
            held.update(pages)
            if len(pages) != -(-request.done // self.options.page_size):
                self._fail(step, f"request {request.id}: {len(pages)} pages, {request.done} tokens")
        counts = self.allocator.ref_counts
        wrong = [page for page, count in enumerate(counts) if held[page] != count]
        if wrong:
            self._fail(step, f"the reference counts of pages {wrong} are wrong")
        in_use = sum(owners > 0 for owners in held.values())
        if in_use + self.allocator.num_free != self.allocator.num_pages:
            self._fail(step, f"{in_use} pages held and {self.allocator.num_free} free")
        self.occupancy.append(in_use / self.allocator.num_pages)

    def _fail(self, step: int, what: str) -> None:
        self.failures.append({"step": step, "what": what})

    def _running(self) -> list[Request]:
        return [request for request in self.slots if request is not None]

    @functools.cached_property
    def _dtype(self) -> Any:
        return jnp.dtype(self.options.dtype)

    @property
    def _scale(self) -> float:
        """The softmax scale, 192^-0.5 at DeepSeek's widths: nope is a quarter of the latent."""
        return (self.options.kv_lora_rank // 4 + self.options.rope_dim) ** -0.5


def _poison(cache: PagedKVCache, live: jax.Array) -> PagedKVCache:
    """Returns the cache with NaN in the rows where `live` [num_pages, page_size] is False."""
    mask = live[:, None, :, None] if cache.layout == "NZ" else live[..., None]
    return dataclasses.replace(cache, pages=jnp.where(mask, cache.pages, jnp.nan))
