"""The form in which a call of the layer computes its attention, and what keeps it absorbed."""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import checks, registry
from mla_jax.cache import PagedKVCache
from mla_jax.config import MLAConfig
from mla_jax.hal.forms import ABSORBED, EXPANDED, FORMS, choose_form
from mla_jax.prefill.call import ExpandedForm
from mla_jax.prefill.registry import RAGGED_IMPLEMENTATIONS, RAGGED_REGISTRY
from mla_jax.problem import AttentionProblem
from mla_jax.ragged.problem import RaggedProblem

WORKSPACE_BYTES = 2**30  # of expanded keys and values at a time, by default
_INT32_MAX = int(np.iinfo(np.int32).max)


class FormOptions(NamedTuple):
    """The arguments of `mla_layer` that the choice of the form depends on."""

    form: Any
    workspace_tokens: Any
    causal: Any
    implementation: str | Sequence[str] | None
    plan: Any
    rescale: Any
    partial_dtype: Any
    kv_axis: Any


class Sizes(NamedTuple):
    """The sizes of one call, all static."""

    batch: int
    tokens: int  # S, per request; T of packed tokens
    packed: bool
    ragged: bool  # whether requests may have fewer
    table_tokens: int  # tokens that a block table reaches
    dtype: Any  # in which the attention is computed

    @staticmethod
    def of(
        x: jax.Array,
        cache: PagedKVCache,
        block_tables: Any,
        dtype: Any,
        *,
        ragged: bool,
        packed: bool,
    ) -> "Sizes":
        """Returns the sizes of x [B, S, hidden], or packed [T, 1, hidden], and of block tables."""
        cache.check()
        batch, tokens = x.shape[:2]
        if packed:
            batch, tokens = len(block_tables), batch
        checks.require_block_tables(block_tables, batch)
        table_tokens = block_tables.shape[1] * cache.page_size
        return Sizes(batch, tokens, packed, ragged, table_tokens, dtype)

    @property
    def new_tokens(self) -> int:
        """The new tokens of all requests, with their padding."""
        return self.tokens if self.packed else self.batch * self.tokens


