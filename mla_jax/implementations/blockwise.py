"""The implementation `blockwise`: a schedule of the HAL, executed by `pallas_kernels.blockwise`."""

from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.implementations.implementation import Implementation
from mla_jax.implementations.kernels import kernels_missing
from mla_jax.problem import AttentionProblem
from mla_jax.quantize import GROUP
from mla_jax.sharding.target import Target

BLOCKWISE_SCORES = 2**20  # at most per call: interpret mode takes about a second for them


def _attend(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    from mla_jax.hal.orders import ASCEND_ORDERS
    from pallas_kernels.blockwise import blockwise_mla, blockwise_mla_int8

    run: Any = blockwise_mla
    order = "amla" if problem.rescale == "exponent_add" else "chunk4"
    if problem.cache.dtype == jnp.int8:
        run, order = blockwise_mla_int8, "int8-2-signals"
    o, lse = run(
        problem.query_rows(),
        problem.cache,
        problem.block_tables,
        problem.seq_lens,
        problem.visible_keys(),
        softmax_scale=problem.softmax_scale,
        order=ASCEND_ORDERS[order],
    )
    return problem.outputs(o, lse)


def _lacks(_: Target) -> str | None:
    return kernels_missing("blockwise")


def _refuses(problem: AttentionProblem) -> str | None:
    if problem.cache.dtype == jnp.int8:
        if problem.cache.scale_granularity == "group":
            return (
                "it takes scale_granularity token or tensor, got group: scales per "
                f"{GROUP} columns can't be multiplied into P, which is the same for all columns"
            )
        if problem.rescale != "multiply":
            return (
                f"it takes rescale multiply with an int8 cache, got {problem.rescale}: AMLA adds "
                "P.V to O in memory, which int32 products do not allow"
            )
    capacity = problem.block_tables.shape[1] * problem.cache.page_size
    scores = problem.q.shape[0] * problem.num_rows * capacity
    if scores > BLOCKWISE_SCORES:
        return (
            "it executes its schedule in interpret mode and takes at most "
            f"{BLOCKWISE_SCORES} scores (requests * rows * tokens of a block table), got {scores}"
        )
    return None


BLOCKWISE = Implementation("blockwise", _attend, _refuses, _lacks)
