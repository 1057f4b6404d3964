"""Packed requests for the Hopper prefill kernel, with poison around them, against float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np

SCALE = 192**-0.5
Lengths = list[tuple[int, int]]


class PrefillBatch:
    """Requests with (queries, keys) each, packed, in arrays with rows of NaN behind them."""

    def __init__(
        self,
        rng: np.random.Generator,
        lens: Lengths,
        *,
        rows: int,
        keys: int,
        heads: int,
        dtype: Any = jnp.bfloat16,
        widths: tuple[int, int, int] = (128, 64, 128),
        causal: bool = True,
    ):
        self.lens, self.causal, self.widths = lens, causal, widths
        nope, rope, v_dim = widths
        self.cu_q, self.cu_kv = (
            np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in np.array(lens).T
        )

        def draw(count: int, used: int, *shape: int) -> np.ndarray:
            x = rng.standard_normal((count, *shape)).astype(np.float32)
            x[used:] = np.nan
            return x.astype(dtype)

        used_rows, used_keys = self.cu_q[-1], self.cu_kv[-1]
        self.q = draw(rows, used_rows, heads, nope + rope)
        self.k = draw(keys, used_keys, heads, nope)
        self.k_rope = draw(keys, used_keys, rope)
        self.v = draw(keys, used_keys, heads, v_dim)

    def poison(self, key: int, *, only_v: bool = False) -> None:
        """Makes a key and its value NaN and infinite, in all heads."""
        self.v[key] = np.nan
        self.v[key, :, ::3] = np.inf
        if not only_v:
            self.k[key] = np.nan

    def arguments(self, *, joined: bool) -> tuple:
        """Returns the arguments of `attend_ragged`. joined: K and V are in one array."""
        k, v = (np.concatenate([self.k, self.v], axis=2), None) if joined else (self.k, self.v)
        rope = self.k_rope if self.widths[1] else None
        arrays = self.q, k, rope, v, self.cu_q, self.cu_kv
        return tuple(None if x is None else jnp.asarray(x) for x in arrays)

    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns o and lse in float64; NaN in rows that see a key or value that is not finite."""
        rows, heads, _ = self.q.shape
        nope, _, v_dim = self.widths
        o, lse = np.zeros((rows, heads, v_dim)), np.full((rows, heads), -np.inf)
        for b, (n, m) in enumerate(self.lens):
            if 0 in (n, m):
                continue
            mine, keys = (slice(cu[b], cu[b + 1]) for cu in (self.cu_q, self.cu_kv))
            q = self.q[mine].astype(np.float64)
            k, rope, v = (x[keys].astype(np.float64) for x in (self.k, self.k_rope, self.v))
            bad = ~(np.isfinite(k).all((1, 2)) & np.isfinite(v).all((1, 2)))
            k[bad], v[bad] = 0.0, 0.0
            last = m - n + np.arange(n) if self.causal else np.full(n, m - 1)
            seen = np.arange(m) <= last[:, None]
            s = np.einsum("nhd,mhd->hnm", q[:, :, :nope], k)
            s = (s + np.einsum("nhd,md->hnm", q[:, :, nope:], rope)) * SCALE
            s = np.where(seen, s, -np.inf)
            top = s.max(axis=2, keepdims=True)
            p = np.exp(s - top)
            total = p.sum(axis=2, keepdims=True)
            spoiled = np.where((seen & bad).any(axis=1), np.nan, 0.0)
            o[mine] = np.einsum("hnm,mhd->nhd", p / total, v) + spoiled[:, None, None]
            lse[mine] = (np.log(total) + top)[:, :, 0].T + spoiled[:, None]
        return o, lse

    def check(self, o: Any, lse: Any, *, invalid: Any = (), lse_of_spoiled: bool = True) -> None:
        """Compares with float64: the places of NaN and infinity exactly, then the values.

        invalid: slices of rows that must be NaN. lse_of_spoiled: whether lse is NaN where o is.
        """
        o, lse = (np.asarray(x).astype(np.float64) for x in (o, lse))
        expected_o, expected_lse = self.reference()
        for rows in invalid:
            expected_o[rows], expected_lse[rows] = np.nan, np.nan
        spoiled = np.isnan(expected_lse)
        assert not np.isfinite(o[spoiled]).any()
        assert np.isfinite(o[~spoiled]).all()
        if lse_of_spoiled:
            assert np.isnan(lse[spoiled]).all()
        blank = np.isneginf(expected_lse)
        np.testing.assert_array_equal(np.isneginf(lse[~spoiled]), blank[~spoiled])
        np.testing.assert_array_equal(o[blank], 0.0)
        there = ~spoiled & ~blank
        off = np.abs(lse[there] - expected_lse[there])
        assert (off < 1e-5 + 1e-5 * np.abs(expected_lse[there])).all(), off.max(initial=0)
        # P and o are rounded to 8 bits or more.
        off = np.abs(o[there] - expected_o[there])
        assert (off < 4e-3 + 0.01 * np.abs(expected_o[there])).all(), off.max(initial=0)


def random_lengths(
    rng: np.random.Generator, requests: int, rows: int, keys: int, *, causal: bool
) -> Lengths:
    """Returns lengths of so many requests, some of them empty, that fit in the arrays."""
    cuts = np.sort(rng.integers(0, rows + 1, requests))
    queries = np.diff(cuts, prepend=0)
    queries[rng.random(requests) < 0.2] = 0
    spare = keys - queries.sum() if causal else keys
    cuts = np.sort(rng.integers(0, spare + 1, requests))
    more = np.diff(cuts, prepend=0)
    more[rng.random(requests) < 0.3] = 0
    return [(int(n), int(n + m if causal else m)) for n, m in zip(queries, more, strict=True)]


# Kinds of bounds, and how often each is drawn.
BOUNDS = {"valid": 0.4, "too long": 0.2, "late": 0.1, "disordered": 0.2, "any": 0.1}


def random_bounds(
    rng: np.random.Generator, requests: int, rows: int, keys: int, kind: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns bounds of requests among the query rows and the keys, int32, many of them invalid.

    Some requests are empty, have more queries than keys, or end past the arrays. The first request
    starts late, bounds decrease, or they are any int32. Rows are left behind the last request.
    kind: None draws one of `BOUNDS`.
    """
    if kind is None:
        kind = rng.choice([*BOUNDS], p=[*BOUNDS.values()])
    if kind == "any":
        q, kv = rng.integers(-(2**31), 2**31, (2, requests + 1))
        return q.astype(np.int32), kv.astype(np.int32)

    def spread(total: int) -> np.ndarray:
        most = 2 * total if kind == "too long" else total
        lens = np.diff(np.sort(rng.integers(0, most + 1, requests)), prepend=0)
        lens[rng.random(requests) < rng.random() / 2] = 0
        return lens

    lens, more = spread(rows), spread(keys)
    if rng.integers(3):
        lens = np.minimum(lens, more)
    q, kv = (np.concatenate([[0], np.cumsum(x)]) for x in (lens, more))
    if kind == "late":
        q, kv = (q + 1, kv) if rng.integers(2) else (q, kv + 1)
    if kind == "disordered":
        for bounds, total in ((q, rows), (kv, keys)):
            some = rng.integers(0, requests + 1, 1 + requests // 8)
            bounds[some] += rng.integers(-total, total, len(some))
    return q.astype(np.int32), kv.astype(np.int32)
