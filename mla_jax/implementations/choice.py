"""The choice among the implementations of an op, made for the platform that a call is lowered for.

That is not the platform of the machine's first device: one process may run programs on a GPU and on
its CPU, and a CPU may export for a GPU. What depends on the platform is therefore decided when
XLA's program is built (`_choice_p`), all else at once. A `Registry` holds the implementations of
one op by name.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType, PartitionSpec

from mla_jax import checks
from mla_jax.implementations.implementation import Implementation, Problem, runs_anywhere
from mla_jax.ragged.queries import first_part
from mla_jax.sharding.axes import dims_of, on_auto_axes, spec_of_dims
from mla_jax.sharding.target import Target
from mla_jax.splits.plan import SlowPlanWarning
from mla_jax.splits.residency import for_any_gpu


@dataclasses.dataclass(frozen=True, eq=False)
class Registry:
    """The implementations of one op.

    Attributes:
        implementations: each by its name.
        preferred: None selects the first of these that can run the problem.
    """

    implementations: dict[str, Implementation]
    preferred: tuple[str, ...]

    def check_names(self, implementation: Any) -> tuple[str, ...]:
        """Returns the names that the argument `implementation` stands for, in order.

        It takes None, a name, or a list or tuple of names. Raises TypeError for anything else, and
        ValueError for an unknown name or an empty list.
        """
        if implementation is None:
            return self.preferred
        known = ", ".join(self.implementations)
        wanted = f"None or one of {known}, or a list or tuple of them"
        names = [implementation] if isinstance(implementation, str) else implementation
        if not isinstance(names, list | tuple):
            raise TypeError(f"implementation must be {wanted}, got {implementation!r}")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"implementation must be {wanted}, got {implementation!r}")
            if name not in self.implementations:
                raise ValueError(f"implementation must be {wanted}, got {implementation!r}")
        if not names:
            raise ValueError(f"implementation must name at least one of {known}")
        return tuple(names)

    def choose(self, names: Sequence[str], problem: Problem) -> "Choice":
        """Returns those of the names that can take the problem.

        Where nothing is traced, the first of them can also run on this machine. Raises ValueError
        with every reason if none can.
        """
        asked = {name: self.implementations[name].refuses(problem) for name in names}
        fit = []
        for name, reason in asked.items():
            if reason is None:
                fit.append(name)
                if self.runs_on_any_target(name):
                    break
        choice = Choice(self, tuple(fit), tuple(asked.items()))
        if not fit or not (self.runs_on_any_target(fit[-1]) or _is_traced(problem)):
            choice.on(Target.here(problem), problem)
        return choice

    def runs_on_any_target(self, name: str) -> bool:
        return self.implementations[name].lacks is runs_anywhere


@dataclasses.dataclass(frozen=True)
class Choice:
    """Those of the named implementations that can take a problem, in order."""

    registry: Registry
    names: tuple[str, ...]  # up to the first that runs on any target
    asked: tuple[tuple[str, str | None], ...]  # all, and why each can't take the problem

    def on(self, target: Target, problem: Problem) -> Implementation:
        """Returns the first that can run the problem on the target.

        It warns where only the plan keeps one before it from running there. Raises ValueError with
        all reasons if none can.
        """
        reasons = dict(self.asked)
        plan_refused_by = None
        for name in self.names:
            one = self.registry.implementations[name]
            reasons[name] = one.lacks(target)
            if reasons[name] is None:
                reasons[name] = one.refuses_plan(problem, target)
                if reasons[name] is None:
                    if plan_refused_by is not None:
                        warn_of_plan(plan_refused_by, name, reasons[plan_refused_by])
                    return one
                plan_refused_by = plan_refused_by or name
        if len(reasons) == 1:
            [(name, reason)] = reasons.items()
            raise ValueError(f"implementation {name!r} can't run this: {reason}")
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"implementation: none of those named can run this: {listed}")

    def runs_on_any_target(self, name: str) -> bool:
        return self.registry.runs_on_any_target(name)


def warn_of_plan(refused_by: str, runs: str, reason: str | None) -> None:
    """Warns that an implementation does not take a plan, so that another one runs."""
    warnings.warn(
        f"implementation {refused_by!r} does not take this plan, so that {runs!r} runs: {reason}. "
        "With plan=None it plans for itself",
        SlowPlanWarning,
        stacklevel=5,
    )


def compute(problem: Problem, choice: Choice) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse, by the first of the choice that can run where the call is lowered for.

    On explicit mesh axes they are sharded as q is.
    """
    return _compute(problem, choice=choice)


def specs_of_outputs(problem: Problem) -> tuple[PartitionSpec, PartitionSpec]:
    """Returns the PartitionSpecs of o and lse: as q's."""
    rows = dims_of(first_part(problem.q))[:-1]
    return spec_of_dims(*rows, None), spec_of_dims(*rows)


