"""Compares logits with those of transformers: all tokens of the prompts, and every decode step."""

import dataclasses

import jax
import numpy as np

from experiments.framework.errors import relative_error
from mla_jax import PageAllocator, PagedKVCache

BOUND = 2e-5  # relative; the errors are about 2e-6
PAGE_SIZE = 16
MAX_PAGES = 4


def check_logits(config, want, step, *, rows, width, num_pages, wave):
    """Prompts of different lengths in chunks, then every decode step; unused pages hold NaN.

    step(tokens [rows, width], pool, tables, seq_lens, query_lens) returns logits and the pool. At
    most `wave` requests run at a time. The other rows have no tokens.
    """
    pool = PagedKVCache.create(
        num_pages, page_size=PAGE_SIZE, kv_lora_rank=config.attention.kv_lora_rank,
        rope_dim=config.attention.qk_rope_head_dim, num_layers=config.num_layers,
        dtype="float32",
    )  # fmt: skip
    steps = want["decode"].shape[1]
    ends = np.cumsum(want["prompt_lens"])
    for first in range(0, len(ends), wave):
        mine = slice(first, first + wave)
        nan = jax.device_put(np.full(pool.pages.shape, np.nan, np.float32))
        pool = dataclasses.replace(pool, pages=nan)
        lengths = want["prompt_lens"][mine]
        texts = [
            np.concatenate([prompt[:length], tokens[:steps]])
            for prompt, length, tokens in zip(
                want["prompts"][mine], lengths, want["tokens"][mine], strict=True
            )
        ]
        got, pool = _logits_of(texts, lengths, step, pool, rows, width)
        for i, length in enumerate(lengths, start=first):
            found = np.array(got[i - first])
            prefill = want["prefill"][ends[i] - length : ends[i]]
            assert relative_error(found[:length], prefill) < BOUND, i
            for j in range(steps):
                assert relative_error(found[length + j], want["decode"][i, j]) < BOUND, (i, j)
            tokens = np.argmax(found[length - 1 :], axis=-1)
            np.testing.assert_array_equal(tokens, want["tokens"][i])


def _logits_of(texts, lengths, step, pool, rows, width):
    """Logits of all tokens of each text: its prompt is cut into chunks, the rest into tokens."""
    allocator = PageAllocator(pool.num_pages, PAGE_SIZE)
    for i, text in enumerate(texts):
        allocator.allocate(i, len(text))
    tables = np.full((rows, MAX_PAGES), -1, np.int32)
    tables[: len(texts)] = allocator.block_tables(range(len(texts)), MAX_PAGES)
    done, got = np.zeros(rows, np.int32), [[] for _ in texts]
    while any(done[i] < len(text) for i, text in enumerate(texts)):
        tokens = np.full((rows, width), 127, np.int32)  # padding is a token, too
        counts = np.zeros(rows, np.int32)
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            counts[i] = min(width, length - done[i]) if done[i] < length else done[i] < len(text)
            tokens[i, : counts[i]] = text[done[i] : done[i] + counts[i]]
        done = done + counts
        logits, pool = step(tokens, pool, tables, done, counts)
        for row, count, logits_of_row in zip(got, counts, np.asarray(logits), strict=False):
            row.extend(logits_of_row[:count])
    return got, pool
