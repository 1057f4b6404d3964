"""The attention op: absorbed MLA over a paged latent cache, its arguments and their checks."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.cache.layers import merged, pool_tables, require_one_layer
from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.implementations.choice import Choice
from mla_jax.implementations.gradients import attend
from mla_jax.online_softmax import RESCALES
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
        q: [B, S, H, D] = [q_latent | q_rope], not scaled; float32, bfloat16 or float16.
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
        causal: whether a token sees only the keys up to its own position.
        implementation: a name from `available_implementations()`, or a list or tuple of names: the
            first that can run the problem on the platform that the call is lowered for. None:
            ("hopper", "xla"). See "The choice" below.
        plan: for these seq_lens, from `plan_decode`, or a SplitPlan of `plan_fixed` (results that
            do not depend on the batch) or `plan_splits`. A plan that was made with query_lens is
            for these, and for a causal mask. None: an implementation that splits the keys plans for
            itself. Other implementations ignore it.
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
        o_latent: [B, S, H, kv_lora_rank], q.dtype.
        lse: [B, S, H] float32, natural log of the sum of e^(scaled score).
        Rows past query_lens and rows that see no key have o_latent = 0 and lse = -inf.

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
            that are negative or above S or seq_lens, pages in use that the cache does not have, or
            a plan for other lengths. Traced, such a request's rows are NaN.
    """
    return_lse = checks.require_bool("return_lse", return_lse)
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
    return (o, lse) if return_lse else o


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
    _check_arrays(q, cache, block_tables, seq_lens, query_lens)
    causal = checks.require_bool("causal", causal)
    names = check_names(implementation)
    softmax_scale = checks.require_softmax_scale(softmax_scale)
    plan = DecodePlan.of(plan)
    shard = None if kv_axis is None else KeyShard.here(kv_axis, cache.page_size)
    dtype = _check_options(rescale, partial_dtype, plan, q, shard)
    if plan is not None:
        _check_mask_of_plan(plan.split, q.shape[2], causal, shard)
    if shard is None:
        _check_values(q, cache, block_tables, seq_lens, query_lens, plan)
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


def require_query_lens(count: int, of: str, seq_lens: Any, query_lens: Any) -> None:
    """Raises ValueError where concrete query_lens are not in 0 .. min(count, seq_lens).

    of: the array that has `count` tokens for each request.
    """
    queries, lengths = np.asarray(query_lens), np.asarray(seq_lens)
    limit = np.minimum(lengths, count)
    for request in np.flatnonzero((queries < 0) | (queries > limit)):
        raise ValueError(
            f"query_lens[{request}] must be in 0 .. {limit[request]} ({of} has {count} "
            f"tokens, seq_lens[{request}] = {lengths[request]}), got {queries[request]}"
        )


def all_query_lens(name: str, tokens: Any, seq_lens: Any, query_lens: Any) -> Any:
    """Returns query_lens [B], or S for each request if it is None, checked as far as it is known.

    name: what the caller calls the array `tokens` [B, S, ...] of the new tokens.
    """
    batch, count = tokens.shape[:2]
    lengths = {"seq_lens": seq_lens} | ({} if query_lens is None else {"query_lens": query_lens})
    for argument, value in lengths.items():
        checks.require_array(argument, value)
        checks.require_shape(argument, value, "[B]", batch)
        checks.require_int32(argument, value)
    if query_lens is not None:
        if checks.is_concrete(seq_lens, query_lens):
            require_query_lens(count, name, seq_lens, query_lens)
        return query_lens
    if checks.is_concrete(seq_lens):
        for request in np.flatnonzero(np.asarray(seq_lens) < count):
            raise ValueError(
                f"seq_lens[{request}] must be at least {count}: without query_lens all {count} "
                f"tokens of {name} count, got {seq_lens[request]}"
            )
    return jnp.full(batch, count, jnp.int32)


