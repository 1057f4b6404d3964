"""Checks of the arguments of the attention op and of the layer."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.cache.layers import require_one_layer
from mla_jax.checkpoints.weights import check_params, check_params_type
from mla_jax.config import MLAConfig
from mla_jax.online_softmax import RESCALES
from mla_jax.ragged.queries import AnyQueries, require_queries
from mla_jax.sharding.key_shards import KeyShard
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SplitPlan


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


def check_arrays(
    q: Any, cache: Any, block_tables: Any, seq_lens: Any, query_lens: Any | None
) -> None:
    check_cache(cache)
    require_queries(q, "B, S, H", cache.kv_lora_rank, cache.rope_dim)
    checks.require_block_tables(block_tables, q.shape[0])
    lengths = {"seq_lens": seq_lens} | ({} if query_lens is None else {"query_lens": query_lens})
    for name, value in lengths.items():
        checks.require_array(name, value)
        checks.require_shape(name, value, "[B]", q.shape[0])
        checks.require_int32(name, value)


def check_cache(cache: Any) -> None:
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    cache.check()
    require_one_layer(cache)


def check_options(
    rescale: Any, partial_dtype: Any, plan: Any, q: AnyQueries, shard: KeyShard | None
) -> Any:
    """partial_dtype as a dtype, or None."""
    if not isinstance(rescale, str):
        raise TypeError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
    checks.require_one_of("rescale", rescale, RESCALES)
    if plan is not None:
        batch, tokens, heads, _ = q.shape
        if shard is None:
            words = "S * H; S is 1, and each token is a request, with cu_q_lens"
            _check_plan(plan, batch, tokens * heads, words)
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


def check_mask_of_plan(split: SplitPlan, heads: int, causal: bool, shard: KeyShard | None) -> None:
    if split.num_heads and (shard is not None or not causal or split.num_heads != heads):
        raise ValueError(
            f"plan must be for causal={causal} and {heads} heads: made with query_lens and no "
            f"kv_axis, it is for causal=True, {split.num_heads} heads and no kv_axis"
        )


def check_values(
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


def check_input(params: Any, config: Any, x: Any, *, packed: bool = False) -> None:
    """Raises unless x is [B, S, hidden], or [T, hidden] if it is packed, and of these params."""
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    check_params_type(params)
    check_params(params, config)
    checks.require_array("x", x)
    if packed:
        words = "[T, hidden_size] with cu_q_lens"
        checks.require_shape("x", x, words, None, config.hidden_size)
    else:
        checks.require_shape("x", x, "[B, S, hidden_size]", None, None, config.hidden_size)
    checks.require_float("x", x)
    if 0 in x.shape:
        raise ValueError(f"x must have no dim of 0, got shape {list(x.shape)}")


def check_heads(config: Any, cache: Any) -> None:
    """Raises unless config and cache have the right types and equal widths of c_kv and k_rope."""
    if not isinstance(config, MLAConfig):
        raise TypeError(f"config must be an MLAConfig, got {type(config).__name__}")
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    widths = {"kv_lora_rank": config.kv_lora_rank, "rope_dim": config.qk_rope_head_dim}
    require_one_layer(cache)
    for name, wanted in widths.items():
        if getattr(cache, name) != wanted:
            raise ValueError(f"cache.{name} must be {wanted}, got {getattr(cache, name)}")
