"""Poisoned batches of an int8 cache for the Hopper kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from guards import run_guarded
from hopper_batch import GARBAGE_PAGE, SCALE, cache_sizes, query_lengths

from mla_jax import PagedKVCache, quantize
from mla_jax.reference.attention import attention_float64
from pallas_kernels.hopper import attention

_quantize_in_halves = jax.jit(quantize.quantize_in_halves)


class Int8Batch:
    """Random int8 pages in random order. Page tails and unused pages hold NaN and any int8.

    With `exact` the latent part of q is an int8 times a power of two per row, and one value of each
    row is 127 steps, so that quantizing q loses nothing. Otherwise it is any values, and the
    reference has q in the 14 bits of `mla_jax.quantize`. The reference is float64 on the
    dequantized cache. The magnitude of rope keys grows from block to block by `rising` times that
    of the first. A length of -1 is that of a request that the op found invalid. Shapes, and
    `requests`, are as in `HopperBatch`.
    """

    def __init__(
        self, rng, seq_lens, *, heads, num_queries=1, query_lens=None, page_size=64, exact=True,
        rising=0.0, requests=0,
    ):  # fmt: skip
        lens = np.array(seq_lens + [0] * (requests - len(seq_lens)), np.int32)
        self.heads = heads
        pages_of = -(-np.maximum(lens, 0) // page_size)
        num_pages, table_width = cache_sizes(pages_of, page_size)
        order = rng.permutation(num_pages)
        tables = np.full((len(lens), table_width), GARBAGE_PAGE, np.int32)
        values = rng.integers(-128, 128, (num_pages, page_size, 512)).astype(np.int8)
        rope = np.full((num_pages, page_size, 64), np.nan, np.float32)
        scales = np.full((num_pages, page_size), np.nan, np.float32)
        self.kv = []
        stop = np.cumsum(pages_of)
        for row, length, count, end in zip(tables, lens, pages_of, stop, strict=True):
            mine = row[:count] = order[end - count : end]
            length = max(length, 0)
            latent = rng.integers(-127, 128, (length, 512))
            keys = rng.standard_normal((length, 64)) * 0.1
            keys *= 1 + rising * (np.arange(length)[:, None] // 64)
            keys = keys.astype(jnp.bfloat16)
            steps = (0.1 / 74 * 4.0 ** rng.uniform(-2, 0, length)).astype(np.float32)
            for array, part in ((values, latent), (rope, keys), (scales, steps)):
                flat = array[mine].reshape(count * page_size, *array.shape[2:])
                flat[:length] = part
                array[mine] = flat.reshape(array[mine].shape)
            self.kv.append(
                np.concatenate([latent * steps[:, None].astype(np.float64), keys], axis=1)
            )
        shape = (len(lens), num_queries, heads)
        q_rope = rng.standard_normal((*shape, 64)) * 10
        if exact:
            q_steps = rng.integers(-127, 128, (*shape, 512))
            q_steps[..., 7] = 127
            q_latent = q_steps * 2.0 ** rng.integers(-5, -1, (*shape, 1))
        else:
            q_latent = rng.standard_normal((*shape, 512)) * 10
        self.q = jnp.asarray(np.concatenate([q_latent, q_rope], axis=-1).astype(jnp.bfloat16))
        self.expected_q = np.asarray(self.q, np.float64)
        if not exact:
            latent = self.q[..., :512]
            high, low, steps = map(np.asarray, _quantize_in_halves(latent))
            self.expected_q[..., :512] = (128.0 * high + low) * steps[..., None]
        self.cache = PagedKVCache(
            jnp.asarray(values),
            kv_lora_rank=512,
            rope_dim=64,
            page_size=page_size,
            layout="ND",
            rope_pages=jnp.asarray(rope.astype(jnp.bfloat16)),
            scales=jnp.asarray(scales),
        )
        self.block_tables, self.seq_lens = jnp.asarray(tables), jnp.asarray(lens)
        queries = query_lengths(lens, num_queries, query_lens)
        self.query_lens = jnp.asarray(queries, jnp.int32)

    def jitted(
        self,
        plan=None,
        *,
        causal=True,
        requests=slice(None),
        interpret=None,
        apart=False,
        **options,
    ):
        """Returns a function that attends; in the interpreter its outputs have guards.

        apart: whether the latent part and the rope part of q are arrays of their own.
        """
        attend = attention.attend_int8
        if interpret is not None:
            attend = functools.partial(run_guarded, attend, interpret=interpret)
        _, tokens, heads, width = self.q.shape
        q = np.asarray(self.q).reshape(-1, tokens * heads, width)
        of_requests = [
            jnp.asarray(np.asarray(array)[requests])  # NumPy does not compile a program per shape.
            for array in (q, self.block_tables, self.seq_lens, self.query_lens)
        ]
        q = of_requests[0]
        return functools.partial(
            attend,
            (q[..., :512], q[..., 512:]) if apart else q,
            *self.cache.arrays().values(),
            *of_requests[1:],
            plan,
            num_heads=self.heads,
            softmax_scale=SCALE,
            causal=causal,
            **options,
        )

    def attend(self, plan=None, **options):
        return self.jitted(plan, **options)()

    def reference(self, request: int, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """Returns o and lse of the query tokens of a request, without padding, in float64."""
        q = self.expected_q[request, : np.asarray(self.query_lens)[request]]
        return attention_float64(
            q, self.kv[request], softmax_scale=SCALE, kv_lora_rank=512, causal=causal
        )

    def check(self, o, lse, *, causal=True) -> None:
        """Asserts that o and lse pass the rule of `HopperBatch.check`, without its cosine."""
        q, seq_lens, queries = (
            self.expected_q,
            np.asarray(self.seq_lens),
            np.asarray(self.query_lens),
        )
        o = np.asarray(o).astype(np.float64).reshape(*q.shape[:3], 512)
        lse = np.asarray(lse).astype(np.float64).reshape(q.shape[:3])
        for i, (length, count) in enumerate(zip(seq_lens, queries, strict=True)):
            if length < 0:
                assert np.isnan(o[i]).all()
                assert np.isnan(lse[i]).all()
                continue
            expected, expected_lse = np.zeros(o.shape[1:]), np.full(lse.shape[1:], -np.inf)
            expected[:count], expected_lse[:count] = self.reference(i, causal=causal)
            seen = np.isfinite(expected_lse)
            np.testing.assert_array_equal(lse[i][~seen], -np.inf)
            np.testing.assert_array_equal(o[i][~seen], 0.0)
            assert np.isfinite(o[i]).all()
            off = np.abs(o[i] - expected)
            passes = (off < 8e-4) | (off < 2.01 / 128 * np.abs(expected))
            assert passes.all(), f"{(~passes).sum()} of {passes.size} off, by {off.max():.2e}"
            off = np.abs(lse[i][seen] - expected_lse[seen])
            rule = (off < 1e-6) | (off < 8.01 / 65536 * np.abs(expected_lse[seen]))
            assert rule.all(), f"lse off by {off.max():.2e}"
