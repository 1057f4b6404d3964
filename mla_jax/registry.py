"""The implementations of the attention op by name: what each can run, and the choice among them.

The choice is made for the platform that a call is lowered for, not for the machine's first device:
one process may run programs on a GPU and on its CPU, and a CPU may export for a GPU. What depends
on the platform is therefore decided when XLA's program is built (`_choice_p`), all else at once.

This is the one file that imports `pallas_kernels`, and only inside functions, so that neither
package needs the other to be imported.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from mla_jax import checks
from mla_jax.cache import PagedKVCache
from mla_jax.hal import HardwareProfile, TilePlanError
from mla_jax.implementations.blockwise_scan import attend_xla
from mla_jax.implementations.dense import attend_reference
from mla_jax.implementations.split import attend_split_kv, plan_split_kv
from mla_jax.problem import AttentionProblem
from mla_jax.splits.decode_plan import DecodePlan
from mla_jax.splits.plan import SlowPlanWarning

BLOCKWISE_SCORES = 2**20  # at most per call: interpret mode takes about a second for them
_KERNELS = Path(__file__).resolve().parents[1] / "pallas_kernels"  # ours, should another shadow it


@dataclasses.dataclass(frozen=True)
class Target:
    """The platform and device that a call is compiled for."""

    platform: str  # as JAX names it for lowering: "cpu", "cuda", "rocm", "tpu", ...
    device: jax.Device | None = None  # None: not known, e.g. where a program is exported
    partitioned: bool = False  # whether the compiler spreads the call over several devices

    @staticmethod
    def here(problem: AttentionProblem | None = None) -> "Target":
        """Returns where an eager call runs: where its arrays are committed, else by default."""
        for array in jax.tree.leaves(problem):
            traced = isinstance(array, jax.core.Tracer)
            if isinstance(array, jax.Array) and not traced and array.committed:
                devices = sorted(array.devices(), key=lambda device: device.id)
                return Target(_platform(devices[0]), devices[0], len(devices) > 1)
        default = jax.config.jax_default_device
        if default is None or isinstance(default, str):
            default = jax.devices(default)[0]
        return Target(_platform(default), default)

    @staticmethod
    def of_lowering(context: mlir.LoweringRuleContext, platform: str | None) -> "Target":
        """Returns what a lowering rule lowers for.

        platform: the one that the rule is registered for; None: it is registered for all.
        """
        module = context.module_context
        platform = platform or (context.platforms or module.platforms)[0]
        axes: Any = module.axis_context
        if hasattr(axes, "manual_axes"):  # in a shard_map: whole for each device if over all axes
            partitioned = len(axes.manual_axes) < len(axes.mesh.axis_names)
        else:
            partitioned = axes.num_devices > 1
        devices = getattr(axes, "device_assignment", None) or ()
        device = next((one for one in devices if _platform(one) == platform), None)
        if device is None:
            try:
                device = jax.devices(platform)[0]
            except RuntimeError:  # this machine has none, or JAX has not been told to use it
                device = None
        return Target(platform, device, partitioned)


def _platform(device: jax.Device) -> str:
    if device.platform != "gpu":
        return device.platform
    capability = str(getattr(device, "compute_capability", ""))
    return "rocm" if capability.startswith("gfx") else "cuda"


class PlanRequest(NamedTuple):
    """What `mla_jax.plan_decode` asks an implementation for, checked."""

    seq_lens: jax.Array  # [B] int32
    cache: PagedKVCache
    rows: int  # query rows per request
    rescale: str
    max_seq_len: int | None  # keys that a block table reaches
    profile: HardwareProfile | None  # None: this machine's device


def _takes_any(_: AttentionProblem) -> str | None:
    return None


def _runs_anywhere(_: Target) -> str | None:
    return None


def _kernels_missing(name: str) -> str | None:
    """Returns why `pallas_kernels.name` can't be imported; None where it can."""
    loaded = sys.modules.get(f"{_KERNELS.name}.{name}")
    if loaded is not None and _is_in_kernels(str(loaded.__file__)):
        return None
    package = sys.modules.get(_KERNELS.name)
    try:
        spec = importlib.util.find_spec(_KERNELS.name) if package is None else package.__spec__
    except ValueError:  # a module that was put into sys.modules without a spec
        spec = None
    places: list[str | None] = []
    if spec is not None:
        places.extend(spec.submodule_search_locations or [spec.origin])
    found = [place for place in places if place]
    if _KERNELS.is_dir() and not any(map(_is_in_kernels, found)):
        return (
            f"its package {_KERNELS.name} is shadowed by {', '.join(found) or 'another module'}, "
            f"which Python finds before {_KERNELS}: rename that one, or take the folder that it "
            "is in from the front of sys.path"
        )
    try:
        importlib.import_module(f"{_KERNELS.name}.{name}")
    except ImportError as error:
        return f"{_KERNELS.name}.{name} can't be imported: {error}"
    return None


@functools.cache
def _is_in_kernels(path: str) -> bool:
    return Path(path).resolve().is_relative_to(_KERNELS)