@on_auto_axes(specs_of_outputs)
def _compute(problem: Problem, *, choice: Choice) -> tuple[jax.Array, jax.Array]:
    if choice.runs_on_any_target(choice.names[0]):
        return choice.registry.implementations[choice.names[0]].compute(problem)
    if jax.config.jax_disable_jit and not _is_traced(problem):
        return choice.on(Target.here(problem), problem).compute(problem)
    return _compute_where_lowered(problem, choice)


def _is_traced(problem: Problem) -> bool:
    with jax.ensure_compile_time_eval():
        eager = core.get_opaque_trace_state()
    # Under jit even what only constants are computed from is traced.
    return core.get_opaque_trace_state() != eager or not checks.is_concrete(
        *jax.tree.leaves(problem)
    )


@functools.partial(jax.jit, static_argnames="choice")
def _compute_where_lowered(problem: Problem, choice: Choice) -> tuple[jax.Array, jax.Array]:
    leaves, tree = jax.tree.flatten(problem)
    name = choice.names[-1]
    types = (
        leaves
        if _has_casts(choice, name)
        else [_without_manual_axes(jax.typeof(x)) for x in leaves]
    )
    last = jax.make_jaxpr(functools.partial(_compute_leaves, choice, name, tree))(*types)
    o, lse = _choice_p.bind(*leaves, tree=tree, choice=choice, last=last)
    return o, lse


def _has_casts(choice: Choice, name: str) -> bool:
    """Returns whether an implementation can be traced with manual axes in its arrays' types.

    Kernels have no casts between such types. In a shard_map they are traced without the axes, as
    the program of one device.
    """
    return choice.runs_on_any_target(name)


def _without_manual_axes(aval: Any) -> Any:
    return aval.update(manual_axis_type=ManualAxisType())


def _compute_leaves(
    choice: Choice, name: str, tree: Any, *leaves: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return choice.registry.implementations[name].compute(jax.tree.unflatten(tree, leaves))


# One call of the op by the first of `choice` that can run on what it is lowered for. The parameter
# `last` is the last of them, traced: it gives the outputs' shapes, dtypes and shardings, and stands
# for the whole choice under vmap, because the kernels of a GPU have no such rule. The others are
# traced only where they are lowered, so that a CPU's programs don't wait for them. Derivatives do
# not reach it: the ops have their own.
_choice_p = core.Primitive("mla_attention")
_choice_p.multiple_results = True


@_choice_p.def_impl
def _run_choice(*leaves: jax.Array, **params: Any) -> list[jax.Array]:
    return jax.jit(functools.partial(_choice_p.bind, **params))(*leaves)


@_choice_p.def_abstract_eval
def _choice_outputs(*avals: Any, choice: Choice, last: core.ClosedJaxpr, **_: Any) -> list[Any]:
    if _has_casts(choice, choice.names[-1]):
        return list(last.out_avals)
    axes = frozenset().union(*(aval.manual_axis_type.varying for aval in avals))
    return [out.update(manual_axis_type=ManualAxisType(varying=axes)) for out in last.out_avals]


def _vmap_of_last(args: Any, axes: Any, *, last: core.ClosedJaxpr, **_: Any) -> Any:
    out = jax.vmap(core.jaxpr_as_fun(last), in_axes=axes)(*args)
    return out, [0] * len(out)


def _lower_choice(
    context: mlir.LoweringRuleContext,
    *leaves: Any,
    tree: Any,
    choice: Choice,
    last: core.ClosedJaxpr,
    platform: str | None = None,
) -> Any:
    problem = jax.tree.unflatten(tree, context.avals_in)
    name = choice.on(Target.of_lowering(context, platform), problem).name
    if not _has_casts(choice, name):
        context = context.replace(avals_in=[_without_manual_axes(x) for x in context.avals_in])
        if _is_exported(context):
            # The last one too is traced anew: the export is not known where a call is traced.
            with for_any_gpu(True):
                function = functools.partial(_compute_leaves, choice, name, tree)
                return mlir.lower_fun(function)(context, *leaves)
    if name == choice.names[-1]:
        return mlir.lower_fun(core.jaxpr_as_fun(last))(context, *leaves)
    return mlir.lower_fun(functools.partial(_compute_leaves, choice, name, tree))(context, *leaves)


def _is_exported(context: mlir.LoweringRuleContext) -> bool:
    """Returns whether a program is lowered for `jax.export`: other machines may run it."""
    parameters = getattr(context.module_context, "lowering_parameters", None)
    return getattr(parameters, "for_export", False)


batching.primitive_batchers[_choice_p] = _vmap_of_last
mlir.register_lowering(_choice_p, _lower_choice)
for _name in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(
        _choice_p, functools.partial(_lower_choice, platform=_name), platform=_name
    )
