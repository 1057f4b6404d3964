"""The implementation `hopper` of `ragged_mla_attention`: a kernel of `pallas_kernels.hopper`."""

import jax

from mla_jax.implementations.hopper import modules_missing, target_lacks
from mla_jax.implementations.implementation import Implementation, Target
from mla_jax.ragged.problem import RaggedProblem

_MODULE = "prefill.attention"
_DTYPES = ("bfloat16", "float16")
_WIDTHS = ((128, 64, 128),)  # of k_nope, k_rope and v


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
    if problem.q.dtype.name not in _DTYPES:
        return f"it takes {' or '.join(_DTYPES)}, got {problem.q.dtype.name}"
    widths = problem.k_nope.shape[-1], problem.k_rope.shape[-1], problem.v.shape[-1]
    if widths not in _WIDTHS:
        listed = " or ".join(map(str, _WIDTHS))
        return f"it takes widths (k_nope, k_rope, v) of {listed}, got {widths}"
    return modules_missing(_MODULE)


RAGGED_HOPPER = Implementation("hopper", _attend, _refuses, _lacks, finds_invalid=True)
