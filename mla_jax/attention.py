"""The one op: absorbed MLA over a paged latent cache, whatever computes it, and its checks."""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.implementations import choose
from mla_jax.online_softmax import RESCALES
from mla_jax.problem import AttentionProblem
from mla_jax.split_kv import SplitPlan


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
    implementation: str | None = None,
    plan: SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
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
    implementation: str | None = None,
    plan: SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
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
    implementation: str | None = None,
    plan: SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    return_lse: bool = True,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of absorbed queries over the latents in the cache (DeepSeek-V2, arXiv 2405.04434).

    Serves decode (S = 1), multi-token prediction, ragged prefill and chunks of a prefill behind a
    cached prefix: query lengths may differ. The new tokens' rows are in the cache already.

    Args:
        q: [B, S, H, D] = [q_latent | q_rope], not scaled; float32, bfloat16 or float16.
        cache: K is a row [c_kv | k_rope] of D values, V its first kv_lora_rank. Of an int8 cache
            the plain-JAX implementations read the rows dequantised, in float32.
        block_tables: [B, max_pages] int32; slots past a request's length may hold anything.
        seq_lens: [B] int32, keys of each request, its new tokens included; 0: none.
        softmax_scale: multiplies the scores (`MLAConfig.softmax_scale`).
        query_lens: [B] int32, how many of the S tokens are real, left aligned; None: all. Token i
            stands at position seq_lens - query_lens + i.
        causal: whether a token sees only the keys up to its own position.
        implementation: a name from `available_implementations()`; None: the best here.
        plan: for implementations that split the keys, from `plan_splits` or `plan_fixed` for these
            seq_lens; None: they plan for themselves. Others take no notice.
        rescale: "multiply" or "exponent_add" (AMLA), see `online_softmax`.
        partial_dtype: of the unmerged outputs, where keys are split; None: what adds next to
            nothing to the error of o: float32, or of bfloat16 in tiles of 64 rows and more on a
            Hopper GPU float16 in units, a power of two for each row. Elsewhere what is past 65504
            becomes infinite in float16.
        return_lse: whether to return lse too.

    Returns:
        o_latent: [B, S, H, kv_lora_rank], q.dtype.
        lse: [B, S, H] float32, natural log of the sum of e^(scaled score).
        Rows past query_lens and rows that see no key have o_latent = 0 and lse = -inf.

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes, heads or options that don't fit, an implementation that can't run; and,
            unless they are traced, lengths that are negative, past the block table or shorter than
            their queries, pages in use that the cache does not have, or a plan for other lengths.
            Traced, such a request's rows are NaN.
    """
    _check_arrays(q, cache, block_tables, seq_lens, query_lens)
    _check_options(softmax_scale, rescale, partial_dtype, plan, q)
    _check_values(q, cache, block_tables, seq_lens, query_lens, plan)
    block_tables, seq_lens, query_lens = map(checks.snapshot, (block_tables, seq_lens, query_lens))
    problem = AttentionProblem(
        q=q,
        cache=cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        query_lens=query_lens,
        plan=plan,
        softmax_scale=float(softmax_scale),
        causal=bool(causal),
        rescale=rescale,
        partial_dtype=None if partial_dtype is None else jnp.dtype(partial_dtype),
    )
    chosen = choose(implementation, problem)
    o, lse = chosen.run(problem if chosen.finds_invalid else problem.mark_invalid())
    return (o, lse) if return_lse else o


def _check_arrays(
    q: Any, cache: Any, block_tables: Any, seq_lens: Any, query_lens: Any | None
) -> None:
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    cache.check()
    checks.require_shape(
        "q", q, "[B, S, H, kv_lora_rank + rope_dim]", None, None, None, cache.latent_dim
    )
    checks.require_float("q", q)
    if 0 in q.shape:
        raise ValueError(f"q must have no dim of 0, got shape {list(q.shape)}")
    checks.require_shape("block_tables", block_tables, "[B, max_pages]", q.shape[0], None)
    checks.require_int32("block_tables", block_tables)
    checks.require_positive("max_pages of block_tables", block_tables.shape[1])
    lengths = {"seq_lens": seq_lens} | ({} if query_lens is None else {"query_lens": query_lens})
    for name, value in lengths.items():
        checks.require_shape(name, value, "[B]", q.shape[0])
        checks.require_int32(name, value)


def _check_options(
    softmax_scale: Any, rescale: Any, partial_dtype: Any, plan: Any, q: jax.Array
) -> None:
    if not isinstance(softmax_scale, int | float | np.number):
        raise TypeError(f"softmax_scale must be a number, got {type(softmax_scale).__name__}")
    checks.require_one_of("rescale", rescale, RESCALES)
    if partial_dtype is not None:
        try:
            name = jnp.dtype(partial_dtype).name
        except TypeError:
            name = str(partial_dtype)
        checks.require_one_of("partial_dtype", name, checks.FLOAT_DTYPES)
    if plan is None:
        return
    if not isinstance(plan, SplitPlan):
        raise TypeError(f"plan must be a SplitPlan, got {type(plan).__name__}")
    plan.check()
    rows = q.shape[1] * q.shape[2]
    row_tiles = -(-rows // plan.rows_per_tile)
    if (plan.num_row_tiles, plan.num_tiles) != (row_tiles, q.shape[0] * row_tiles):
        raise ValueError(
            f"plan must be for {q.shape[0]} requests of {rows} rows = S * H, got "
            f"{plan.num_tiles // plan.num_row_tiles} requests of {plan.num_row_tiles} tiles of "
            f"{plan.rows_per_tile} rows"
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
        queries, lengths = np.asarray(query_lens), np.asarray(seq_lens)
        limit = np.minimum(lengths, q.shape[1])
        for request in np.flatnonzero((queries < 0) | (queries > limit)):
            raise ValueError(
                f"query_lens[{request}] must be in 0 .. {limit[request]} (q has {q.shape[1]} "
                f"tokens, seq_lens[{request}] = {lengths[request]}), got {queries[request]}"
            )
    if plan is not None:
        plan.check_covers(seq_lens)
