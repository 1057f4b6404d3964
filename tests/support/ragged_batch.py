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
        return dataclasses.replace(self, **{name: jax.device_put(array)})


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
        return jax.device_put(array.astype(jnp.dtype(dtype)))  # without a compiled program

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


def gradients_float64(batch: Ragged, d_o: np.ndarray, d_lse: np.ndarray) -> list[np.ndarray]:
    """Returns the gradients of q, k_nope, k_rope and v, of causal requests.

    They are by autodiff, in float64, of one dense softmax over all keys with a mask.

    d_o, d_lse: cotangents of o and lse; those of padding do not count.
    """
    used = batch.cu_q_lens[-1]
    seen = np.zeros((used, len(batch.v)), bool)
    for b in range(len(batch.cu_q_lens) - 1):
        for row in range(*batch.cu_q_lens[b : b + 2]):
            later = batch.cu_q_lens[b + 1] - 1 - row
            seen[row, batch.cu_kv_lens[b] : batch.cu_kv_lens[b + 1] - later] = True

    def layer(q: Any, k_nope: Any, k_rope: Any, v: Any) -> tuple[Any, Any]:
        rope = jnp.broadcast_to(k_rope[:, None], (*k_nope.shape[:2], k_rope.shape[1]))
        scores = SCALE * jnp.einsum("qhd,khd->qhk", q[:used], jnp.concatenate([k_nope, rope], -1))
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        o = jnp.einsum("qhk,khv->qhv", jax.nn.softmax(scores), v)
        return o, jax.nn.logsumexp(scores, -1)

    @jax.jit
    def pull(floats: Any, cotangents: Any) -> Any:
        return jax.vjp(layer, *floats)[1](cotangents)

    floats = [np.nan_to_num(np.asarray(x).astype(np.float64)) for x in batch.floats]
    with jax.enable_x64(True):
        cotangents = d_o[:used].astype(np.float64), d_lse[:used].astype(np.float64)
        return [np.asarray(x) for x in pull(floats, cotangents)]
