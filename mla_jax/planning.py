"""`plan_decode`: the way to make the plan of a decode step."""

from collections.abc import Sequence
from typing import Any

import jax

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.cache.packed import check_lengths, keys_seen, require_no_query_lens
from mla_jax.hal import HardwareProfile, load_profile
from mla_jax.implementations.implementation import PlanRequest
from mla_jax.online_softmax import RESCALES
from mla_jax.registry import IMPLEMENTATIONS, check_names
from mla_jax.sharding.key_shards import KeyShard
from mla_jax.splits.costs import MOST_ROWS
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import require_lengths
from mla_jax.splits.planner import check_max_seq_len
from mla_jax.splits.tile_keys import check_query_lens


def plan_decode(
    seq_lens: jax.Array,
    *,
    cache: PagedKVCache,
    num_heads: int,
    num_query_tokens: int = 1,
    profile: HardwareProfile | str | None = None,
    implementation: str | Sequence[str] | None = None,
    max_seq_len: int | None = None,
    rescale: str = "multiply",
    kv_axis: str | None = None,
    query_lens: jax.Array | None = None,
    cu_q_lens: jax.Array | None = None,
) -> DecodePlan:
    """Plans a decode step: how its work is split over a device, and the tiles of the kernel.

    Make one plan per step and pass it to every layer as `plan=`: all layers have the same lengths.
    Without a plan every call of the op makes its own; so make it before a `jax.lax.scan` over
    layers, whose body then uses it. Works under `jax.jit` with traced lengths; the shapes of the
    plan depend on shapes and options only, so that a decode loop traces once.

    In a program for a Hopper GPU one kernel makes the plan, of up to 4096 tiles of query rows in
    all. JAX makes larger plans, and all plans on other platforms, under `jax.vmap` and without jit
    (`jax.disable_jit`), and in programs that the compiler spreads over several devices.

    Args:
        seq_lens: [B] int32, keys per request, its new tokens included; 0: none.
        cache: the cache that is attended to. Its dtype, page size and widths count, not its values
            or its number of layers.
        num_heads: query heads.
        num_query_tokens: query tokens per request, S of the op's q. With cu_q_lens T, the packed
            tokens of all requests.
        profile: a hardware profile or its name, e.g. "H100_SXM5" (`mla_jax.hal.PROFILES`). None:
            this machine's Hopper GPU, or where there is none an H200 with 132 SMs. It decides the
            tiles, the workers and what splitting costs (docs/hal.md). `hopper` refuses
            a plan for more SMs than the GPU has that a program is lowered for, or for a published
            profile with fewer: the op then runs the next implementation with a SlowPlanWarning, or
            raises if there is none.
        implementation: as in `paged_mla_attention`; the plan is for the first name that takes such
            a cache. None: ("hopper", "split_kv").
        max_seq_len: keys that a request's block table reaches, max_pages * page_size; None: not
            known. With it, steps of a few short requests get faster tiles.
        rescale: "multiply" or "exponent_add", as in the op.
        kv_axis: the axis of a `jax.shard_map` around the call over which the keys of every request
            are split, as in the op. The plan is for the keys of this device; `cache`, num_heads and
            max_seq_len are those of one device too. None: it has all keys.
        query_lens: [B] int32, query tokens per request, if the call gets any. The plan is then for
            these alone and for a causal mask, and leaves out the blocks of keys that a tile of rows
            does not see. That pays for chunks and ragged batches. None: for any query_lens, or with
            kv_axis for a call without them.
        cu_q_lens: [B + 1] int32, for packed tokens, as in the op. The plan is for these alone.

    Returns:
        The plan, a pytree: the arrays of its split and of its work list are data, all else is
        static.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, a profile that is not known or on which the tiles
            do not fit, or implementations of which none takes such a cache.
    """
    checks.require_shape("seq_lens", seq_lens, "[B]", None)
    checks.require_int32("seq_lens", seq_lens)
    checks.require_positive("B of seq_lens", seq_lens.shape[0])
    require_lengths(seq_lens)
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
    cache.check()
    num_heads = checks.require_positive("num_heads", num_heads)
    if num_heads > MOST_ROWS:
        raise ValueError(f"num_heads must be at most {MOST_ROWS}, got {num_heads}")
    tokens = checks.require_positive("num_query_tokens", num_query_tokens)
    if not isinstance(rescale, str):
        raise TypeError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
    checks.require_one_of("rescale", rescale, RESCALES)
    if max_seq_len is not None:
        max_seq_len = check_max_seq_len(max_seq_len)
    if query_lens is not None:
        check_query_lens(query_lens, len(seq_lens), tokens)
    seq_lens, query_lens = map(checks.snapshot, (seq_lens, query_lens))
    if cu_q_lens is not None:
        require_no_query_lens(query_lens)
        check_lengths("T = num_query_tokens", tokens, seq_lens, cu_q_lens, kv_axis=kv_axis)
        seq_lens, tokens = keys_seen(seq_lens, checks.snapshot(cu_q_lens), tokens), 1
    rows = num_heads
    if kv_axis is None:
        rows *= tokens
        if rows > MOST_ROWS:
            raise ValueError(
                f"num_heads * num_query_tokens must be at most {MOST_ROWS}, "
                f"got {num_heads} * {tokens}"
            )
    else:
        seq_lens = _keys_of_tokens(seq_lens, query_lens, tokens, cache, kv_axis)
        query_lens = None  # Each token is a request.
    request = PlanRequest(
        seq_lens, cache, rows, rescale, max_seq_len, _profile(profile), query_lens, num_heads
    )
    names = ("hopper", "split_kv") if implementation is None else check_names(implementation)
    reasons = {}
    for name in names:
        planner = IMPLEMENTATIONS[name].planner
        if planner is None:
            reasons[name] = "it takes no plan"
            continue
        plan = planner(request)
        if isinstance(plan, DecodePlan):
            return plan
        reasons[name] = plan
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"implementation: none of those named can be planned for: {listed}")


def _keys_of_tokens(
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    tokens: int,
    cache: PagedKVCache,
    kv_axis: str,
) -> jax.Array:
    """Returns [B * tokens] int32, the keys that each query token sees on this device."""
    shard = KeyShard.here(kv_axis, cache.page_size)
    shard.require_split({"seq_lens": seq_lens, "query_lens": query_lens})
    return shard.visible(seq_lens, query_lens, tokens, causal=True).reshape(-1)


def _profile(profile: Any) -> HardwareProfile | None:
    if profile is None or isinstance(profile, HardwareProfile):
        return profile
    if not isinstance(profile, str):
        raise TypeError(
            f"profile must be a HardwareProfile or a name, got {type(profile).__name__}"
        )
    return load_profile(profile)
