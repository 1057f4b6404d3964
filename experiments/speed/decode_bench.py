"""Programs and inputs for timing decode attention: the layers of a model, in bursts of launches.

Each layer has its own cache, and outputs are checked. Rows with the same batch and cache dtype
share a `Pool`: one flat array of tokens per layer, which is viewed as pages of any size. Rows that
differ only in their lengths share compiled programs too, as the steps of a server do.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from experiments.framework.errors import OUTPUT_BOUND, relative_error, rounds_to_8_bits
from experiments.framework.experiment import Row
from experiments.speed import timing
from experiments.speed.shapes import Shape
from mla_jax import PagedKVCache, paged_mla_attention
from mla_jax.problem import AttentionProblem
from mla_jax.reference.attention import attention_float64
from mla_jax.registry import IMPLEMENTATIONS

MOSAIC_CALLS = ("mosaic_gpu", "mosaic_gpu_v2")  # jax.export does not promise to keep these stable
SCALE = 192**-0.5  # softmax scale of DeepSeek-V2 and V3
GRAIN = 128  # pools have a multiple of so many tokens: the largest page
SHORT_TABLE, MOST_IN_SHORT_TABLES = 4096, 16384  # tokens: per block table, and per batch
LONG_BURST = 0.02  # seconds, approximately; longer bursts slow down a card at its power limit
# Bounds of the relative error of o against float64, for the values in the cache. With an int8 cache
# P is rounded with V's scale folded in, and q to 14 bits.
BOUND = {"bf16": OUTPUT_BOUND["bfloat16"], "int8": 6e-3}
BOUND_OF_LSE = {"bf16": 1e-3, "int8": 2e-3}
BOUNDS_OF_8_BITS = 4e-2, 2e-2  # of o and lse, where q and P have 8 bits too
# KV tokens per batch up to which implementations are timed that are not made to be fast.
MOST_TOKENS = {"reference": 1 << 14, "split_kv": 1 << 14, "blockwise": 1 << 10}
SLOW_LAYERS = 4  # layers for plain JAX, which is limited by its many launches, not by memory
ORACLE_TOKENS = 40_000  # tokens that a check reads at most, besides the longest request


@dataclasses.dataclass(frozen=True)
class Setup:
    """The limits of this machine and run."""

    memory: int  # bytes for caches
    kv_lora_rank: int = 512
    rope_dim: int = 64
    rotate: int = 4 * timing.L2_BYTES  # bytes of KV read between two launches of a layer
    min_layers: int = 4
    usual_layers: int = 12
    max_layers: int = 128
    launches: int = 48  # per program, approximately
    rounds: int = 7
    page_rounds: int = 45  # for comparing page sizes, which differ by a few percent
    pause: float = 0.03
    seed: int = 0

    @property
    def widths(self) -> tuple[int, int]:
        """(kv_lora_rank, rope_dim), as stored in sessions."""
        return self.kv_lora_rank, self.rope_dim

    @property
    def width(self) -> int:
        """D, the values per token."""
        return self.kv_lora_rank + self.rope_dim

    def token_bytes(self, dtype: str) -> int:
        """Returns bytes per token and layer; int8 has a float32 scale and a bf16 rope part."""
        return self.kv_lora_rank + 2 * self.rope_dim + 4 if dtype == "int8" else 2 * self.width

    @staticmethod
    def here(memory_gib: float, kv_lora_rank: int, rope_dim: int, seed: int) -> "Setup":
        """Returns the setup of the default device.

        memory_gib: memory for caches; 0 is 60 % of the device's, or 2 GiB on a CPU.
        """
        statistics = jax.devices()[0].memory_stats() or {}
        limit = int(0.6 * statistics["bytes_limit"]) if "bytes_limit" in statistics else 2 << 30
        memory = int(memory_gib * 2**30) or limit
        setup = Setup(memory, kv_lora_rank, rope_dim, seed=seed)
        if jax.default_backend() == "cpu":
            few = {"min_layers": 2, "usual_layers": 2, "max_layers": 2, "launches": 2}
            return dataclasses.replace(setup, **few, rounds=3, page_rounds=3, pause=0.0)
        return setup


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation with options of the op, or `jnp`, as it is timed."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()  # options of the op, including implementation
    separated: bool = False  # whether it is also timed with a kernel between launches
    most_layers: int | None = None  # layers that it is timed on at most, if it is slow
    most_tokens: int | None = None  # KV tokens per batch up to which it is timed

    @property
    def implementation(self) -> str | None:
        """The name of the implementation; None is `jnp`, attention over contiguous KV."""
        return dict(self.options).get("implementation")


def contender(name: str) -> Contender:
    """Returns an implementation with default options, or "jnp"."""
    if name == "jnp":
        return Contender("jnp")
    options = (("implementation", name),)
    if name in MOST_TOKENS:
        return Contender(name, options, most_layers=SLOW_LAYERS, most_tokens=MOST_TOKENS[name])
    if name == "xla":
        return Contender(name, options, most_layers=SLOW_LAYERS)
    return Contender(name, options, separated=True)


@dataclasses.dataclass(frozen=True)
class Pool:
    """The caches of some rows, one per layer."""

    tokens: int
    capacity: int  # tokens per block table at most
    layers: int
    dtype: str

    @staticmethod
    def of(rows: Sequence[Shape], setup: Setup) -> "Pool":
        """Returns a pool with tokens for the largest of the rows and layers for the smallest."""
        tokens, token_bytes = max(map(pool_tokens, rows)), setup.token_bytes(rows[0].dtype)
        capacity = max(-(-max(row.seq_lens) // GRAIN) * GRAIN for row in rows)
        smallest = min(sum(row.seq_lens) for row in rows) * token_bytes
        layers = min(
            max(setup.usual_layers, math.ceil(setup.rotate / max(1, smallest))),
            setup.max_layers,
            setup.memory // (tokens * token_bytes),
        )
        return Pool(tokens, capacity, layers, rows[0].dtype)

    def structs(self, setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a layer by the cache's field, with one row per token."""
        if self.dtype == "bf16":
            return {"pages": _struct((self.tokens, setup.width), jnp.bfloat16)}
        return {
            "pages": _struct((self.tokens, setup.kv_lora_rank), jnp.int8),
            "rope_pages": _struct((self.tokens, setup.rope_dim), jnp.bfloat16),
            "scales": _struct((self.tokens,), jnp.float32),
        }

    def fill(self, setup: Setup) -> list[dict[str, jax.Array]]:
        """Returns random layers, the same for the same seed."""
        make = jax.jit(functools.partial(_random_layer, self, setup))
        return [make(key) for key in jax.random.split(jax.random.key(setup.seed), self.layers)]


