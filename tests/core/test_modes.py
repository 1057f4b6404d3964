"""Every plain implementation, the layer, plans and merges under JAX's global modes.

Tracing finds what depends on a mode: a literal of another width, two dtypes that meet. It is cheap,
so that every case is traced under every mode; a few are run as well.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import version_of_ptxas_asked_once
from paged_batch import SCALE, TOLERANCE, assert_matches, make_batch
from random_layer import random_params

from mla_jax import merge_states, quantize
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.config import MLAConfig
from mla_jax.layer import mla_layer
from mla_jax.online_softmax import RESCALES, finalize, init_state, update
from mla_jax.reference.int8_dataflow import QUERIES, WEIGHTS, attend_int8
from mla_jax.reference.naive import naive_mla_layer
from mla_jax.splits.planner import plan_splits
from pallas_kernels.hopper import attention as attention_of_hopper

# Flags of JAX's configuration. What fails under one of these two fails under both.
X64_AND_STRICT = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict"}
RUN_MODES = {
    "x64, strict, debug_nans": X64_AND_STRICT | {"jax_debug_nans": True},
    "disable_jit": {"jax_disable_jit": True},
}
CONFIG = MLAConfig(
    hidden_size=8,
    num_heads=2,
    q_lora_rank=6,
    kv_lora_rank=128,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
)
Case = tuple[Callable[..., Any], tuple]  # a function and its arguments


@contextlib.contextmanager
def mode(flags: dict[str, Any]) -> Iterator[None]:
    """Sets flags of JAX's configuration and restores them."""
    before = {name: getattr(jax.config, name) for name in flags}
    try:
        for name, value in flags.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@functools.cache
def small_batch(dtype: str, granularity: str | None = None) -> Any:
    rng = np.random.default_rng(0)
    lens, queries = [40, 17, 0], [2, 1, 0]
    return make_batch(rng, lens, queries, dtype=dtype, granularity=granularity, capacity=48)


def attention(implementation: str, dtype: str, **options: Any) -> Case:
    granularity = options.pop("granularity", None)
    batch = small_batch(dtype, granularity)
    run = functools.partial(
        paged_mla_attention, softmax_scale=SCALE, implementation=implementation, **options
    )
    return lambda *args: run(*args[:4], query_lens=args[4]), (*batch.args, batch.query_lens)


def planned(plan: Callable[[Any], Any], dtype: str = "float32", **options: Any) -> Case:
    batch = small_batch(dtype)

    def run(q: Any, cache: Any, tables: Any, seq_lens: Any) -> Any:
        given = {"softmax_scale": SCALE, "plan": plan(seq_lens), "implementation": "split_kv"}
        return paged_mla_attention(q, cache, tables, seq_lens, **given, **options)

    return run, batch.args


def layer(implementation: str, dtype: str) -> Case:
    params = random_params(CONFIG)
    options = {"page_size": 16, "kv_lora_rank": CONFIG.kv_lora_rank, "rope_dim": 4}
    cache = PagedKVCache.create(2, dtype=dtype, **options)
    args = params, np.ones((1, 2, 8), np.float32), cache
    tables, lens = np.array([[1, 0]], np.int32), np.array([2], np.int32)

    def run(params: Any, x: Any, cache: Any) -> Any:
        step = functools.partial(mla_layer, implementation=implementation)
        return step(params, CONFIG, x, cache, tables, lens)

    return run, args


def naive() -> Case:
    x = np.ones((1, 2, 8), np.float32)
    return lambda params, x: naive_mla_layer(params, CONFIG, x), (random_params(CONFIG), x)


def blocks(rescale: str, dtype: str) -> Case:
    def run(scores: Any, values: Any) -> Any:
        state = update(init_state((3,), 4), scores, values, rescale=rescale)
        return finalize(update(state, scores, values, rescale=rescale))

    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 8)).astype(np.float32)
    return run, (scores, rng.standard_normal((8, 4)).astype(jnp.dtype(dtype)))


def int8_dataflow(weights: str, queries: str) -> Case:
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    scales = quantize.scales_of(x, "token")
    args = np.concatenate([x, x[:, :4]], -1), quantize.quantize(x, scales), scales, x[:, :4]
    options = {"softmax_scale": SCALE, "weights": weights, "queries": queries}
    return functools.partial(attend_int8, **options), args


def merged(dtype: str) -> Case:
    return merge_states, (jnp.ones((2, 3, 4), dtype), jnp.zeros((2, 3), jnp.float32))