def _attend_hopper(problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.hopper import attention

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
        o, lse = attention.attend_int8(
            problem.query_rows(), cache.pages, cache.rope_pages, cache.scales, *work, **options
        )
    shape = problem.q.shape[:3]
    return o.reshape(*shape, cache.kv_lora_rank), lse.reshape(shape)


def _hopper_missing(name: str) -> str | None:
    """Returns why `hopper.name` can't be imported or its kernels can't run with this JAX, or None.

    `hopper.mosaic` refuses versions of JAX that the kernels are not tested with.
    """
    return _kernels_missing("hopper.mosaic") or _kernels_missing(f"hopper.{name}")


def _hopper_lacks(target: Target) -> str | None:
    missing = _hopper_missing("attention")
    if missing is not None:
        return missing
    from pallas_kernels.hopper import device

    reason = device.target_lacks(target.platform, target.device)
    if reason is None and target.partitioned:
        return "the compiler can't partition it over devices: call it inside jax.shard_map"
    return reason


def _hopper_refuses(problem: AttentionProblem) -> str | None:
    missing = _hopper_missing("attention")
    if missing is not None:
        return missing
    from pallas_kernels.hopper import planning

    return planning.refuses(problem.q.dtype, problem.cache, problem.rescale, problem.plan)


def _plan_hopper(request: PlanRequest) -> DecodePlan | str:
    missing = _hopper_missing("planning")
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
        )
    except TilePlanError as error:
        return str(error)


def _plan_split_kv(request: PlanRequest) -> DecodePlan:
    return DecodePlan(plan_split_kv(request.seq_lens, request.rows))


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


def _blockwise_lacks(_: Target) -> str | None:
    return _kernels_missing("blockwise")


def _blockwise_refuses(problem: AttentionProblem) -> str | None:
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

    Attributes:
        run: takes a problem and returns o [B, S, H, kv_lora_rank] of q's dtype and lse [B, S, H]
            float32.
        refuses: returns why it can't take a problem on any machine, or None if it can.
        lacks: returns why it can't run on a platform and device, or None if it can.
        finds_invalid: whether `run` finds invalid requests and gives them NaN itself. Other
            implementations get seq_lens = -1 for such requests.
        planner: makes a plan, or returns why it can't; None: the implementation takes no plan.
    """

    name: str
    run: Callable[[AttentionProblem], tuple[jax.Array, jax.Array]]
    refuses: Callable[[AttentionProblem], str | None] = _takes_any
    lacks: Callable[[Target], str | None] = _runs_anywhere
    finds_invalid: bool = False
    planner: Callable[[PlanRequest], DecodePlan | str] | None = None

    def unavailable(self, problem: AttentionProblem | None = None) -> str | None:
        """Returns why an eager call could not run the problem here; None where it could.

        Without a problem it returns why this machine could run none.
        """
        reason = self.lacks(Target.here(problem))
        return self.refuses(problem) if reason is None and problem is not None else reason

    def compute(self, problem: AttentionProblem) -> tuple[jax.Array, jax.Array]:
        """Returns o and lse, with NaN for invalid requests."""
        return self.run(problem if self.finds_invalid else problem.mark_invalid())


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("reference", attend_reference),
        Implementation("xla", attend_xla),
        Implementation("split_kv", attend_split_kv, planner=_plan_split_kv),
        Implementation("blockwise", _attend_blockwise, _blockwise_refuses, _blockwise_lacks),
        Implementation(
            "hopper",
            _attend_hopper,
            _hopper_refuses,
            _hopper_lacks,
            finds_invalid=True,
            planner=_plan_hopper,
        ),
    )
}
_PREFERRED = ("hopper", "xla")  # None selects the first of these that can run the problem


def available_implementations(problem: AttentionProblem | None = None) -> dict[str, str | None]:
    """Every implementation's name, and why an eager call can't run it here (None: it can).

    Args:
        problem: an `mla_jax.problem.AttentionProblem`, for which dtypes, layouts and sizes count
            too. None: only what this machine lacks counts.
    """
    return {name: one.unavailable(problem) for name, one in IMPLEMENTATIONS.items()}


def check_names(implementation: Any) -> tuple[str, ...]:
    """Returns the names that the argument `implementation` stands for, in order.

    It takes None, a name, or a list or tuple of names. Raises TypeError for anything else, and
    ValueError for an unknown name or an empty list.
    """
    if implementation is None:
        return _PREFERRED
    wanted = f"None or one of {', '.join(IMPLEMENTATIONS)}, or a list or tuple of them"
    names = [implementation] if isinstance(implementation, str) else implementation
    if not isinstance(names, list | tuple):
        raise TypeError(f"implementation must be {wanted}, got {implementation!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"implementation must be {wanted}, got {implementation!r}")
        if name not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be {wanted}, got {implementation!r}")
    if not names:
        raise ValueError(f"implementation must name at least one of {', '.join(IMPLEMENTATIONS)}")
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Those of the named implementations that can take a problem, in order."""

    names: tuple[str, ...]  # up to the first that runs on any target
    asked: tuple[tuple[str, str | None], ...]  # all, and why each can't take the problem

    def on(self, target: Target) -> Implementation:
        """Returns the first that can run on the target; ValueError with all reasons if none can."""
        reasons = dict(self.asked)
        for name in self.names:
            reasons[name] = IMPLEMENTATIONS[name].lacks(target)
            if reasons[name] is None:
                return IMPLEMENTATIONS[name]
        if len(reasons) == 1:
            [(name, reason)] = reasons.items()
            raise ValueError(f"implementation {name!r} can't run this: {reason}")
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"implementation: none of those named can run this: {listed}")


