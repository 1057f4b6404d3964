"""Packed requests for the prefill kernel, poisoned and guarded, and a float64 reference."""

from typing import Any

import jax.numpy as jnp
import numpy as np

SCALE = 192**-0.5


class RaggedBatch:
    """Requests with (queries, keys) each, packed with rows of NaN around them.

    gap: rows of NaN behind the last request, in q and in the keys.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        lens: list[tuple[int, int]],
        *,
        heads: int,
        dtype: Any = jnp.bfloat16,
        widths: tuple[int, int, int] = (128, 64, 128),
        causal: bool = True,
        gap: int = 3,
        poison: float = np.nan,
    ):
        self.causal, self.heads, self.widths = causal, heads, widths
        nope, rope, v_dim = widths
        self.lens = lens
        q_lens, kv_lens = np.array(lens).T
        self.cu_q = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        self.cu_kv = np.concatenate([[0], np.cumsum(kv_lens)]).astype(np.int32)
        rows, keys = int(self.cu_q[-1]) + gap, int(self.cu_kv[-1]) + gap
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
        self.q, self.k = draw(rows, heads, nope + rope), draw(keys, heads, nope)
        self.k_rope, self.v = draw(keys, rope), draw(keys, heads, v_dim)
        self.q[self.cu_q[-1] :] = poison
        for x in (self.k, self.k_rope, self.v):
            x[self.cu_kv[-1] :] = poison
        self.dtype = dtype
        names = ("q", "k", "k_rope", "v")
        for name in names:
            setattr(self, name, getattr(self, name).astype(dtype))

    def arguments(self, *, joined: bool = False) -> tuple:
        """Returns the arguments of `attend_ragged`. joined: K and V in one array."""
        k, v = self.k, self.v
        if joined:
            k, v = np.concatenate([k, v], axis=2), None
        rope = self.k_rope if self.widths[1] else None
        arrays = self.q, k, rope, v, self.cu_q, self.cu_kv
        return tuple(None if x is None else jnp.asarray(x) for x in arrays)

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns o and lse in float64. Hidden keys are left out, not multiplied by 0."""
        rows = self.q.shape[0]
        o = np.zeros((rows, self.heads, self.widths[2]))
        lse = np.full((rows, self.heads), -np.inf)
        for b, (n, m) in enumerate(self.lens):
            keys = slice(self.cu_kv[b], self.cu_kv[b] + m)
            k, rope, v = (x[keys].astype(np.float64) for x in (self.k, self.k_rope, self.v))
            for i in range(n if m else 0):
                row = self.cu_q[b] + i
                seen = m - n + i + 1 if self.causal else m
                q = self.q[row].astype(np.float64)
                nope = self.widths[0]
                s = np.einsum("hd,khd->hk", q[:, :nope], k[:seen])
                s = (s + q[:, nope:] @ rope[:seen].T) * SCALE
                top = s.max(axis=1, keepdims=True)
                p = np.exp(s - top)
                total = p.sum(axis=1)
                o[row] = np.einsum("hk,khd->hd", p, v[:seen]) / total[:, None]
                lse[row] = np.log(total) + top[:, 0]
        return o, lse

    def check(self, o: Any, lse: Any, expected: Any = None) -> None:
        """Compares with float64: places of NaN and infinity exactly, then the values."""
        o, lse = (np.asarray(x).astype(np.float64) for x in (o, lse))
        expected_o, expected_lse = expected or self.reference()
        assert o.shape == expected_o.shape
        assert lse.shape == expected_lse.shape
        for got, wanted in ((o, expected_o), (lse, expected_lse)):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
            np.testing.assert_array_equal(np.isneginf(got), np.isneginf(wanted))
        finite = np.isfinite(expected_lse)
        np.testing.assert_array_equal(o[np.isneginf(expected_lse)], 0.0)
        off = np.abs(lse[finite] - expected_lse[finite])
        assert (off < 1e-5 + 1e-5 * np.abs(expected_lse[finite])).all(), off.max(initial=0)
        # P and o are rounded to 8 bits or more.
        off = np.abs(o[finite] - expected_o[finite])
        assert (off < 4e-3 + 0.01 * np.abs(expected_o[finite])).all(), off.max(initial=0)
