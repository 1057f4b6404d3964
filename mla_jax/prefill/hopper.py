"""The implementation `hopper` of `ragged_mla_attention`: a kernel of `pallas_kernels.hopper`."""

import jax

from mla_jax.implementations.hopper import modules_missing, target_lacks
from mla_jax.implementations.implementation import Implementation
from mla_jax.ragged.problem import RaggedProblem
from mla_jax.sharding.target import Target

_MODULE = "prefill.attention"


def _attend(problem: RaggedProblem) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.hopper.prefill import attention

    return attention.attend_ragged(
        problem.q,
        problem.k_nope,
        problem.k_rope,
        problem.v,
        problem.cu_q_lens,
        problem.cu_kv_lens,
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
    )


def _lacks(target: Target) -> str | None:
    return target_lacks(_MODULE, target)


def _refuses(problem: RaggedProblem) -> str | None:
    missing = modules_missing(_MODULE)
    if missing is not None:
        return missing
    from pallas_kernels.hopper.prefill import attention

    return attention.refusal(
        problem.q.dtype,
        nope_dim=problem.k_nope.shape[-1],
        rope_dim=problem.k_rope.shape[-1],
        v_dim=problem.v.shape[-1],
    )


RAGGED_HOPPER = Implementation("hopper", _attend, _refuses, _lacks, finds_invalid=True)
