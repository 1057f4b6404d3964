"""A decode step of one layer: its arrays, its compiled programs, and bursts of steps."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed import timing
from experiments.speed.layer.parts import APPEND, ATTENTION, PARTS, REST
from mla_jax import MLAConfig, MLAParams, PagedKVCache, init_params, mla_layer, plan_decode

GIVEN, OWN = "given", "own"  # a plan from outside, or one that the call makes
PLANS = (GIVEN, OWN)
DTYPE = jnp.bfloat16
# Without command buffers, that is CUDA graphs, the profiler names every kernel.
NAMED_KERNELS = {"xla_gpu_enable_command_buffer": ""}


@dataclasses.dataclass(frozen=True)
class Case:
    """Requests that each have so many tokens, the new one included."""

    batch: int
    kv_len: int

    @staticmethod
    def parse(text: str) -> "Case":
        """Reads "16x1024". Raises ValueError for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"wanted requests x tokens, e.g. 16x1024, got {text!r}")
        return Case(int(match[1]), int(match[2]))

    @property
    def text(self) -> str:
        return f"{self.batch} x {self.kv_len}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and the case that it computes a step of."""

    config: MLAConfig
    case: Case
    page_size: int

    @property
    def pages(self) -> int:
        """Pages per request."""
        return -(-self.case.kv_len // self.page_size)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes of params, x, cache, block_tables and seq_lens."""
        batch, config = self.case.batch, self.config
        return (
            jax.eval_shape(functools.partial(new_params, config), jax.random.key(0)),
            jax.ShapeDtypeStruct((batch, 1, config.hidden_size), DTYPE),
            jax.eval_shape(self.new_cache, jax.random.key(0)),
            jax.ShapeDtypeStruct((batch, self.pages), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        )

    def empty_cache(self) -> PagedKVCache:
        return PagedKVCache.create(
            self.case.batch * self.pages,
            page_size=self.page_size,
            kv_lora_rank=self.config.kv_lora_rank,
            rope_dim=self.config.qk_rope_head_dim,
            dtype=DTYPE,
        )

    def new_cache(self, key: jax.Array) -> PagedKVCache:
        cache = self.empty_cache()
        return dataclasses.replace(cache, pages=jax.random.normal(key, cache.pages.shape, DTYPE))

    def plan(self, seq_lens: jax.Array) -> Any:
        """Returns the plan for lengths. Under jit the cache that it describes takes no memory."""
        return plan_decode(
            seq_lens,
            cache=self.empty_cache(),
            num_heads=self.config.num_heads,
            max_seq_len=self.pages * self.page_size,
        )

    def lower(self, plan: str) -> Any:
        """Returns the step, lowered; it takes the arrays of `shapes` and the given plan."""

        def step(
            params: MLAParams,
            x: jax.Array,
            cache: PagedKVCache,
            block_tables: jax.Array,
            seq_lens: jax.Array,
            plan: Any,
        ) -> tuple[jax.Array, PagedKVCache]:
            return mla_layer(params, self.config, x, cache, block_tables, seq_lens, plan=plan)

        shapes = self.shapes
        given = jax.eval_shape(self.plan, shapes[-1]) if plan == GIVEN else None
        return jax.jit(step, donate_argnums=2).lower(*shapes, given)

    def bytes_read(self) -> dict[str, int]:
        """Returns the bytes of weights and cache that each part reads or writes.

        The attention reads the rows of all tokens, and the append writes those of the new ones.
        Activations do not count.
        """
        params, _, cache, *_ = self.shapes
        of_row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        of_row //= cache.num_pages * cache.page_size
        found = dict.fromkeys((REST,), 0)
        for part in PARTS:
            weights = (getattr(params, name) for name in part.weights)
            found[part.name] = sum(x.size * x.dtype.itemsize for x in weights if x is not None)
        found[ATTENTION] += self.case.batch * self.case.kv_len * of_row
        found[APPEND] += self.case.batch * of_row
        return found


@dataclasses.dataclass
class Arrays:
    """The arrays of a step on the device. Every step takes the cache that the last one left."""

    params: MLAParams
    x: jax.Array
    cache: PagedKVCache
    block_tables: jax.Array
    seq_lens: jax.Array
    plan: Any

    @staticmethod
    def of(layer: Layer, params: MLAParams, seed: int) -> "Arrays":
        """Returns normal values of x and of the cache, whose pages are in random order."""
        case, keys = layer.case, jax.random.split(jax.random.key(seed))
        order = np.random.default_rng(seed).permutation(case.batch * layer.pages)
        seq_lens = jnp.full((case.batch,), case.kv_len, jnp.int32)
        return Arrays(
            params=params,
            x=jax.random.normal(keys[0], layer.shapes[1].shape, DTYPE),
            cache=jax.jit(layer.new_cache)(keys[1]),
            block_tables=jnp.asarray(order.reshape(case.batch, -1), jnp.int32),
            seq_lens=seq_lens,
            plan=jax.jit(layer.plan)(seq_lens),
        )

    def step(self, compiled: Callable[..., Any], plan: str) -> jax.Array:
        """Starts a step and returns its output."""
        given = self.plan if plan == GIVEN else None
        out, self.cache = compiled(
            self.params, self.x, self.cache, self.block_tables, self.seq_lens, given
        )
        return out

    def burst(self, compiled: Callable[..., Any], plan: str, steps: int) -> timing.Burst:
        """Returns a burst of so many steps, one after the other."""
        running: list[Any] = []

        def enqueue() -> None:
            for _ in range(steps):
                running[:] = [self.step(compiled, plan)]

        return timing.Burst(steps, enqueue, lambda: jax.block_until_ready(running))


def new_params(config: MLAConfig, key: jax.Array) -> MLAParams:
    return init_params(key, config, dtype=DTYPE)
