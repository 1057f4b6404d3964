"""Random packed requests with poison around them, and float64 references of attention over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALE = 0.3
HEADS, NOPE, ROPE, V_DIM = 4, 8, 4, 6


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Arguments of the op. Queries and keys that belong to no request are NaN."""

    q: Any
    k_nope: Any
    k_rope: Any
    v: Any
    cu_q_lens: np.ndarray
    cu_kv_lens: np.ndarray

    @property
    def args(self) -> tuple:
        return (*self.floats, self.cu_q_lens, self.cu_kv_lens)

    @property
    def floats(self) -> tuple:
        return self.q, self.k_nope, self.k_rope, self.v

    def poke(self, name: str, row: int, value: float) -> "Ragged":
        """Writes a value into one column of a row, in all heads."""
        array = np.array(getattr(self, name))
        array[row, ..., 2] = value
        return dataclasses.replace(self, **{name: jnp.asarray(array)})


def make_ragged(
    rng: np.random.Generator,
    query_lens: list[int],
    kv_lens: list[int],
    *,
    rope: int = ROPE,
    dtype: str = "float32",
    padding: int = 5,
) -> Ragged:
    cu_q, cu_kv = (np.cumsum([0, *lens], dtype=np.int32) for lens in (query_lens, kv_lens))

    def random(used: int, *dims: int) -> Any:
        array = rng.standard_normal((used + padding, *dims))
        array[used:] = np.nan
        return jnp.asarray(array, dtype)

    return Ragged(
        random(cu_q[-1], HEADS, NOPE + rope),
        random(cu_kv[-1], HEADS, NOPE),
        random(cu_kv[-1], rope),
        random(cu_kv[-1], HEADS, V_DIM),
        cu_q,
        cu_kv,
    )


def ragged_float64(batch: Ragged, *, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns o and lse by their definition, one query after the other."""
    q, k_nope, k_rope, v = (np.asarray(x).astype(np.float64) for x in batch.floats)
    o, lse = np.zeros((*q.shape[:2], v.shape[2])), np.full(q.shape[:2], -np.inf)
    for b in range(len(batch.cu_q_lens) - 1):
        (q_start, kv_start), (q_end, kv_end) = (
            (batch.cu_q_lens[i], batch.cu_kv_lens[i]) for i in (b, b + 1)
        )
        for row in range(q_start, q_end):
            keys = slice(kv_start, kv_end - (q_end - 1 - row) if causal else kv_end)
            if keys.start >= keys.stop:
                continue
            scores = np.einsum("hn,khn->hk", q[row, :, : k_nope.shape[2]], k_nope[keys])
            scores += q[row, :, k_nope.shape[2] :] @ k_rope[keys].T
            weights = np.exp(SCALE * scores)
            lse[row] = np.log(weights.sum(1))
            o[row] = np.einsum("hk,khv->hv", weights / weights.sum(1, keepdims=True), v[keys])
    return o, lse


def naive_layer(batch: Ragged, q: Any, k_nope: Any, k_rope: Any, v: Any) -> tuple[Any, Any]:
    """Returns o and lse of all causal requests, one dense softmax for each; for autodiff."""
    outputs = []
    for b in range(len(batch.cu_q_lens) - 1):
        rows = slice(*batch.cu_q_lens[b : b + 2])
        keys = slice(*batch.cu_kv_lens[b : b + 2])
        count, length = rows.stop - rows.start, keys.stop - keys.start
        rope = jnp.broadcast_to(k_rope[keys, None], (length, HEADS, k_rope.shape[1]))
        k = jnp.concatenate([k_nope[keys], rope], -1)
        scores = SCALE * jnp.einsum("qhd,khd->hqk", q[rows], k)
        seen = jnp.tril(jnp.ones((count, length), bool), length - count)
        scores = jnp.where(seen, scores, -jnp.inf)
        o = jnp.einsum("hqk,khv->qhv", jax.nn.softmax(scores), v[keys])
        outputs.append((o, jax.nn.logsumexp(scores, -1).T))
    return tuple(jnp.concatenate(parts) for parts in zip(*outputs, strict=True))


def gradients_float64(batch: Ragged, d_o: np.ndarray, d_lse: np.ndarray) -> list[np.ndarray]:
    """Returns the gradients of q, k_nope, k_rope and v by autodiff of the naive layer in float64.

    d_o, d_lse: cotangents of o and lse, without padding.
    """
    floats = [np.nan_to_num(np.asarray(x, np.float64)) for x in batch.floats]
    used = batch.cu_q_lens[-1]
    with jax.enable_x64(True):
        _, pull = jax.vjp(lambda *args: naive_layer(batch, *args), *map(jnp.asarray, floats))
        return [np.asarray(x) for x in pull((d_o[:used].astype(float), d_lse[:used].astype(float)))]
