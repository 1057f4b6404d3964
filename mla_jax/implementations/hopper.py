"""The implementation `hopper`: the Mosaic GPU kernels of `pallas_kernels.hopper`."""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.hal import TilePlanError
from mla_jax.implementations.implementation import Implementation, PlanRequest
from mla_jax.implementations.kernels import kernels_missing
from mla_jax.problem import AttentionProblem
from mla_jax.ragged.queries import Queries
from mla_jax.sharding.target import Target
from mla_jax.splits.decode_plan import DecodePlan


def _attend(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.hopper import attention

    cache, batch = problem.cache, len(problem.seq_lens)
    # The parts of q stay apart.
    q = jax.tree.map(lambda part: part.reshape(batch, problem.num_rows, -1), problem.q)
    q = tuple(q) if isinstance(q, Queries) else q
    work = problem.block_tables, problem.seq_lens, problem.query_lens, problem.plan
    options: dict[str, Any] = {
        "num_heads": problem.q.shape[2],
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        "partial_dtype": problem.partial_dtype,
    }
    if cache.rope_pages is None or cache.scales is None:
        rank, rescale = cache.kv_lora_rank, problem.rescale
        o, lse = attention.attend(
            q, cache.pages, *work, kv_lora_rank=rank, rescale=rescale, **options
        )
    else:
        o, lse = attention.attend_int8(
            q, cache.pages, cache.rope_pages, cache.scales, *work, **options
        )
    shape = problem.q.shape[:3]
    return o.reshape(*shape, cache.kv_lora_rank), lse.reshape(shape)


def modules_missing(name: str) -> str | None:
    """Returns why `hopper.name` can't be imported or its kernels can't run with this JAX, or None.

    `hopper.mosaic` refuses versions of JAX that the kernels are not tested with.
    """
    return kernels_missing("hopper.mosaic") or kernels_missing(f"hopper.{name}")


def target_lacks(name: str, target: Target) -> str | None:
    """Returns why the kernels of `hopper.name` can't run on a target; None where they can."""
    missing = modules_missing(name)
    if missing is not None:
        return missing
    from pallas_kernels.hopper import device

    reason = device.target_lacks(target.platform, target.device)
    if reason is None and target.partitioned:
        return "the compiler can't partition it over devices: call it inside jax.shard_map"
    return reason


def _lacks(target: Target) -> str | None:
    return target_lacks("attention", target)


def _refuses(problem: AttentionProblem) -> str | None:
    missing = modules_missing("attention")
    if missing is not None:
        return missing
    from pallas_kernels.hopper import planning

    return planning.refuses(problem.q.dtype, problem.cache, problem.rescale, problem.plan)


def _refuses_plan(problem: AttentionProblem, target: Target) -> str | None:
    """Returns why a plan is not for the GPU that a program is for, where that is known."""
    num_sms = getattr(target.device, "core_count", None)
    if problem.plan is None or num_sms is None:
        return None
    from pallas_kernels.hopper import planning

    memory = getattr(target.device, "shared_memory_per_block_optin", None)
    return planning.refuses_sms(problem.plan, num_sms) or planning.refuses_shared_memory(
        problem.plan, memory
    )


def _plan(request: PlanRequest) -> DecodePlan | str:
    missing = modules_missing("planning")
    if missing is not None:
        return missing
    from pallas_kernels.hopper import planning

    cache = request.cache
    q_dtype = jnp.bfloat16 if cache.dtype == jnp.int8 else cache.dtype
    reason = planning.refuses(q_dtype, cache, request.rescale, None)
    if reason is not None:
        return reason
    try:
        return planning.plan_decode(
            request.seq_lens,
            request.rows,
            capacity=request.max_seq_len,
            cache=planning.kind_of(cache),
            rescale=request.rescale,
            kv_lora_rank=cache.kv_lora_rank,
            rope_dim=cache.rope_dim,
            profile=request.profile,
            query_lens=request.query_lens,
            num_heads=request.num_heads,
        )
    except TilePlanError as error:
        return str(error)


def tiles_to_json(tiles: Any) -> dict[str, Any]:
    """Returns the tiles of a plan as what JSON holds."""
    from pallas_kernels.hopper import serialized

    return serialized.config_to_json(tiles)


def tiles_from_json(stored: dict[str, Any]) -> Any:
    """Returns the tiles of a plan; ValueError if they are not those of a kernel of this version."""
    missing = kernels_missing("hopper.serialized")
    if missing is not None:
        raise ValueError(f"the tiles of a plan can't be read: {missing}")
    from pallas_kernels.hopper import serialized

    return serialized.config_from_json(stored)


HOPPER = Implementation(
    "hopper", _attend, _refuses, _lacks, _refuses_plan, finds_invalid=True, planner=_plan
)
