"""A balanced plan by one kernel on a Hopper GPU, and in JAX elsewhere: chosen where it is lowered.

One process may plan on a GPU and on its CPU, and a CPU may export for a GPU, so the choice is made
when XLA's program is built. Both ways make the same plan to the bit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType

from mla_jax.sharding.target import Target
from mla_jax.splits.line import LARGEST
from mla_jax.splits.plan import SplitPlan
from mla_jax.splits.planner import Balance, balanced_plan
from pallas_kernels.hopper import device
from pallas_kernels.hopper.plan.call import refusal
from pallas_kernels.hopper.plan.kernel import make_plan
from pallas_kernels.hopper.work_items import work_list

type Made = tuple[SplitPlan, jax.Array, jax.Array]


def plan_where_lowered(
    seq_lens: jax.Array,
    query_lens: jax.Array | None,
    balance: Balance,
    *,
    finish: str,
    longest: int = LARGEST,
) -> Made:
    """Returns what `balanced_plan` does, and ranges and items of `work_list`.

    One kernel makes it on a Hopper GPU. JAX makes it on other platforms, under `jax.vmap`, where
    the compiler spreads the program over several devices, and where the kernel has a `refusal`.

    finish: as in `work_list`; "in_pairs" for plans in pairs only.
    longest: a longer length counts as this.
    """
    options: dict[str, Any] = {"balance": balance, "finish": finish, "longest": longest}
    in_jax = functools.partial(_in_jax, **options)
    if refusal(len(seq_lens), balance) is not None:
        return in_jax(seq_lens, query_lens)
    if jax.config.jax_disable_jit:
        return in_jax(seq_lens, query_lens)
    lens = jax.tree.leaves((seq_lens, query_lens if balance.num_heads else None))
    shapes = jax.eval_shape(in_jax, seq_lens, query_lens)
    made: Made = jax.tree.unflatten(jax.tree.structure(shapes), _plan_p.bind(*lens, **options))
    return made


@functools.partial(jax.jit, static_argnames=("balance", "finish", "longest"))
def _in_jax(
    seq_lens: jax.Array,
    query_lens: jax.Array | None = None,
    *,
    balance: Balance,
    finish: str,
    longest: int,
) -> Made:
    if longest < LARGEST:
        seq_lens = jnp.clip(seq_lens, 0, longest)
    split = balanced_plan(seq_lens, query_lens, balance)
    work = work_list(split, finish)
    return split, work.ranges, work.items


def _leaves_in_jax(*lens: jax.Array, **options: Any) -> list[jax.Array]:
    return jax.tree.leaves(_in_jax(*lens, **options))


def _leaves_by_kernel(
    seq_lens: jax.Array, query_lens: jax.Array | None = None, *, balance: Balance, **options: Any
) -> list[jax.Array]:
    return jax.tree.leaves(make_plan(seq_lens, query_lens, balance, **options))


_plan_p = core.Primitive("mla_decode_plan")
_plan_p.multiple_results = True


@_plan_p.def_impl
def _run(*lens: jax.Array, **options: Any) -> list[jax.Array]:
    return _jitted(*lens, **options)


@functools.partial(jax.jit, static_argnames=("balance", "finish", "longest"))
def _jitted(*lens: jax.Array, **options: Any) -> list[jax.Array]:
    return _plan_p.bind(*lens, **options)


@_plan_p.def_abstract_eval
def _shapes(*avals: Any, **options: Any) -> list[Any]:
    # The arrays vary over the manual axes of a shard_map that the lengths vary over.
    return list(jax.make_jaxpr(functools.partial(_leaves_in_jax, **options))(*avals).out_avals)


def _in_jax_under_vmap(args: Any, axes: Any, **options: Any) -> Any:
    out = jax.vmap(functools.partial(_leaves_in_jax, **options), in_axes=axes)(*args)
    return out, [0] * len(out)


def _lower(
    context: mlir.LoweringRuleContext, *lens: Any, platform: str | None = None, **options: Any
) -> Any:
    target = Target.of_lowering(context, platform)
    if device.target_lacks(target.platform, target.device) or target.partitioned:
        return mlir.lower_fun(functools.partial(_leaves_in_jax, **options))(context, *lens)
    # In a shard_map the kernel is the program of one device: it has no casts between types that
    # vary over different axes.
    whole = [aval.update(manual_axis_type=ManualAxisType()) for aval in context.avals_in]
    context = context.replace(avals_in=whole)
    return mlir.lower_fun(functools.partial(_leaves_by_kernel, **options))(context, *lens)


batching.primitive_batchers[_plan_p] = _in_jax_under_vmap
mlir.register_lowering(_plan_p, _lower)
for _name in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_plan_p, functools.partial(_lower, platform=_name), platform=_name)
