"""The signature that JAX servers share, against a float64 reference that is written here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax.adapters import mla_ragged_paged_attention

RANK, ROPE, HEADS, PAGE, TABLE = 160, 24, 3, 16, 3
WIDTH = 256 + 128
SEQ_LENS, QUERY_LENS = [20, 3, 0, 48], [1, 3, 0, 30]
SCALE = 0.3


def reference(q, latents, ropes, length, count):
    """o [count, H, RANK] of a request's last tokens, causal; q [count, H, RANK + ROPE]."""
    keys = np.concatenate([latents, ropes], -1).astype(np.float64)
    scores = SCALE * q.astype(np.float64) @ keys.T
    hidden = np.arange(length) > length - count + np.arange(count)[:, None, None]
    scores = np.where(hidden, -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ latents.astype(np.float64)


def arguments(rng, dtype=np.float32):
    """Arguments for 4 requests and a fifth that is not there, with poison where nobody may read."""
    count = sum(QUERY_LENS) + 2
    cache = np.full((16, PAGE, WIDTH), np.nan, np.float32)
    tables = np.full((5, TABLE), 10**6, np.int32)
    order, taken, rows = rng.permutation(16), 0, []
    for b, (length, new) in enumerate(zip(SEQ_LENS, QUERY_LENS, strict=True)):
        pages = -(-length // PAGE)
        tables[b, :pages] = order[taken : taken + pages]
        taken += pages
        row = np.zeros((length, WIDTH), np.float32)
        row[:, :RANK] = rng.standard_normal((length, RANK))
        row[:, 256 : 256 + ROPE] = rng.standard_normal((length, ROPE))
        rows.append(row)
        for position in range(length - new):
            cache[tables[b, position // PAGE], position % PAGE] = row[position]
    new_rows = [row[len(row) - new :] for row, new in zip(rows, QUERY_LENS, strict=True)]
    new_rows = np.concatenate([*new_rows, np.full((2, WIDTH), np.nan, np.float32)])
    q = rng.standard_normal((count, HEADS, RANK + ROPE)).astype(np.float32)
    return rows, tables, {
        "ql_nope": q[..., :RANK],
        "q_pe": q[..., RANK:],
        "new_kv_c": new_rows[:, :RANK],
        "new_k_pe": new_rows[:, 256 : 256 + ROPE],
        "cache_kv": jnp.asarray(cache.reshape(16, PAGE, 1, WIDTH)),
        "kv_lens": np.array([*SEQ_LENS, 10**6], np.int32),
        "page_indices": tables.ravel(),
        "cu_q_lens": np.array([0, *np.cumsum(QUERY_LENS), 10**6], np.int32),
        "distribution": np.array([1, 2, 4], np.int32),
    }  # fmt: skip


def test_mixed_batch():
    rows, tables, call = arguments(np.random.default_rng(5))
    q = np.concatenate([call["ql_nope"], call["q_pe"]], -1)
    options = {"sm_scale": jnp.float32(SCALE), "implementation": ["xla"], "mask_value": -np.inf}
    o, cache = mla_ragged_paged_attention(**call, **options)
    assert call["cache_kv"].is_deleted()
    o, cache = np.asarray(o), np.asarray(cache).reshape(16, PAGE, WIDTH)
    start = 0
    for row, table, new in zip(rows, tables, QUERY_LENS, strict=False):
        for position in range(len(row)):
            got = cache[table[position // PAGE], position % PAGE]
            np.testing.assert_array_equal(got, row[position])
        if new:
            ropes = row[:, 256 : 256 + ROPE]
            queries = q[start : start + new]
            wanted = reference(queries, row[:, :RANK], ropes, len(row), new)
            np.testing.assert_allclose(o[start : start + new], wanted, atol=2e-5)
        start += new
    assert not o[start:].any()
    used = np.zeros((16, PAGE), bool)
    for row, table in zip(rows, tables, strict=False):
        for position in range(len(row)):
            used[table[position // PAGE], position % PAGE] = True
    assert np.isnan(cache[~used]).all()


def counts(last):
    return np.array([0, 0, last], np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"soft_cap": 3.0}, ValueError, "soft_cap must be None, got 3.0"),
        ({"mask_value": 0.0}, ValueError, "mask_value must be None or at most -1e.30, got 0.0"),
        ({"mask_value": "x"}, TypeError, "mask_value must be a real number, got 'x' of type str"),
        ({"k_scale": 2.0}, ValueError, "k_scale must be None, got 2.0"),
        ({"sm_scale": "x"}, TypeError, "sm_scale must be a number, got str 'x'"),
        ({"sm_scale": -1}, ValueError, "sm_scale must be above 0, got -1"),
        ({"implementation": ["cuda"]}, ValueError, r"implementation must be .* got \['cuda'\]"),
        ({"distribution": counts(-1)}, ValueError, r"distribution\[2\] must be in 0 .. 5, got -1"),
        ({"distribution": counts(6)}, ValueError, r"distribution\[2\] must be in 0 .. 5, got 6"),
        ({"kv_lens": [1]}, TypeError, r"kv_lens must be an array, got \[1\] of type list"),
        ({"q_pe": np.zeros((36, 2, 24))}, ValueError, r"q_pe must be \[T, H, rope\]"),
        ({"page_indices": np.zeros(7, np.int32)}, ValueError, "page_indices must be .* got 7 val"),
        ({"new_kv_c": np.zeros((36, RANK), np.float16)}, TypeError, "new_kv_c must be float32 as"),
    ],
)
def test_refuses(change, error, message):
    _, _, call = arguments(np.random.default_rng(5))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: mla_ragged_paged_attention(**(call | change)))
