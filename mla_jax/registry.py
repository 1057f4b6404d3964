"""The implementations of `paged_mla_attention` by name: what each can run."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from mla_jax import checks
from mla_jax.implementations.blockwise import BLOCKWISE
from mla_jax.implementations.blockwise_scan import attend_xla
from mla_jax.implementations.choice import Choice, Registry, warn_of_plan
from mla_jax.implementations.dense import attend_reference
from mla_jax.implementations.hopper import HOPPER
from mla_jax.implementations.implementation import Implementation, PlanRequest
from mla_jax.implementations.split import attend_split_kv, plan_split_kv
from mla_jax.problem import AttentionProblem
from mla_jax.splits.decode_plan import DecodePlan


def _plan_split_kv(request: PlanRequest) -> DecodePlan:
    tokens = request.query_lens, request.num_heads
    return DecodePlan(plan_split_kv(request.seq_lens, request.rows, *tokens))


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("reference", attend_reference),
        Implementation("xla", attend_xla),
        Implementation("split_kv", attend_split_kv, planner=_plan_split_kv),
        BLOCKWISE,
        HOPPER,
    )
}
_REGISTRY = Registry(IMPLEMENTATIONS, preferred=("hopper", "xla"))


def available_implementations(problem: AttentionProblem | None = None) -> dict[str, str | None]:
    """Every implementation's name, and why an eager call can't run it here (None: it can).

    Args:
        problem: an `mla_jax.problem.AttentionProblem`, for which dtypes, layouts and sizes count
            too. None: only what this machine lacks counts.

    Raises TypeError for a problem of another type.
    """
    if problem is not None:
        checks.require_type("problem", problem, AttentionProblem)
    return {name: one.unavailable(problem) for name, one in IMPLEMENTATIONS.items()}


def check_names(implementation: Any) -> tuple[str, ...]:
    """Returns the names that an argument `implementation` stands for: `Registry.check_names`."""
    return _REGISTRY.check_names(implementation)


def choose(names: Sequence[str], problem: AttentionProblem) -> Choice:
    """Returns those of the names that can take the problem, as `Registry.choose`.

    It warns where only the plan keeps a preferred implementation from running here.
    """
    choice = _REGISTRY.choose(names, problem)
    _warn_of_plan(problem, choice)
    return choice


def _warn_of_plan(problem: AttentionProblem, choice: Choice) -> None:
    if problem.plan is None:
        return
    first, asked = choice.names[0], dict(choice.asked)
    without = dataclasses.replace(problem, plan=None)
    for name in itertools.takewhile(lambda name: name != first, asked):
        if IMPLEMENTATIONS[name].unavailable(without) is None:
            warn_of_plan(name, first, asked[name])
