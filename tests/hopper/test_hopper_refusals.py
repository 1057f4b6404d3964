"""What the Hopper kernels say that they do not take."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_batch import SCALE, HopperBatch

from mla_jax import PagedKVCache, available_implementations, paged_mla_attention, plan_splits
from mla_jax.splits.decode_plan import DecodePlan
from pallas_kernels.hopper import planning

BF16, F16 = jnp.bfloat16, jnp.float16


def test_without_a_gpu_it_says_so():
    assert "compute capability 9.0" in available_implementations()["hopper"]
    batch = HopperBatch(np.random.default_rng(0), [64], heads=16)
    with pytest.raises(ValueError, match=r"hopper.*compute capability 9\.0"):
        paged_mla_attention(
            batch.q, batch.cache, batch.block_tables, batch.seq_lens,
            softmax_scale=SCALE, implementation="hopper",
        )  # fmt: skip


def test_refusals_name_what_it_takes():
    plan_for_any = functools.partial(plan_splits, num_workers=2, rows=8)
    any_plan = jax.eval_shape(plan_for_any, np.ones(2, np.int32))

    def reason(q_dtype=BF16, rescale="multiply", rows_per_tile=None, page_size=64, **cache):
        plan = rows_per_tile and DecodePlan(
            dataclasses.replace(any_plan, rows_per_tile=rows_per_tile)
        )
        of_shapes = jax.eval_shape(functools.partial(PagedKVCache.create, 2, **cache))
        cache = dataclasses.replace(of_shapes, page_size=page_size)
        return planning.refuses(q_dtype, cache, rescale, plan)

    for good in (
        {}, {"page_size": 16, "rescale": "exponent_add"}, {"q_dtype": F16, "dtype": F16},
        {"page_size": 1}, {"kv_lora_rank": 256}, {"kv_lora_rank": 384, "rope_dim": 128},
        {"rows_per_tile": 128}, {"dtype": "int8"}, {"dtype": "int8", "page_size": 128},
        {"dtype": "int8", "rows_per_tile": 64},
    ):  # fmt: skip
        assert reason(**good) is None
    for bad, words in (
        ({"q_dtype": F16}, "both bfloat16 or both float16, got float16 and bfloat16"),
        ({"layout": "NZ"}, "layout ND, got NZ"),
        ({"page_size": 256}, "sizes 1, 2, 4, 8, 16, 32, 64, 128 of a cache of float, got 256"),
        ({"kv_lora_rank": 320}, "kv_lora_rank = 320, wanted a multiple of 128 up to 512"),
        ({"rope_dim": 32}, "rope_dim = 32, wanted a multiple of 64"),
        ({"rope_dim": 128}, "shared"),
        ({"dtype": "int8", "kv_lora_rank": 256}, "kv_lora_rank = 256, wanted 512"),
        ({"rows_per_tile": 96}, "rows_per_tile 8, 16, 24, 32, 64, 128, got 64 and 96"),
        ({"rows_per_tile": 8, "rescale": "exponent_add"}, "rows_per_tile 64, 128, got 64 and 8"),
        ({"dtype": "int8", "q_dtype": F16}, "over an int8 cache it takes q bfloat16, got float16"),
        ({"dtype": "int8", "scale_granularity": "group"}, "scales per token, got 'group'"),
        ({"dtype": "int8", "scale_granularity": "tensor", "scale": 0.1}, "per token, got 'tensor'"),
        ({"dtype": "int8", "rescale": "exponent_add"}, "rescale 'multiply', got 'exponent_add'"),
        ({"dtype": "int8", "layout": "NZ"}, "layout ND, got NZ"),
        ({"dtype": "int8", "page_size": 16}, "page sizes 64, 128 of a cache of int8, got 16"),
        (
            {"dtype": "int8", "rows_per_tile": 128},
            "rows_per_tile 8, 16, 24, 32, 64, got 64 and 128",
        ),
    ):
        assert words in reason(**bad), bad