def _check_arrays(
    q: Any, cache: Any, block_tables: Any, seq_lens: Any, query_lens: Any | None
) -> None:
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    cache.check()
    require_one_layer(cache)
    checks.require_array("q", q)
    checks.require_shape(
        "q", q, "[B, S, H, kv_lora_rank + rope_dim]", None, None, None, cache.latent_dim
    )
    checks.require_float("q", q)
    if 0 in q.shape:
        raise ValueError(f"q must have no dim of 0, got shape {list(q.shape)}")
    check_block_tables(block_tables, q.shape[0])
    lengths = {"seq_lens": seq_lens} | ({} if query_lens is None else {"query_lens": query_lens})
    for name, value in lengths.items():
        checks.require_array(name, value)
        checks.require_shape(name, value, "[B]", q.shape[0])
        checks.require_int32(name, value)


def check_block_tables(block_tables: Any, batch: int) -> None:
    """Raises TypeError or ValueError unless block_tables can be that of `batch` requests."""
    checks.require_array("block_tables", block_tables)
    checks.require_shape("block_tables", block_tables, "[B, max_pages]", batch, None)
    checks.require_int32("block_tables", block_tables)
    checks.require_positive("max_pages of block_tables", block_tables.shape[1])


def _check_options(
    rescale: Any, partial_dtype: Any, plan: Any, q: jax.Array, shard: KeyShard | None
) -> Any:
    """partial_dtype as a dtype, or None."""
    if not isinstance(rescale, str):
        raise TypeError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
    checks.require_one_of("rescale", rescale, RESCALES)
    if plan is not None:
        batch, tokens, heads, _ = q.shape
        if shard is None:
            _check_plan(plan, batch, tokens * heads, "S * H")
        else:
            _check_plan(plan, batch * tokens, heads, "H, with kv_axis one for each query token")
    if partial_dtype is None:
        return None
    try:
        dtype = jnp.dtype(partial_dtype)
    except TypeError:
        options = ", ".join(checks.FLOAT_DTYPES)
        # An unknown name of a dtype is a wrong value, anything else that is no dtype a wrong type.
        kind = ValueError if isinstance(partial_dtype, str) else TypeError
        raise kind(f"partial_dtype must be one of {options}, got {partial_dtype!r}") from None
    checks.require_one_of("partial_dtype", dtype.name, checks.FLOAT_DTYPES)
    return dtype


def _check_plan(plan: DecodePlan, batch: int, rows: int, words: str) -> None:
    plan.check()
    split = plan.split
    row_tiles = -(-rows // split.rows_per_tile)
    if (split.num_row_tiles, split.num_tiles) != (row_tiles, batch * row_tiles):
        raise ValueError(
            f"plan must be for {batch} requests of {rows} rows = {words}, got "
            f"{split.num_tiles // split.num_row_tiles} requests of {split.num_row_tiles} tiles of "
            f"{split.rows_per_tile} rows"
        )


def _check_mask_of_plan(split: SplitPlan, heads: int, causal: bool, shard: KeyShard | None) -> None:
    if split.num_heads and (shard is not None or not causal or split.num_heads != heads):
        raise ValueError(
            f"plan must be for causal={causal} and {heads} heads: made with query_lens and no "
            f"kv_axis, it is for causal=True, {split.num_heads} heads and no kv_axis"
        )


def _check_values(
    q: Any, cache: PagedKVCache, block_tables: Any, seq_lens: Any, query_lens: Any, plan: Any
) -> None:
    """Raises ValueError for what `AttentionProblem.mark_invalid` finds, if it can be known now."""
    given = [x for x in (block_tables, seq_lens, query_lens) if x is not None]
    if not checks.is_concrete(*given):
        return
    checks.require_pages("seq_lens", seq_lens, block_tables, cache.page_size, cache.num_pages)
    if query_lens is not None:
        require_query_lens(q.shape[1], "q", seq_lens, query_lens)
    if plan is not None:
        if query_lens is None:
            query_lens = np.full(q.shape[0], q.shape[1], np.int32)
        plan.split.check_covers(seq_lens, query_lens)
