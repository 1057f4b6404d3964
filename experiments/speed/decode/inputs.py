"""The arrays of a benchmark row, and the float64 reference of some of its requests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.decode.plain_jax import contiguous
from experiments.speed.decode.programs import Programs
from experiments.speed.decode.setup import SCALE, Setup
from experiments.speed.shapes import Shape
from mla_jax.reference.attention import attention_float64

ORACLE_TOKENS = 40_000  # tokens that a check reads at most, besides the longest request


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


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
