"""Name -> implementation of the attention op: what each can run here, and the choice for None.

This is the one file that imports `pallas_kernels`, and only inside functions, so that neither
package needs the other to be imported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.problem import AttentionProblem
from mla_jax.pure_jax import attend_reference, attend_split_kv, attend_xla

BLOCKWISE_SCORES = 2**20  # at most, in a call: interpret mode takes a second or so for them


def _runs_anywhere(problem: AttentionProblem | None) -> str | None:
    return None


def _attend_hopper(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.hopper import attention, int8

    cache = problem.cache
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
            problem.query_rows(), cache.pages, *work, kv_lora_rank=rank, rescale=rescale, **options
        )
    else:
        o, lse = int8.attend_int8(
            problem.query_rows(), cache.pages, cache.rope_pages, cache.scales, *work, **options
        )
    shape = problem.q.shape[:3]
    return o.reshape(*shape, cache.kv_lora_rank), lse.reshape(shape)


def _hopper_unavailable(problem: AttentionProblem | None) -> str | None:
    from pallas_kernels.hopper import attention

    reason = attention.machine_lacks()
    if reason is not None or problem is None:
        return reason
    return attention.refuses(problem.q.dtype, problem.cache, problem.rescale, problem.plan)


def _attend_blockwise(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    from mla_jax.hal.orders import ASCEND_ORDERS
    from pallas_kernels.blockwise import blockwise_mla

    o, lse = blockwise_mla(
        problem.query_rows(),
        problem.cache,
        problem.block_tables,
        problem.seq_lens,
        problem.visible_keys(),
        softmax_scale=problem.softmax_scale,
        order=ASCEND_ORDERS["amla" if problem.rescale == "exponent_add" else "chunk4"],
    )
    return problem.outputs(o, lse)


def _blockwise_unavailable(problem: AttentionProblem | None) -> str | None:
    if problem is None:
        return None
    if problem.cache.dtype == jnp.int8:
        return "it takes caches of floating point, got int8"
    capacity = problem.block_tables.shape[1] * problem.cache.page_size
    scores = problem.q.shape[0] * problem.num_rows * capacity
    if scores > BLOCKWISE_SCORES:
        return (
            "it walks its schedule in interpret mode and takes at most "
            f"{BLOCKWISE_SCORES} scores (requests * rows * tokens of a block table), got {scores}"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the op.

    `run(problem)` gives o [B, S, H, kv_lora_rank] of q's dtype and lse [B, S, H] float32.
    `unavailable(problem)` says why it can't run that problem here, or None if it can; without a
    problem, only whether this machine could. `finds_invalid`: `run` takes lengths and pages as they
    came and gives invalid requests NaN itself; others are given seq_lens = -1 for those.
    """

    name: str
    run: Callable[[AttentionProblem], tuple[jax.Array, jax.Array]]
    unavailable: Callable[[AttentionProblem | None], str | None] = _runs_anywhere
    finds_invalid: bool = False


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("reference", attend_reference),
        Implementation("xla", attend_xla),
        Implementation("split_kv", attend_split_kv),
        Implementation("blockwise", _attend_blockwise, _blockwise_unavailable),
        Implementation("hopper", _attend_hopper, _hopper_unavailable, finds_invalid=True),
    )
}
_PREFERRED = ("hopper", "xla")  # for None: the first of these that can run the problem


def available_implementations(problem: AttentionProblem | None = None) -> dict[str, str | None]:
    """Every implementation's name, and why it can't run here (None: it can)."""
    return {name: one.unavailable(problem) for name, one in IMPLEMENTATIONS.items()}


def choose(name: str | None, problem: AttentionProblem) -> Implementation:
    """The implementation of that name, or for None the best that can run the problem here.

    Raises ValueError for an unknown name, or one that can't run, and says why.
    """
    if name is None:
        return next(
            IMPLEMENTATIONS[best]
            for best in _PREFERRED
            if IMPLEMENTATIONS[best].unavailable(problem) is None
        )
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    reason = IMPLEMENTATIONS[name].unavailable(problem)
    if reason is not None:
        raise ValueError(f"implementation {name!r} can't run this: {reason}")
    return IMPLEMENTATIONS[name]
