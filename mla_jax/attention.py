"""The attention op: absorbed MLA over a paged latent cache, its arguments and their checks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.arguments import (
    check_arrays,
    check_cache,
    check_mask_of_plan,
    check_options,
    check_values,
)
from mla_jax.cache import PagedKVCache
from mla_jax.cache.layers import merged, pool_tables
from mla_jax.cache.packed import PackedTokens, require_no_query_lens
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.implementations.choice import Choice
from mla_jax.implementations.gradients import attend
from mla_jax.problem import AttentionProblem
from mla_jax.registry import check_names, choose
from mla_jax.sharding.key_shards import KeyShard, merge_parts
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SplitPlan


@overload
def paged_mla_attention(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    softmax_scale: float,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    kv_axis: str | None = None,
    return_lse: Literal[True] = True,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def paged_mla_attention(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    softmax_scale: float,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    kv_axis: str | None = None,
    return_lse: Literal[False],
) -> jax.Array: ...


def paged_mla_attention(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    softmax_scale: float,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    kv_axis: str | None = None,
    return_lse: bool = True,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention of absorbed queries over the latents in the cache (arXiv 2405.04434).

    It serves decode (S = 1), multi-token prediction, ragged prefill and chunks of a prefill behind
    a cached prefix: query lengths may differ. The new tokens' rows must be in the cache already,
    as `PagedKVCache.append` writes them; `mla_layer` and `attend` do so themselves.

    Args:
        q: [B, S, H, D] = [q_latent | q_rope], not scaled; float32, bfloat16 or float16. With
            cu_q_lens [T, H, D]: the tokens of all requests, packed.
        cache: K is a row [c_kv | k_rope] of D values, V its first kv_lora_rank. The plain-JAX
            implementations read an int8 cache dequantized, in float32. A pool of several layers is
            passed as `cache.layer(i)`.
        block_tables: [B, max_pages] int32; entries past a request's length may hold anything.
        seq_lens: [B] int32, keys per request, its new tokens included; 0: none.
        softmax_scale: multiplies the scores (`MLAConfig.softmax_scale`); above 0 and known at
            trace time.
        query_lens: [B] int32, how many of the S tokens are real, left aligned; None: all S. Token i
            is at position seq_lens - query_lens + i. Without query_lens S may be more than
            seq_lens, which `mla_layer` refuses: tokens before position 0 see no key.
        cu_q_lens: [B + 1] int32, from 0, rising, at most T. Request b has the packed tokens
            cu_q_lens[b] .. cu_q_lens[b + 1] - 1, at most seq_lens[b], and they are its last ones.
            A batch may mix chunks of prefills, decode steps and drafts. Tokens past the last bound
            are padding. Keys are read once per token (`cache.packed`).
        causal: whether a token sees only the keys up to its own position.
        implementation: a name from `available_implementations()`, or a list or tuple of names: the
            first that can run the problem on the platform that the call is lowered for. None:
            ("hopper", "xla"). See "The choice" below.
        plan: for these seq_lens and cu_q_lens, from `plan_decode`, or a SplitPlan of `plan_fixed`
            (results that do not depend on the batch) or `plan_splits`. A plan that was made with
            query_lens is for these, and for a causal mask. None: an implementation that splits the
            keys plans for itself. Other implementations ignore it.
        rescale: "multiply" or "exponent_add" (AMLA), see `online_softmax`.
        partial_dtype: of partial results, where the keys of a request are split. None selects
            float32. On Hopper, tiles of 64 or more bfloat16 rows use float16 with one power-of-two
            scale per row, which adds less error than rounding the output does. Without such scales
            (elsewhere), values past 65504 become infinite in float16.
        kv_axis: the axis of a `jax.shard_map` around the call over which the keys of every request
            are split: page p of a request, in the order of its tokens, is on device p % n of n.
            `cache` and `block_tables` are those of one device; so is the plan, from
            `plan_decode(kv_axis=...)`. With several query tokens and no mask, plan must be None.
            All other arguments are equal along the axis; seq_lens and query_lens count the tokens
            of all devices. Every device returns the same results, from one gather of o in q.dtype
            and lse. Values are checked as if they were traced. None: the device has all keys of
            its requests.
        return_lse: whether to return lse too.

    Returns:
        o_latent: [B, S, H, kv_lora_rank], or [T, H, kv_lora_rank]; q.dtype.
        lse: [B, S, H], or [T, H], float32, natural log of the sum of e^(scaled score).
        Padding, rows past query_lens and rows that see no key have o_latent = 0 and lse = -inf.

    The choice: what an implementation refuses about the problem (dtypes, layouts, sizes) is known
    when the call is traced. What it refuses about the machine is decided when the program is
    lowered. The platform and device are those of an eager call's arrays, or else of
    `jax.default_device`; under jit those that jit compiles for; under `jax.export` the platforms
    that it names. A program that is exported for CUDA on a machine without an NVIDIA GPU is for a
    Hopper GPU, planned for 132 SMs; for other cards, name "xla". The kernels have no batching rule:
    under `jax.vmap` the last name that can take the problem runs, which is "xla" by default.

    Gradients of o and lse reach q and the pages of a cache of floats, by plain JAX for every
    implementation: P is computed again block by block, as in FlashAttention-2 (arXiv 2307.08691),
    so that memory is linear in the number of tokens. Pages that requests share have the sum of the
    gradients; padding, invalid requests, hidden keys and unused pages have 0. Forward mode works
    too. With "reference" JAX differentiates the implementation itself, also twice.

    Raises:
        TypeError: an argument of another type, a dtype other than those above, a derivative with
            respect to an int8 cache, or a second one with another implementation than "reference".
        ValueError: shapes, heads or options that don't fit, implementations of which none can run
            (when the call is traced, or when it is lowered if only the machine is the reason); and,
            unless they are traced, seq_lens that are negative or past the block table, query_lens
            that are negative or above S or seq_lens, cu_q_lens that fall or exceed T or a length of
            seq_lens, pages in use that the cache does not have, or
            a plan for other lengths. Traced, such a request's rows are NaN.
    """
    return_lse = checks.require_bool("return_lse", return_lse)
    if cu_q_lens is not None:
        require_no_query_lens(query_lens)
        requests = block_tables, seq_lens, cu_q_lens
        q, block_tables, seq_lens = _of_packed(q, cache, *requests, causal=causal, kv_axis=kv_axis)
    problem, choice = prepare(
        q,
        cache,
        block_tables,
        seq_lens,
        softmax_scale=softmax_scale,
        query_lens=query_lens,
        causal=causal,
        implementation=implementation,
        plan=plan,
        rescale=rescale,
        partial_dtype=partial_dtype,
        kv_axis=kv_axis,
    )
    o, lse = attend(problem, choice)
    if kv_axis is not None:
        o, lse = merge_parts(o.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]), kv_axis)
    if cu_q_lens is not None:
        o, lse = o[:, 0], lse[:, 0]
    return (o, lse) if return_lse else o