def _random_layer(pool: Pool, setup: Setup, key: jax.Array) -> dict[str, jax.Array]:
    if pool.dtype == "bf16":
        return {"pages": jax.random.normal(key, (pool.tokens, setup.width), jnp.bfloat16)}
    latent_key, rope_key = jax.random.split(key)
    values = jax.random.normal(latent_key, (pool.tokens, setup.kv_lora_rank), jnp.bfloat16)
    scales = jnp.max(jnp.abs(values), axis=1).astype(jnp.float32) / 127
    return {
        "pages": jnp.round(values / scales[:, None]).astype(jnp.int8),
        "rope_pages": jax.random.normal(rope_key, (pool.tokens, setup.rope_dim), jnp.bfloat16),
        "scales": scales,
    }


def pool_tokens(row: Shape) -> int:
    """Returns the tokens of a row's pages, which are the same for every page size."""
    return sum(-(-length // GRAIN) for length in row.seq_lens) * GRAIN


def lacks_memory(row: Shape, setup: Setup) -> str | None:
    """Returns why a row's caches do not fit here, or None if they do."""
    needed = pool_tokens(row) * setup.token_bytes(row.dtype) * setup.min_layers
    if needed <= setup.memory:
        return None
    return (
        f"{setup.min_layers} layers of its cache take {needed / 2**30:.1f} GiB, "
        f"the limit is {setup.memory / 2**30:.1f} (--memory_gib)"
    )


def cache_struct(pool: Pool, page_size: int, setup: Setup) -> PagedKVCache:
    """Returns a cache of ShapeDtypeStructs for the pool; raises ValueError if there is none."""
    return jax.eval_shape(
        lambda: PagedKVCache.create(
            pool.tokens // page_size,
            page_size=page_size,
            kv_lora_rank=setup.kv_lora_rank,
            rope_dim=setup.rope_dim,
            dtype={"bf16": jnp.bfloat16, "int8": jnp.int8}[pool.dtype],
        )
    )


def _struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows that share programs, because they only differ in lengths; see `key`."""

    row: Shape  # any of the rows
    pool: Pool
    setup: Setup

    @property
    def q(self) -> jax.ShapeDtypeStruct:
        row = self.row
        return _struct((row.batch, row.s_q, row.heads, self.setup.width), jnp.bfloat16)

    @property
    def tables(self) -> jax.ShapeDtypeStruct:
        return _struct((self.row.batch, self.capacity // self.row.page_size), jnp.int32)

    @property
    def capacity(self) -> int:
        """Tokens per block table.

        A few short requests have short tables, as in a server that groups steps by length. Kernels
        select their tile sizes by it.
        """
        short = max(self.row.seq_lens) <= SHORT_TABLE
        short &= self.row.batch * SHORT_TABLE <= MOST_IN_SHORT_TABLES
        return min(SHORT_TABLE, self.pool.capacity) if short else self.pool.capacity

    @property
    def key(self) -> tuple:
        """What rows that share programs have in common."""
        return self.row.heads, self.row.s_q, self.row.page_size, self.capacity

    @property
    def seq_lens(self) -> jax.ShapeDtypeStruct:
        return _struct((self.row.batch,), jnp.int32)

    def refuses(self, who: Contender) -> str | None:
        """Returns why `who` can't compute this, or None if it can."""
        name = who.implementation
        if name is None:
            return None if self.row.dtype == "bf16" else "it reads bf16"
        reason = IMPLEMENTATIONS[name].unavailable(None)
        if reason is not None:
            return reason
        try:
            cache = cache_struct(self.pool, self.row.page_size, self.setup)
        except (ValueError, TypeError) as error:
            return f"there is no such cache yet: {error}"
        options = dict(who.options)
        partial_dtype = options.get("partial_dtype")
        arrays: dict[str, Any] = {
            "q": self.q,
            "cache": cache,
            "block_tables": self.tables,
            "seq_lens": self.seq_lens,
            "query_lens": None,
        }
        problem = AttentionProblem(
            **arrays,
            plan=None,
            softmax_scale=SCALE,
            causal=True,
            rescale=options.get("rescale", "multiply"),
            partial_dtype=partial_dtype and jnp.dtype(partial_dtype),
        )
        return IMPLEMENTATIONS[name].unavailable(problem)

    def planner(self, who: Contender) -> Callable[[jax.Array], Any]:
        """Returns seq_lens -> the plan that `who` uses in one step; None for most."""
        if who.implementation != "hopper":
            return lambda seq_lens: None
        from pallas_kernels.hopper.planning import plan_decode

        rescale = dict(who.options).get("rescale", "multiply")
        rows, cache = self.row.s_q * self.row.heads, "int8" if self.row.dtype == "int8" else "float"
        return lambda seq_lens: plan_decode(
            seq_lens,
            rows,
            capacity=self.capacity,
            cache=cache,
            rescale=rescale,
            kv_lora_rank=self.setup.kv_lora_rank,
            rope_dim=self.setup.rope_dim,
        )

    def step(self, who: Contender) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Returns (q, layer, (block tables, seq_lens, plan)) -> (o, lse)."""
        struct = cache_struct(self.pool, self.row.page_size, self.setup)

        def step(q: jax.Array, layer: Mapping[str, jax.Array], shared: tuple) -> tuple:
            tables, seq_lens, plan = shared
            fields: dict[str, Any] = {
                name: flat.reshape(getattr(struct, name).shape) for name, flat in layer.items()
            }
            cache = dataclasses.replace(struct, **fields)
            return paged_mla_attention(
                q, cache, tables, seq_lens, softmax_scale=SCALE, plan=plan, **dict(who.options)
            )

        return step

    def passes(self, rows: Iterable[Shape], layers: int) -> int:
        """Returns how often a program runs all layers: `launches` times if they are short."""
        longest = max(estimated_seconds(row, self.setup) for row in rows)
        launches = min(self.setup.launches, LONG_BURST / longest)
        return max(1, round(launches / layers))

    def compile(self, who: Contender, rows: Sequence[Shape]) -> "Programs":
        """Compiles the programs; takes seconds, most of them outside Python, so use threads."""
        count = min(self.pool.layers, who.most_layers or self.pool.layers)
        layers = [self.pool.structs(self.setup)] * count
        plan = jax.jit(self.planner(who))
        shared = self.tables, self.seq_lens, jax.eval_shape(plan, self.seq_lens)
        # An exported kernel is lowered once for all bursts. Lowering runs in one thread of Python.
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in MOSAIC_CALLS]
        step = jax.jit(self.step(who))
        exported = export.export(step, disabled_checks=checks)(self.q, layers[0], shared)
        passes = 1 if who.most_layers else self.passes(rows, count)
        modes = {"us": False, "us_separated": True} if who.separated else {"us": False}
        return Programs(
            count,
            plan.lower(self.seq_lens).compile(),
            {
                column: timing.compile_model(
                    exported.call, self.q, layers, shared, passes=passes, separated=separated
                )
                for column, separated in modes.items()
            },
        )


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled plan and the compiled bursts on so many layers, by the column of their time."""

    layers: int
    plan: Callable[[jax.Array], Any]
    bursts: dict[str, timing.ModelProgram]


def estimated_seconds(row: Shape, setup: Setup) -> float:
    """Returns the approximate time of a launch on an H200, to choose the launches of a burst."""
    tokens = sum(row.seq_lens)
    flops = 2 * tokens * row.s_q * row.heads * (setup.width + setup.kv_lora_rank)
    return max(1e-5, tokens * setup.token_bytes(row.dtype) / 4e12, flops / 6e14)


def jnp_step(kv_lora_rank: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns absorbed attention over contiguous KV, as a JAX user writes it.

    The function is (q [B, S, H, D], kv [B, T, D], seq_lens [B]) -> (o, lse).
    """

    def step(q: jax.Array, kv: jax.Array, seq_lens: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("bshd,btd->bsht", q, kv, preferred_element_type=jnp.float32) * SCALE
        token = jnp.arange(q.shape[1], dtype=jnp.int32)
        visible = seq_lens[:, None] - q.shape[1] + token + 1  # [B, S]
        seen = jnp.arange(kv.shape[1]) < visible[:, :, None, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(kv.dtype)
        o = jnp.einsum("bsht,btd->bshd", weights, kv[..., :kv_lora_rank])
        return o, jax.nn.logsumexp(scores, axis=-1)

    return step


def contiguous(row: Shape, setup: Setup) -> tuple[tuple[int, int, int], int]:
    """Returns the shape [B, T, D] of the KV that `jnp` reads, and the number of layers."""
    longest = max(row.seq_lens)
    layer_bytes = row.batch * longest * 2 * setup.width
    layers = min(max(2, math.ceil(setup.rotate / layer_bytes)), setup.max_layers)
    return (row.batch, longest, setup.width), layers


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def lacks_contiguous_memory(row: Shape, setup: Setup) -> str | None:
    """Returns why KV and scores of `jnp` do not fit beside the caches, or None if they do."""
    (batch, longest, width), layers = contiguous(row, setup)
    scores = batch * row.s_q * row.heads * longest * 12  # bytes: float32 twice, and XLA's copy
    needed = batch * longest * width * 2 * layers + scores
    if needed <= setup.memory / 2:
        return None
    return f"contiguous KV and scores take {needed / 2**30:.1f} GiB"


def compile_jnp(row: Shape, setup: Setup) -> timing.ModelProgram:
    """Compiles the burst of `jnp` for this row's lengths."""
    shape, layers = contiguous(row, setup)
    q = _struct((row.batch, row.s_q, row.heads, setup.width), jnp.bfloat16)
    kv = [_struct(shape, jnp.bfloat16)] * layers
    launches = min(setup.launches // 2, LONG_BURST / (5 * estimated_seconds(row, setup)))
    return timing.compile_model(
        jnp_step(setup.kv_lora_rank),
        q,
        kv,
        _struct((row.batch,), jnp.int32),
        passes=max(1, round(launches / layers)),
    )


@dataclasses.dataclass
class Inputs:
    """The arrays of a row."""

    row: Shape
    setup: Setup
    layers: list[dict[str, jax.Array]]
    q: jax.Array
    tables: np.ndarray
    seq_lens: jax.Array

    @staticmethod
    def make(
        row: Shape, setup: Setup, layers: list[dict[str, jax.Array]], capacity: int
    ) -> "Inputs":
        """Returns inputs with pages in random order and q of k's magnitude."""
        rng = np.random.default_rng(setup.seed)
        size = row.page_size
        order = rng.permutation(layers[0]["pages"].shape[0] // size).astype(np.int32)
        tables = np.zeros((row.batch, capacity // size), np.int32)
        for table, length in zip(tables, row.seq_lens, strict=True):
            count = -(-length // size)
            table[:count], order = order[:count], order[count:]
        q = rng.standard_normal((row.batch, row.s_q, row.heads, setup.width), np.float32)
        lengths = jnp.asarray(row.seq_lens, jnp.int32)
        return Inputs(row, setup, layers, jnp.asarray(q, jnp.bfloat16), tables, lengths)

    def shared(self, programs: Programs) -> tuple[jax.Array, jax.Array, Any]:
        """Returns block tables, lengths and plan."""
        return jnp.asarray(self.tables), self.seq_lens, programs.plan(self.seq_lens)

    def contiguous(self) -> list[jax.Array]:
        """Returns layers [B, T, D] of other random numbers without pages, for `jnp`."""
        shape, count = contiguous(self.row, self.setup)
        keys = jax.random.split(jax.random.key(self.setup.seed), count)
        return [_normal(key, shape) for key in keys]

    def sample(self) -> list[int]:
        """Returns requests to check: the longest, and two of the shortest if they are not long."""
        lengths = self.row.seq_lens
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        chosen, tokens = by_length[:1], 0
        for request in by_length[:0:-1][:2]:
            tokens += lengths[request]
            if tokens <= ORACLE_TOKENS:
                chosen.append(request)
        return chosen

    def rows_of(self, request: int, layer: int) -> np.ndarray:
        """Returns the rows of a request in the cache, [T, D] float64, as pages are defined."""
        size, capacity = self.row.page_size, self.tables.shape[1] * self.row.page_size
        position = np.arange(capacity)
        place = self.tables[request, position // size] * size + position % size
        fields = {
            name: np.asarray(flat[place])[: self.row.seq_lens[request]].astype(np.float64)
            for name, flat in self.layers[layer].items()
        }
        if self.row.dtype == "bf16":
            return fields["pages"]
        return np.concatenate(
            [fields["pages"] * fields["scales"][:, None], fields["rope_pages"]], axis=1
        )

    def oracle(self, layer: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns request -> (o, lse) in float64 for a layer."""
        q = np.asarray(self.q)
        return {
            request: attention_float64(
                q[request],
                self.rows_of(request, layer),
                softmax_scale=SCALE,
                kv_lora_rank=self.setup.kv_lora_rank,
            )
            for request in self.sample()
        }


def errors_of(
    output: tuple[Any, Any],
    wanted: Mapping[int, tuple[np.ndarray, np.ndarray]],
    dtype: str,
    implementation: str | None = None,
) -> Row:
    """Returns `error`, `lse_error` and whether both are in bounds and all outputs are finite."""
    bound, bound_of_lse = BOUND[dtype], BOUND_OF_LSE[dtype]
    if rounds_to_8_bits(implementation, dtype):
        bound, bound_of_lse = BOUNDS_OF_8_BITS
    o, lse = (np.asarray(x) for x in output)
    requests = list(wanted)
    error = relative_error(o[requests], np.stack([wanted[i][0] for i in requests]))
    off = np.abs(lse[requests].astype(np.float64) - np.stack([wanted[i][1] for i in requests]))
    finite = bool(np.isfinite(o.astype(np.float32)).all() and np.isfinite(lse).all())
    lse_error = float(off.max())
    right = finite and error <= bound and lse_error <= bound_of_lse
    return {"error": error, "lse_error": lse_error, "correct": right}


def time_bursts(
    bursts: Mapping[str, timing.Burst], *, rounds: int, pause: float
) -> dict[str, timing.Timing]:
    """Times all bursts in turn, slow ones in fewer rounds."""
    once = {}
    for name, burst in bursts.items():
        burst.run(1)
        once[name] = burst.run(1)[1]
    found: dict[str, timing.Timing] = {}
    for slow in (False, True):
        group = {name: bursts[name] for name in bursts if (once[name] > 3 * LONG_BURST) == slow}
        if group:
            found |= timing.measure(group, rounds=3 if slow else rounds, pause=pause)
    return found