def choose(names: Sequence[str], problem: AttentionProblem) -> Choice:
    """Returns those of the names that can take the problem.

    Where nothing is traced, the first of them can also run on this machine. Raises ValueError with
    every reason if none can.
    """
    asked = {name: IMPLEMENTATIONS[name].refuses(problem) for name in names}
    fit = []
    for name, reason in asked.items():
        if reason is None:
            fit.append(name)
            if _runs_on_any_target(name):
                break
    _warn_of_plan(problem, fit, asked)
    choice = Choice(tuple(fit), tuple(asked.items()))
    if not fit or not (_runs_on_any_target(fit[-1]) or _is_traced(problem)):
        choice.on(Target.here(problem))
    return choice


def _warn_of_plan(problem: AttentionProblem, fit: list[str], asked: dict[str, str | None]) -> None:
    """Warns where only the plan keeps a preferred implementation from running here."""
    if problem.plan is None or not fit:
        return
    without = dataclasses.replace(problem, plan=None)
    for name in itertools.takewhile(lambda name: name != fit[0], asked):
        if IMPLEMENTATIONS[name].unavailable(without) is None:
            warnings.warn(
                f"implementation {name!r} does not take this plan, so that {fit[0]!r} runs: "
                f"{asked[name]}. With plan=None it plans for itself",
                SlowPlanWarning,
                stacklevel=4,
            )


def _runs_on_any_target(name: str) -> bool:
    return IMPLEMENTATIONS[name].lacks is _runs_anywhere


def compute(problem: AttentionProblem, choice: Choice) -> tuple[jax.Array, jax.Array]:
    """Returns o and lse, by the first of the choice that can run where the call is lowered for."""
    if _runs_on_any_target(choice.names[0]):
        return IMPLEMENTATIONS[choice.names[0]].compute(problem)
    if jax.config.jax_disable_jit and not _is_traced(problem):
        return choice.on(Target.here(problem)).compute(problem)
    return _compute_where_lowered(problem, choice)


def _is_traced(problem: AttentionProblem) -> bool:
    with jax.ensure_compile_time_eval():
        eager = core.get_opaque_trace_state()
    # Under jit even what only constants are computed from is traced.
    return core.get_opaque_trace_state() != eager or not checks.is_concrete(
        *jax.tree.leaves(problem)
    )


@functools.partial(jax.jit, static_argnames="choice")
def _compute_where_lowered(
    problem: AttentionProblem, choice: Choice
) -> tuple[jax.Array, jax.Array]:
    leaves, tree = jax.tree.flatten(problem)
    last = functools.partial(_compute_leaves, choice.names[-1], tree)
    o, lse = _choice_p.bind(*leaves, tree=tree, choice=choice, last=jax.make_jaxpr(last)(*leaves))
    return o, lse


def _compute_leaves(name: str, tree: Any, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    return IMPLEMENTATIONS[name].compute(jax.tree.unflatten(tree, leaves))


# One call of the op by the first of `choice` that can run on what it is lowered for. The parameter
# `last` is the last of them, traced: it gives the outputs' shapes, dtypes and shardings, and stands
# for the whole choice under jvp and vmap, because the kernels of a GPU have no such rules. The
# others are traced only where they are lowered, so that a CPU's programs don't wait for them.
_choice_p = core.Primitive("paged_mla_attention")
_choice_p.multiple_results = True


@_choice_p.def_impl
def _run_choice(*leaves: jax.Array, **params: Any) -> list[jax.Array]:
    return jax.jit(functools.partial(_choice_p.bind, **params))(*leaves)


@_choice_p.def_abstract_eval
def _choice_outputs(*_: Any, last: core.ClosedJaxpr, **__: Any) -> list[Any]:
    return list(last.out_avals)


def _jvp_of_last(primals: Any, tangents: Any, *, last: core.ClosedJaxpr, **_: Any) -> Any:
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def run(*moved: jax.Array) -> list[jax.Array]:
        leaves = dict(enumerate(primals)) | dict(zip(moving, moved, strict=True))
        return core.jaxpr_as_fun(last)(*leaves.values())

    return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])


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
    name = choice.on(Target.of_lowering(context, platform)).name
    if name == choice.names[-1]:
        return mlir.lower_fun(core.jaxpr_as_fun(last))(context, *leaves)
    return mlir.lower_fun(functools.partial(_compute_leaves, name, tree))(context, *leaves)


ad.primitive_jvps[_choice_p] = _jvp_of_last
batching.primitive_batchers[_choice_p] = _vmap_of_last
mlir.register_lowering(_choice_p, _lower_choice)
for _name in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(
        _choice_p, functools.partial(_lower_choice, platform=_name), platform=_name
    )
