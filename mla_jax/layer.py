"""The MLA layer over the paged latent cache, and a naive layer without a cache.

The layer has three operators, named as on Ascend:
- MLAPO, `preprocess`: norms, down- and up-projections, RoPE, and the absorption of W_UK into the
  query. An absorbed query is multiplied with the latent itself (DeepSeek-V2, arXiv 2405.04434,
  section 2.1.2).
- MLAPA, `attend`: appends the new latents to the cache and computes paged attention.
- Einsum, `project_output`: W_UV, then W_O.

These are the absorbed form. `mla_layer` computes long prefills in the expanded form instead, with
keys and values of every head (`mla_jax.prefill.from_cache`). `naive_mla_layer` is the expanded form
without a cache, as in the published code of the models. All compute the same function.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import checks
from mla_jax.arguments import all_query_lens, check_heads, check_input
from mla_jax.attention import prepare
from mla_jax.cache import PagedKVCache
from mla_jax.cache.layers import merged
from mla_jax.cache.packed import PackedTokens, require_no_query_lens
from mla_jax.checkpoints.weights import MLAParams, check_params_type
from mla_jax.config import MLAConfig
from mla_jax.implementations.gradients import attend as attend_paged
from mla_jax.prefill.call import Expansion, Packed, Requests
from mla_jax.prefill.form import FormOptions, Sizes, expanded_form
from mla_jax.prefill.from_cache import append_and_attend
from mla_jax.projections import (
    absorbed,
    add_bias,
    einsum,
    queries_and_latents,
    specs_of_hidden,
)
from mla_jax.rope import check_positions
from mla_jax.sharding.axes import on_auto_axes
from mla_jax.sharding.key_shards import KeyShard, merge_parts, weights_of_parts
from mla_jax.sharding.specs import config_of_shard
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SplitPlan


def mla_layer(
    params: MLAParams,
    config: MLAConfig,
    x: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
    donate: bool = True,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    form: str | None = None,
    workspace_tokens: int | None = None,
    head_axis: str | None = None,
    kv_axis: str | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Computes one step of the layer for requests of different lengths.

    A step is a prefill, a chunk of one, a decode step, or several draft tokens (MTP).

    Args:
        params: weights of the layer.
        config: shape of the layer; static under jit.
        x: [B, S, hidden] hidden states of the new tokens, left aligned. With cu_q_lens [T, hidden]:
            the new tokens of all requests, packed.
        cache: holds the latents of the earlier tokens. Use the returned cache from here on. A pool
            of several layers is passed as `cache.layer(i)`.
        block_tables: [B, max_pages] int32, with pages for the new tokens.
        seq_lens: [B] int32, tokens of each request including the new ones.
        query_lens: [B] int32, how many of the S tokens are real, 0 .. min(S, seq_lens). None means
            all S, so that seq_lens must be at least S.
        cu_q_lens: [B + 1] int32, where the packed tokens of each request start, and the end of the
            last, as in `paged_mla_attention`; causal must be True. Requests with many new tokens
            take the expanded form, and the others, e.g. those that decode, the absorbed form.
        donate: whether an eager call reuses the memory of `cache` for the returned cache. Its
            arrays are then deleted, and using them raises. False copies `cache`. Under an outer jit
            the argument has no effect: donate the cache there.
        causal, implementation, plan, rescale, partial_dtype: as in `paged_mla_attention`. A plan
            inside a `jax.shard_map` is for the requests and heads of one device. Without one, each
            iteration of a scan over layers makes one: hand in a plan that is made before the scan.
        form: "absorbed" or "expanded"; None selects the one that `mla_jax.hal.choose_form` finds
            cheaper for S, the widths, the dtype and the tokens that a block table reaches. With
            query_lens, None computes requests with few new tokens in the absorbed form in any case.
            None selects the absorbed form for all that only it can do: a plan, a partial_dtype,
            AMLA's rescale, and implementations other than "hopper" and "xla".
        workspace_tokens: in the expanded form, tokens of all requests whose keys and values are in
            memory at a time, or those of the new tokens if there are more. None: as many as take
            1 GiB.
        head_axis: the axis of a `jax.shard_map` around the call that splits the heads
            (`param_specs`). `config` is that of the whole layer. All other arguments and the
            results are equal along it: projected outputs are summed over it. None: all heads.
        kv_axis: the axis of a `jax.shard_map` around the call over which the keys of every request
            are split, as in `paged_mla_attention`. A new token is written on the device that has
            its page. The attention takes the absorbed form. The sum of the projected outputs is
            over both axes; besides it only lse travels. None: the device has all keys.

    Returns:
        out: [B, S, hidden], or [T, hidden], of x.dtype. Padding is the output bias, or 0.
        cache: with the new tokens appended. For a view of one layer it is the pool of all layers.

    Gradients reach the weights, x and the pages of a cache of floats in both forms, with memory
    that is linear in the number of tokens, as in FlashAttention-2 (arXiv 2307.08691). Padding of x
    must then be finite. Forward mode works too. Derivatives of what an int8 cache stores raise
    TypeError, and so do second derivatives, except with implementation "reference".

    Raises:
        TypeError, ValueError: shapes, dtypes, options or lengths that do not fit. The message names
            the argument, and nothing has been written. With traced lengths, an invalid request has
            NaN rows in `out`, and its tokens are not written.
    """
    if kv_axis is not None and kv_axis == head_axis:
        raise ValueError(f"kv_axis must be another axis than head_axis, got {kv_axis!r} for both")
    if head_axis is not None:
        config = config_of_shard(params, config, head_axis)
    packed = None if cu_q_lens is None else Packed(block_tables, seq_lens, cu_q_lens)
    check_input(params, config, x, packed=packed is not None)
    check_heads(config, cache)
    ragged = query_lens is not None or packed is not None
    lengths = block_tables, seq_lens, query_lens
    x, requests = _requests_of("x", x, cache, lengths, packed, causal=causal, kv_axis=kv_axis)
    if kv_axis is not None:
        whole = {"params": params, "x": x, "seq_lens": seq_lens}
        whole |= {"query_lens": query_lens, "cu_q_lens": cu_q_lens}
        KeyShard.here(kv_axis, cache.page_size).require_split(whole, cache=cache.pages)
    _, lens, new = requests
    positions = (lens - new)[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
    q_nope, q_rope, kv = queries_and_latents(params, x, positions, config=config)
    dtype = jnp.promote_types(q_nope.dtype, params.w_uk.dtype)
    sizes = Sizes.of(x, cache, block_tables, dtype, ragged=ragged, packed=packed is not None)
    options: dict[str, Any] = {"causal": causal, "implementation": implementation, "plan": plan}
    options |= {"rescale": rescale, "partial_dtype": partial_dtype, "kv_axis": kv_axis}
    asked = FormOptions(form, workspace_tokens, **options)
    expanded = expanded_form(asked, config, cache, sizes)
    axes = tuple(axis for axis in (head_axis, kv_axis) if axis is not None)
    if expanded is None:
        o_latent, lse, cache = _append_and_attend(
            config,
            absorbed(params, q_nope, q_rope),
            kv,
            cache,
            requests.block_tables,
            requests.seq_lens,
            query_lens=requests.query_lens,
            donate=donate,
            **options,
        )
        weights = None if kv_axis is None else weights_of_parts(lse, kv_axis)
        out = _projected(params, o_latent, weights, sum_over=axes)
    else:
        expansion = Expansion(params.w_uk, params.w_uv)
        call = q_nope, q_rope, kv, expansion, cache, requests
        o, cache = append_and_attend(expanded, *call, donate=donate, packed=packed)
        out = _projected_values(params, o, sum_over=axes)
    out = out.astype(x.dtype)
    return (out if packed is None else out[:, 0]), cache


def _requests_of(
    name: str,
    x: jax.Array,
    cache: PagedKVCache,
    lengths: tuple[jax.Array, jax.Array, jax.Array | None],
    packed: Packed | None,
    *,
    causal: bool,
    kv_axis: str | None,
) -> tuple[jax.Array, Requests]:
    """Returns x [N, S, ...] and N requests: those of the call, or one for each packed token.

    name: of x, for messages.
    """
    block_tables, seq_lens, query_lens = lengths
    if packed is None:
        new = all_query_lens(name, x, seq_lens, query_lens)
        return x, Requests(*map(checks.snapshot, (block_tables, seq_lens, new)))
    require_no_query_lens(query_lens)
    if not checks.require_bool("causal", causal):
        raise ValueError("causal must be True with cu_q_lens, got False")
    tokens = PackedTokens.of(name, len(x), cache, *packed, kv_axis=kv_axis)
    return x[:, None], Requests(*tokens)


def preprocess(
    params: MLAParams, config: MLAConfig, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes absorbed queries and the rows for the cache from hidden states (MLAPO).

    Args:
        params: weights of the layer.
        config: shape of the layer; static under jit.
        x: [B, S, hidden].
        positions: [B, S] integers from 0, the position of each token in its request.

    Returns:
        q: [B, S, H, kv_lora + rope] = [q_nope . W_UK | q_rope], without the softmax scale.
        kv: [B, S, kv_lora + rope] = [c_kv | k_rope].

    Raises:
        TypeError: params, config, x or positions of another type, or positions of floats.
        ValueError: params, x or positions of the wrong shape, or a negative position that is not
            traced.
    """
    check_input(params, config, x)
    check_positions(positions)
    checks.require_shape("positions", positions, "[B, S]", *x.shape[:2])
    q_nope, q_rope, kv = queries_and_latents(params, x, positions, config=config)
    return absorbed(params, q_nope, q_rope), kv


def attend(
    config: MLAConfig,
    q: jax.Array,
    kv: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
    donate: bool = True,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
    plan: DecodePlan | SplitPlan | None = None,
    rescale: str = "multiply",
    partial_dtype: Any = None,
    kv_axis: str | None = None,
) -> tuple[jax.Array, PagedKVCache]:
    """Appends kv to the cache and computes attention of q over all of it (MLAPA).

    Args:
        config: shape of the layer; static under jit.
        q: [B, S, H, D] absorbed queries, as `preprocess` returns them. With cu_q_lens [T, H, D].
        kv: [B, S, D], or [T, D], rows of the new tokens, which are cast to the dtype of the cache's
            rows.
        cache: as in `mla_layer`.
        block_tables, seq_lens, query_lens, cu_q_lens, donate: as in `mla_layer`.
        causal, implementation, plan, rescale, partial_dtype, kv_axis: as in `paged_mla_attention`.

    Returns:
        o_latent: [B, S, H, kv_lora], or [T, H, kv_lora], of q.dtype.
        cache: as `mla_layer` returns it.

    Gradients reach q, kv and the pages of a cache of floats, as those of `paged_mla_attention`.

    Raises as `mla_layer` does, for q and kv instead of x.
    """
    options: dict[str, Any] = {"implementation": implementation, "plan": plan, "rescale": rescale}
    options |= {"causal": causal, "partial_dtype": partial_dtype, "kv_axis": kv_axis}
    requests = block_tables, seq_lens, query_lens
    if cu_q_lens is not None:
        check_heads(config, cache)
        checks.require_array("q", q)
        checks.require_shape("q", q, "[T, H, D] with cu_q_lens", None, None, config.latent_dim)
        checks.require_array("kv", kv)
        checks.require_shape("kv", kv, "[T, D] with cu_q_lens", len(q), config.latent_dim)
        packed = Packed(block_tables, seq_lens, cu_q_lens)
        q, requests = _requests_of("q", q, cache, requests, packed, causal=causal, kv_axis=kv_axis)
        kv = kv[:, None]
    tables, lens, new = requests
    o_latent, lse, cache = _append_and_attend(
        config, q, kv, cache, tables, lens, query_lens=new, donate=donate, **options
    )
    if kv_axis is not None:
        o_latent, _ = merge_parts(o_latent, lse, kv_axis)
    return (o_latent if cu_q_lens is None else o_latent[:, 0]), cache


def _append_and_attend(
    config: MLAConfig,
    q: jax.Array,
    kv: jax.Array,
    cache: PagedKVCache,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    *,
    query_lens: jax.Array | None,
    donate: bool,
    kv_axis: str | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, PagedKVCache]:
    """Computes `attend`, with kv_axis over this device's keys; returns lse [B, S, H] too."""
    check_heads(config, cache)
    donate = checks.require_bool("donate", donate)
    checks.require_array("q", q)
    checks.require_shape("q", q, "[B, S, H, D]", None, None, None, config.latent_dim)
    checks.require_array("kv", kv)
    checks.require_float("kv", kv)
    checks.require_shape("kv", kv, "[B, S, D]", *q.shape[:2], config.latent_dim)
    query_lens = all_query_lens("q", q, seq_lens, query_lens)
    # Every check runs before anything is written and before the cache is donated.
    problem, choice = prepare(
        q,
        cache,
        block_tables,
        seq_lens,
        softmax_scale=config.softmax_scale,
        query_lens=query_lens,
        kv_axis=kv_axis,
        **options,
    )
    jax.eval_shape(functools.partial(attend_paged, choice=choice), problem)
    kv = kv.astype(cache.row_dtype)
    block_tables, seq_lens, query_lens = map(checks.snapshot, (block_tables, seq_lens, query_lens))
    new = kv, block_tables, seq_lens - query_lens, query_lens
    cache = cache.append(*new, donate=donate, kv_axis=kv_axis)
    o, lse = attend_paged(dataclasses.replace(problem, cache=merged(cache)), choice)
    return o.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]), cache