def _of_packed(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    cu_q_lens: jax.Array,
    *,
    causal: Any,
    kv_axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q [T, 1, H, D], block tables and lengths of packed tokens as requests of one."""
    check_cache(cache)
    checks.require_array("q", q)
    words = "[T, H, kv_lora_rank + rope_dim] with cu_q_lens"
    checks.require_shape("q", q, words, None, None, cache.latent_dim)
    checks.require_positive("T of q", q.shape[0])
    tokens = PackedTokens.of(
        "q",
        q.shape[0],
        cache,
        block_tables,
        seq_lens,
        cu_q_lens,
        causal=checks.require_bool("causal", causal),
        kv_axis=kv_axis,
    )
    return q[:, None], tokens.block_tables, tokens.seq_lens


def prepare(
    q: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    softmax_scale: float,
    query_lens: jax.Array | None = None,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    kv_axis: str | None = None,
) -> tuple[AttentionProblem, Choice]:
    """Runs all checks of `paged_mla_attention` and returns what `attend` takes.

    Where nothing is traced, the choice that it returns can run here. With kv_axis the problem has
    this device's keys, and each of the B * S query tokens is a request of its own. With a view of
    a layer the problem has all pages of the pool, and block tables with their numbers.
    """
    check_arrays(q, cache, block_tables, seq_lens, query_lens)
    causal = checks.require_bool("causal", causal)
    names = check_names(implementation)
    softmax_scale = checks.require_softmax_scale(softmax_scale)
    plan = DecodePlan.of(plan)
    shard = None if kv_axis is None else KeyShard.here(kv_axis, cache.page_size)
    dtype = check_options(rescale, partial_dtype, plan, q, shard)
    if plan is not None:
        check_mask_of_plan(plan.split, q.shape[2], causal, shard)
    if shard is None:
        check_values(q, cache, block_tables, seq_lens, query_lens, plan)
    else:
        whole = {"q": q, "seq_lens": seq_lens, "query_lens": query_lens}
        split = {"cache": cache.pages} | ({} if plan is None else {"plan": plan})
        shard.require_split(whole, **split)
        if plan is not None and not causal and q.shape[1] > 1:
            raise ValueError("plan must be None with kv_axis, several query tokens and no mask")
    block_tables, seq_lens, query_lens = map(checks.snapshot, (block_tables, seq_lens, query_lens))
    problem = AttentionProblem(
        q=q,
        cache=merged(cache),
        block_tables=pool_tables(cache, block_tables),
        seq_lens=seq_lens,
        query_lens=query_lens,
        plan=plan,
        softmax_scale=softmax_scale,
        causal=causal,
        rescale=rescale,
        partial_dtype=dtype,
    )
    if shard is not None:
        problem = _of_tokens(problem, shard)
    return problem, choose(names, problem)


def _of_tokens(problem: AttentionProblem, shard: KeyShard) -> AttentionProblem:
    """Returns the call with this device's keys, in which every query token is a request."""
    batch, tokens, *row = problem.q.shape
    cache, tables = problem.cache, problem.block_tables
    seen = shard.visible(problem.seq_lens, problem.query_lens, tokens, causal=problem.causal)
    if tokens > 1:
        # A page that does not exist makes all tokens of its request invalid.
        here = shard.count(problem.seq_lens)
        sizes = cache.page_size, cache.num_pages, tokens
        valid = valid_or_minus_one(tables, here, None, *sizes) >= 0
        seen = jnp.where(valid[:, None], seen, -1)
        tables = jnp.repeat(tables, tokens, axis=0)
    return dataclasses.replace(
        problem,
        q=problem.q.reshape(batch * tokens, 1, *row),
        block_tables=tables,
        seq_lens=seen.reshape(-1),
        query_lens=None,
        causal=True,
    )
