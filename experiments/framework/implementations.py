"""Which implementations an experiment runs: --implementations, or all that can run here."""

from typing import Any

from experiments.framework.experiment import InputError
from experiments.framework.options import flag
from mla_jax.problem import AttentionProblem
from mla_jax.registry import available_implementations


def implementations_flag() -> Any:
    """The field of Options that `chosen` takes."""
    return flag((), "which to run, as a,b; all that can run here if not given")


def chosen(wanted: tuple[str, ...]) -> list[str]:
    """The names to run. Raises InputError for one that isn't known or can't run here."""
    reasons = available_implementations()
    for name in wanted:
        if name not in reasons:
            raise InputError(f"--implementations must be of {', '.join(reasons)}, got {name!r}")
        if reasons[name] is not None:
            raise InputError(f"--implementations: {name} can't run here: {reasons[name]}")
    return list(wanted) or [name for name, reason in reasons.items() if reason is None]


def require_runs(wanted: str | None, problem: AttentionProblem | None = None) -> None:
    """Raises InputError unless --implementation, if given, can run here, and run the problem."""
    reason = None if wanted is None else available_implementations(problem)[wanted]
    if reason is not None:
        raise InputError(f"--implementation: {wanted} can't run this here: {reason}")