def project_output(params: MLAParams, o_latent: jax.Array) -> jax.Array:
    """Projects attention outputs to hidden states: W_UV per head, then W_O.

    Args:
        params: weights of the layer.
        o_latent: [B, S, H, kv_lora] floats, as `attend` returns them.

    Returns:
        Hidden states [B, S, hidden].

    Raises TypeError or ValueError if an argument has another type, or if heads or rank are not
    those of `params`.
    """
    check_params_type(params)
    checks.require_array("o_latent", o_latent)
    checks.require_float("o_latent", o_latent)
    heads, rank = params.w_uv.shape[:2]
    checks.require_shape("o_latent", o_latent, "[B, S, H, kv_lora_rank]", None, None, heads, rank)
    return _projected(params, o_latent, None, sum_over=())


@on_auto_axes(specs_of_hidden)
def _projected(
    params: MLAParams, o_latent: jax.Array, weights: jax.Array | None, *, sum_over: tuple[str, ...]
) -> jax.Array:
    """Computes `project_output`, summed over mesh axes; weights [B, S, H] scale o_latent."""
    with jax.named_scope("mla_w_uv"):
        values = einsum("bshc,hcv->bshv", o_latent, params.w_uv)
    if weights is not None:  # here, so that the gather of lse may overlap with the product
        values = (values.astype(weights.dtype) * weights[..., None]).astype(values.dtype)
    return _projected_values(params, values, sum_over=sum_over)


@on_auto_axes(specs_of_hidden)
@jax.named_scope("mla_w_o")
def _projected_values(
    params: MLAParams, values: jax.Array, *, sum_over: tuple[str, ...]
) -> jax.Array:
    """Multiplies outputs [B, S, H, v_dim] by W_O, summed over mesh axes."""
    out = einsum("bshv,hvd->bsd", values, params.w_o)
    if sum_over:
        out = jax.lax.psum(out, sum_over)
    return add_bias(out, params.b_o)