def expanded_form(
    asked: FormOptions, config: MLAConfig, cache: PagedKVCache, sizes: Sizes
) -> ExpandedForm | None:
    """Returns how the call computes the expanded form; None where it takes the absorbed form.

    Raises TypeError or ValueError for options that no call can have, and ValueError for the form
    "expanded" with what that form can't do.
    """
    if asked.form is not None:
        checks.require_one_of("form", asked.form, FORMS)
    workspace_tokens = asked.workspace_tokens
    if workspace_tokens is None:
        bytes_per_token = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        workspace_tokens = max(1, WORKSPACE_BYTES // (bytes_per_token * sizes.dtype.itemsize))
    workspace_tokens = checks.require_positive("workspace_tokens", workspace_tokens)
    causal = checks.require_bool("causal", asked.causal)
    if asked.form == ABSORBED:
        return None
    names = registry.check_names(asked.implementation)
    reason = _refusal(names, asked, cache, sizes)
    if reason is not None:
        if asked.form == EXPANDED:
            raise ValueError(f"form must be {ABSORBED!r} or None here, got {EXPANDED!r}: {reason}")
        return None
    if asked.form is None and _cheaper(sizes.tokens, config, sizes, causal) == ABSORBED:
        return None
    problem, limit = _ragged_shapes(config, sizes, causal), 0
    if asked.form is None:
        if not _as_preferred(names, problem, _absorbed_shapes(cache, problem, sizes, sizes.tokens)):
            return None
        limit = _absorbed_limit(config, sizes, causal) if sizes.ragged else 0
    fewest = limit + 1 if sizes.ragged else sizes.tokens
    shapes = _absorbed_shapes(cache, problem, sizes, limit) if limit else None
    return ExpandedForm(
        softmax_scale=checks.require_softmax_scale(config.softmax_scale),
        causal=causal,
        choice=RAGGED_REGISTRY.choose(names, problem),
        workspace_tokens=min(workspace_tokens, _INT32_MAX),
        longest_prefix=max(0, sizes.table_tokens - fewest),
        absorbed_tokens=limit,
        absorbed_choice=None if shapes is None else registry.choose(names, shapes),
    )


def _refusal(
    names: tuple[str, ...], asked: FormOptions, cache: PagedKVCache, sizes: Sizes
) -> str | None:
    """Returns why the expanded form can't do what a call asks for; None where it can."""
    for name in ("plan", "partial_dtype", "kv_axis"):
        if getattr(asked, name) is not None:
            return f"{name} is for the absorbed form"
    if asked.rescale != "multiply":
        return f"rescale={asked.rescale!r} is for the absorbed form"
    for name in names:
        if name not in RAGGED_IMPLEMENTATIONS:
            return f"implementation {name!r} has the absorbed form only"
    if sizes.dtype not in (jnp.float32, cache.dtype) and cache.dtype != jnp.int8:
        return f"rows of a {cache.dtype} cache would be rounded to {sizes.dtype}"
    if sizes.batch * max(sizes.table_tokens, sizes.tokens) > _INT32_MAX:
        return f"the tokens of all requests must be at most {_INT32_MAX}"
    return None


def _cheaper(count: int, config: MLAConfig, sizes: Sizes, causal: bool) -> str:
    """Returns the form that the cost model chooses for `count` tokens per request."""
    return choose_form(
        count,
        num_heads=config.num_heads,
        table_tokens=sizes.table_tokens,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        causal=causal,
        dtype=sizes.dtype,
    ).form


def _absorbed_limit(config: MLAConfig, sizes: Sizes, causal: bool) -> int:
    """Returns up to how many tokens of a request the absorbed form is chosen, less than S."""
    return bisect.bisect_left(
        range(1, sizes.tokens),
        True,
        key=lambda count: _cheaper(count, config, sizes, causal) == EXPANDED,
    )


def _ragged_shapes(config: MLAConfig, sizes: Sizes, causal: bool) -> Any:
    """Returns a problem of the ragged op that has shapes and dtypes alone."""
    heads, tokens = config.num_heads, sizes.new_tokens
    nope, rope, v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, sizes.dtype)

    bounds: Any = jax.ShapeDtypeStruct((2 * sizes.batch + 1,), jnp.int32)
    return RaggedProblem(
        q=array(tokens, heads, nope + rope),
        k_nope=array(tokens, heads, nope),
        k_rope=array(tokens, rope),
        v=array(tokens, heads, v_dim),
        cu_q_lens=bounds,
        cu_kv_lens=bounds,
        softmax_scale=config.softmax_scale,
        causal=causal,
    )


def _absorbed_shapes(
    cache: PagedKVCache, problem: RaggedProblem, sizes: Sizes, count: int
) -> AttentionProblem:
    """Returns a problem of the paged op with `count` tokens per request, for its shapes.

    Of packed tokens each is a request.
    """
    batch, count = (sizes.tokens, 1) if sizes.packed else (sizes.batch, count)
    shape = batch, count, problem.q.shape[1], cache.latent_dim
    q: Any = jax.ShapeDtypeStruct(shape, sizes.dtype)
    lens: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = -(-sizes.table_tokens // cache.page_size)
    tables: Any = jax.ShapeDtypeStruct((batch, pages), jnp.int32)
    scale, causal = problem.softmax_scale, problem.causal
    return AttentionProblem(q, cache, tables, lens, lens, None, scale, causal, "multiply", None)


def _as_preferred(
    names: tuple[str, ...], problem: RaggedProblem, absorbed: AttentionProblem
) -> bool:
    """Returns whether the expanded form's implementation is named no later than the absorbed one's.

    Otherwise a kernel would give way to plain JAX, e.g. for widths that only one kernel has.
    """
    for name in names:
        if RAGGED_IMPLEMENTATIONS[name].refuses(problem) is None:
            return True
        if registry.IMPLEMENTATIONS[name].refuses(absorbed) is None:
            return False
    return True
