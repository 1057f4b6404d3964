"""The implementation `blockwise`: a schedule of the HAL, executed by `pallas_kernels.blockwise`."""

import jax
import jax.numpy as jnp

from mla_jax.implementations.implementation import Implementation, Target
from mla_jax.implementations.kernels import kernels_missing
from mla_jax.problem import AttentionProblem

BLOCKWISE_SCORES = 2**20  # at most per call: interpret mode takes about a second for them


def _attend(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
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


def _lacks(_: Target) -> str | None:
    return kernels_missing("blockwise")


def _refuses(problem: AttentionProblem) -> str | None:
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


BLOCKWISE = Implementation("blockwise", _attend, _refuses, _lacks)