# What is traced: name -> what makes the case. Kernels for other machines can be added here, since
# nothing is compiled. Plans alone are traced in tests/splits/test_split_plans_modes.py.
CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{implementation} {dtype} {rescale}": functools.partial(
            attention, implementation, dtype, rescale=rescale
        )
        for implementation, dtype, rescale in [
            ("reference", "bfloat16", "multiply"),
            ("reference", "int8", "multiply"),
            ("xla", "bfloat16", "exponent_add"),
            ("xla", "int8", "multiply"),
            ("split_kv", "int8", "exponent_add"),  # plans for itself
            ("blockwise", "bfloat16", "exponent_add"),
            ("blockwise", "float32", "multiply"),
            ("blockwise", "int8", "multiply"),
        ]
    },
    **{
        f"xla int8 {granularity}": functools.partial(
            attention, "xla", "int8", granularity=granularity
        )
        for granularity in ("group", "tensor")
    },
    "split_kv float16 partial bfloat16 plan_splits": functools.partial(
        planned,
        functools.partial(plan_splits, num_workers=2, rows=8, rows_per_tile=4, block_size=16),
        "float16",
        partial_dtype="bfloat16",
    ),
    **{f"layer {dtype}": functools.partial(layer, "xla", dtype) for dtype in ("float32", "int8")},
    "naive layer": naive,
    **{
        f"update {rescale} {dtype}": functools.partial(blocks, rescale, dtype)
        for rescale in RESCALES
        for dtype in ("float32", "bfloat16")
    },
    **{
        f"attend_int8 {weights} {queries}": functools.partial(int8_dataflow, weights, queries)
        for weights, queries in zip((*WEIGHTS, "bfloat16"), QUERIES, strict=True)
    },
    "merge_states": functools.partial(merged, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_no_mode_changes_what_is_traced(name: str) -> None:
    """The same shapes and dtypes come out, and nothing is computed in float64 on the way."""
    run, args = CASES[name]()
    wanted = jax.eval_shape(run, *args)
    with mode(X64_AND_STRICT):
        traced, out = jax.make_jaxpr(run, return_shape=True)(*args)
    assert jax.tree.structure(out) == jax.tree.structure(wanted)
    assert jax.tree.leaves(out) == jax.tree.leaves(wanted)
    assert not re.search(r"f64\[\d", str(traced))  # a literal may be one, of no dims


@pytest.mark.parametrize(
    ("implementation", "dtype", "flags"),
    [
        ("reference", "float32", "x64, strict, debug_nans"),
        ("xla", "bfloat16", "x64, strict, debug_nans"),
        ("blockwise", "float32", "x64, strict, debug_nans"),
        ("xla", "float32", "disable_jit"),
        ("blockwise", "float32", "disable_jit"),
    ],
)
def test_the_same_numbers_in_every_mode(implementation: str, dtype: str, flags: str) -> None:
    """With NaN in unused pages, too, and in rows past the lengths."""
    run, args = attention(implementation, dtype, rescale="exponent_add")
    with mode(RUN_MODES[flags]):
        got = run(*args)
    tolerance = TOLERANCE["bfloat16" if dtype == "int8" else dtype]
    assert_matches(got, small_batch(dtype).oracle(), tolerance, 1e-3)


@pytest.mark.parametrize(
    ("heads", "cache"),
    [
        (16, "float"),
        (64, "int8"),
        pytest.param(64, "float", marks=pytest.mark.gpu),
        pytest.param(16, "int8", marks=pytest.mark.gpu),
    ],
)
def test_the_hopper_kernels_are_lowered_in_every_mode(heads: int, cache: str) -> None:
    """With the plan and the merge; also where nothing may be run outside of jit."""
    kernel: Any = functools.partial(attention_of_hopper.attend, kv_lora_rank=128)
    pages, widths = [((9, 64, 192), jnp.bfloat16)], 192
    if cache == "int8":  # of 512 + 64 alone
        kernel, widths = attention_of_hopper.attend_int8, 576
        pages = [((9, 64, 512), jnp.int8), ((9, 64, 64), jnp.bfloat16), ((9, 64), jnp.float32)]
    ints = [((3, 8), jnp.int32), ((3,), jnp.int32), ((3,), jnp.int32)]
    shapes = [((3, 2 * heads, widths), jnp.bfloat16), *pages, *ints]

    def run(*args: Any) -> Any:
        return kernel(*args, None, num_heads=heads, softmax_scale=SCALE, causal=True)

    with mode(X64_AND_STRICT | {"jax_debug_nans": True}):
        traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        assert [x.dtype.name for x in traced.out_info] == ["bfloat16", "float32"]
        with version_of_ptxas_asked_once():
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
