"""Chooses the implementations of an experiment: --implementations, or all that can run here."""

from typing import Any

from experiments.framework.experiment import InputError
from experiments.framework.options import flag
from mla_jax.problem import AttentionProblem
from mla_jax.registry import available_implementations


def implementations_flag() -> Any:
    """Returns the field of Options whose value `chosen` takes."""
    return flag((), "which to run, as a,b; by default all that can run here")


def chosen(wanted: tuple[str, ...]) -> list[str]:
    """Returns the names to run. Raises InputError for one that is unknown or can't run here."""
    reasons = available_implementations()
    for name in wanted:
        if name not in reasons:
            raise InputError(f"--implementations must be of {', '.join(reasons)}, got {name!r}")
        if reasons[name] is not None:
            raise InputError(f"--implementations: {name} can't run here: {reasons[name]}")
    return list(wanted) or [name for name, reason in reasons.items() if reason is None]


def require_runs(wanted: str | None, problem: AttentionProblem | None = None) -> None:
    """Raises InputError unless --implementation, if given, can run here and on the problem."""
    reason = None if wanted is None else available_implementations(problem)[wanted]
    if reason is not None:
        raise InputError(f"--implementation: {wanted} can't run this here: {reason}")
