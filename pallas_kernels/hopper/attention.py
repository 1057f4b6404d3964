"""Paged absorbed MLA on a Hopper GPU: one decode launch, and a merge where it is needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla_jax.cache.requests import valid_or_minus_one
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SplitPlan, covered_requests
from mla_jax.splits.tile_keys import query_lens_of_plan
from pallas_kernels.hopper import device
from pallas_kernels.hopper.config import (
    DecodeConfig,
    DecodeInt8Config,
    DecodeTransposedConfig,
    DecodeTransposedInt8Config,
    KernelConfig,
)
from pallas_kernels.hopper.kernels.decode import decode
from pallas_kernels.hopper.kernels.decode_int8 import decode_int8
from pallas_kernels.hopper.kernels.decode_transposed import decode_transposed
from pallas_kernels.hopper.kernels.decode_transposed_int8 import decode_transposed_int8
from pallas_kernels.hopper.kernels.merge import merge
from pallas_kernels.hopper.parts.call import DecodeCall, Outputs, Requests
from pallas_kernels.hopper.parts.query_parts import QueryParts
from pallas_kernels.hopper.planning import plan_decode, warn_if_slow, with_tiles, work_of
from pallas_kernels.hopper.work_items import BLOCK, finish_of
from pallas_kernels.modes import jit_with_defaults

Kernel = Callable[[DecodeCall], tuple[jax.Array, ...]]
KERNELS: dict[str, dict[type[KernelConfig], Kernel]] = {  # by what the cache holds
    "float": {DecodeConfig: decode, DecodeTransposedConfig: decode_transposed},
    "int8": {DecodeInt8Config: decode_int8, DecodeTransposedInt8Config: decode_transposed_int8},
}
# block_tables, seq_lens and query_lens of a call
type _Requests = tuple[jax.Array, jax.Array, jax.Array | None]
OPTIONS = ("num_heads", "softmax_scale", "causal", "partial_dtype", "tiles", "interpret")


@jit_with_defaults(*OPTIONS, "kv_lora_rank", "rescale")
def attend(
    q: jax.Array | tuple[jax.Array, jax.Array],
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    plan: DecodePlan | SplitPlan | None,
    *,
    num_heads: int,
    kv_lora_rank: int,
    softmax_scale: float,
    causal: bool,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    tiles: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of R = S_q * num_heads rows per request over a cache of 16-bit latents.

    Args:
        q: [B, R, D] bfloat16 or float16, not scaled; row r is query token r // num_heads. Or two
            arrays, [B, R, kv_lora_rank] and [B, R, rope_dim].
        pages: [num_pages, page_size, D] of q's dtype, D = kv_lora_rank + rope_dim.
        block_tables: [B, max_pages] int32.
        seq_lens: [B] int32, keys per request. A request with an invalid length or page gets NaN.
        query_lens: [B] int32, query tokens per request that are real; None: all.
        plan: for these seq_lens, and these query_lens if it has num_heads; None:
            `planning.plan_decode`.
        rescale: "multiply", or "exponent_add" for AMLA's integer add (arXiv 2509.25224).
        partial_dtype: of partial results of split tiles; None: float16 with a power-of-two scale
            per row for bfloat16 tiles of 64 or more rows, which adds an eighth of the error that
            rounding o does; else float32.
        tiles: config of the kernel; None: that of the plan.
        interpret: `plgpu.InterpretGPUParams()` runs the kernel on a CPU; None: on the GPU.

    Returns:
        o [B, R, kv_lora_rank] of q's dtype and lse [B, R] float32, natural log.
    """
    queries = QueryParts.of(q)
    tokens = _QueryTokens(queries.rows // num_heads, num_heads, causal)
    requests = block_tables, seq_lens, query_lens
    plan, requests = _planned(
        plan,
        tiles,
        requests,
        pages,
        tokens,
        cache="float",
        rescale=rescale,
        kv_lora_rank=kv_lora_rank,
        rope_dim=queries.width - kv_lora_rank,
    )
    if partial_dtype is None:
        exact = isinstance(plan.tiles, DecodeTransposedConfig) or queries.dtype == jnp.float16
        partial_dtype = jnp.float32 if exact else jnp.float16
    return launch(
        KERNELS["float"][type(plan.tiles)],
        queries,
        (pages,),
        requests,
        plan,
        kv_lora_rank=kv_lora_rank,
        num_heads=num_heads,
        partial_dtype=partial_dtype,
        interpret=interpret,
        softmax_scale=softmax_scale,
        causal=causal,
        exponent_add=rescale == "exponent_add",
    )


@jit_with_defaults(*OPTIONS)
def attend_int8(
    q: jax.Array | tuple[jax.Array, jax.Array],
    pages: jax.Array,
    rope_pages: jax.Array,
    scales: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    plan: DecodePlan | SplitPlan | None,
    *,
    num_heads: int,
    softmax_scale: float,
    causal: bool,
    partial_dtype: Any = None,
    tiles: KernelConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention as `attend` does, over a cache of int8 latents with a scale per token.

    Args:
        q: [B, R, kv_lora_rank + rope_dim] bfloat16, or two arrays. The kernel quantizes its latent
            part to 14 bits with a step per row (parts/quantize_q.py).
        pages: [num_pages, page_size, kv_lora_rank] int8.
        rope_pages: [num_pages, page_size, rope_dim] bfloat16.
        scales: [num_pages, page_size] float32; the latent of a token is its int8 times its scale.
        partial_dtype: None: float32.
        Others as in `attend`.

    Returns:
        o [B, R, kv_lora_rank] bfloat16 and lse [B, R] float32, natural log.
    """
    queries = QueryParts.of(q)
    tokens = _QueryTokens(queries.rows // num_heads, num_heads, causal)
    requests = block_tables, seq_lens, query_lens
    plan, requests = _planned(
        plan,
        tiles,
        requests,
        pages,
        tokens,
        cache="int8",
        rescale="multiply",
        kv_lora_rank=pages.shape[2],
        rope_dim=rope_pages.shape[2],
    )
    return launch(
        KERNELS["int8"][type(plan.tiles)],
        queries,
        (pages, rope_pages, scales),
        requests,
        plan,
        kv_lora_rank=pages.shape[2],
        num_heads=num_heads,
        partial_dtype=jnp.float32 if partial_dtype is None else partial_dtype,
        interpret=interpret,
        softmax_scale=softmax_scale,
        causal=causal,
    )


class _QueryTokens(NamedTuple):
    """The query tokens of each request, and the query rows of each token."""

    per_request: int
    num_heads: int
    causal: bool

    @property
    def rows(self) -> int:
        return self.per_request * self.num_heads


def _planned(
    plan: DecodePlan | SplitPlan | None,
    tiles: KernelConfig | None,
    requests: _Requests,
    pages: jax.Array,
    tokens: _QueryTokens,
    *,
    cache: str,
    rescale: str,
    **widths: int,
) -> tuple[DecodePlan, _Requests]:
    """Returns a plan with tiles and the requests that it is for.

    The plan is the given one, one for a split that is given, or a new one. Raises ValueError if the
    tiles are for another kind of cache or for another split.

    Loaders find invalid requests on their way through all blocks. If the plan leaves blocks out,
    the length of such requests is -1 instead, and of those that a given plan does not cover.
    """
    block_tables, seq_lens, query_lens = requests
    num_pages, page_size, _ = pages.shape
    rows, capacity = tokens.rows, block_tables.shape[1] * page_size
    given = plan is not None
    if plan is None:
        kind: dict[str, Any] = {"cache": cache, "rescale": rescale, "tiles": tiles, **widths}
        if tokens.causal:
            kind["query_lens"] = query_lens_of_plan(query_lens, seq_lens, tokens.per_request, BLOCK)
            kind["num_heads"] = tokens.num_heads
        plan = plan_decode(seq_lens, rows, capacity=capacity, clip=True, **kind)
    elif tiles is not None:
        plan = DecodePlan(plan.split if isinstance(plan, DecodePlan) else plan, tiles)
    else:
        plan = plan if isinstance(plan, DecodePlan) else DecodePlan(plan)
        if plan.tiles is None:
            warn_if_slow(plan.split, rows, capacity=capacity, cache=cache, rescale=rescale)
        plan = with_tiles(plan, cache=cache, **widths)
    wanted, got = KERNELS[cache], type(plan.tiles)
    if got not in wanted:
        names = " or ".join(config.__name__ for config in wanted)
        raise ValueError(f"tiles must be a {names} for a cache of {cache}, got {got.__name__}")
    height = plan.split.rows_per_tile
    if plan.tiles.rows_per_tile != height:
        got_height = plan.tiles.rows_per_tile
        raise ValueError(f"tiles must have the plan's rows_per_tile {height}, got {got_height}")
    if not plan.split.num_heads:
        return plan, requests
    seq_lens = valid_or_minus_one(*requests, page_size, num_pages, tokens.per_request)
    if given:
        every = jnp.full_like(seq_lens, tokens.per_request) if query_lens is None else query_lens
        seq_lens = jnp.where(covered_requests(plan.split_of_work, seq_lens, every), seq_lens, -1)
    return plan, (block_tables, seq_lens, query_lens)


def launch(
    kernel: Kernel,
    q: QueryParts,
    cache: tuple[jax.Array, ...],
    requests: _Requests,
    plan: DecodePlan,
    *,
    num_heads: int,
    partial_dtype: Any,
    interpret: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a decode kernel, and `merge` where the kernel does not combine split tiles itself.

    Args:
        kernel: a function of `pallas_kernels.hopper.kernels`.
        q: of R rows.
        cache: the cache's arrays.
        requests: block_tables, seq_lens and query_lens.
        plan: with tiles.
        options: other fields of the `DecodeCall`.

    Returns:
        o and lse as `attend` does.
    """
    batch, rows = q.batch, q.rows
    split, config = plan.split, plan.tiles
    o, lse = new_outputs(batch, rows, options["kv_lora_rank"], q.dtype)
    combines = split.num_partials > 0 and interpret is None and _run_at_once(plan)
    work = work_of(plan, finish_of(config, workers_may_wait=combines or interpret is not None))
    partials = kernel(
        DecodeCall(
            q=q.padded(config.q_row_multiple),
            cache=cache,
            requests=Requests(*requests, work),
            outputs=Outputs(o, lse),
            plan=split,
            num_heads=num_heads,
            num_queries=rows // num_heads,
            config=config,
            combines=combines,
            partial_dtype=jnp.dtype(partial_dtype),
            interpret=interpret,
            **options,
        )
    )
    if split.num_partials and not combines:
        merge(o, lse, partials, split, work, num_rows=rows, interpret=interpret)
    # The barrier keeps XLA from writing the merge's outputs straight into a slice of a larger
    # array, e.g. that of a scan: its dynamic-slice fusion forgets that they alias the inputs.
    return jax.lax.optimization_barrier((o[...], lse[...]))


def _run_at_once(plan: DecodePlan) -> bool:
    """Whether all CTAs of a launch certainly run at the same time, so that they may wait."""
    return plan.tiles.num_ctas(plan.split.num_workers) <= device.resident_ctas()


def new_outputs(batch: int, rows: int, kv_lora_rank: int, dtype: Any) -> tuple[Any, Any]:
    """Returns references to o [B, R, kv_lora_rank] and lse [B, R], which kernels fill."""
    o = jax.ShapeDtypeStruct((batch, rows, kv_lora_rank), dtype)
    lse = jax.ShapeDtypeStruct((batch, rows), jnp.float32)
    return jax.empty_ref(o), jax.empty_ref(lse)
