"""Derivatives of functions that JAX cannot differentiate: kernels, and loops of a traced length.

A `jax.custom_vjp` would rule out forward mode, and a `jax.custom_jvp` takes its reverse mode from
the transpose of the tangents, which a loop of a traced length does not have. Here the tangents are
one operation, `_derivative_p`. Forward mode computes it by JAX's own derivative of a plain-JAX
function with the same values. Its transpose is a function that computes the gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend import core
from jax.interpreters import ad, batching, mlir

SECOND_DERIVATIVES = (
    "the attention has first derivatives only, because kernels and loops compute them: for second "
    'derivatives use paged_mla_attention or mla_layer with implementation="reference", which is '
    "plain JAX throughout"
)


def differentiable(
    run: Callable[[Any], Any],
    *,
    twin: Callable[[Any], Any],
    gradients: Callable[[Any, Any, Any, Any], Any],
) -> Callable[[Any], Any]:
    """Returns `run` with first derivatives in forward and reverse mode, also under `jax.vmap`.

    Nothing but `run` is computed where no derivative is asked for. Second derivatives raise
    TypeError.

    Args:
        run: takes a pytree of arrays and returns a pytree of floats.
        twin: computes the same values in a way that JAX can differentiate in forward mode.
        gradients: takes that pytree, with True for each array whose gradient is asked for, and
            False for others; the pytree; the results of `run`; and their cotangents. It returns the
            gradients as a pytree like the first. Those that are not asked for may be anything.
    """

    @jax.custom_jvp
    def function(args: Any) -> Any:
        return run(args)

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def tangents_of(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        out = function(*primals)
        tree: Any
        out_tree: Any
        leaves, tree = jax.tree.flatten(primals[0])
        d_leaves = tree.flatten_up_to(tangents[0])
        outs, out_tree = jax.tree.flatten(out)
        moved = [i for i, d in enumerate(d_leaves) if not isinstance(d, SymbolicZero)]
        if not moved:
            return out, jax.tree.map(_zero_tangent, out)

        def push(*flat: jax.Array) -> list[jax.Array]:
            """Returns the tangents of the results, from the residuals and the moved tangents."""
            fixed, along = flat[: len(leaves)], flat[len(leaves) + len(outs) :]

            def of_moved(*arrays: jax.Array) -> list[jax.Array]:
                given = dict(enumerate(fixed)) | dict(zip(moved, arrays, strict=True))
                return jax.tree.leaves(twin(tree.unflatten(given.values())))

            return jax.jvp(of_moved, [fixed[i] for i in moved], list(along))[1]

        def pull(*flat: jax.Array) -> list[jax.Array]:
            """Returns the gradients of the moved arrays, from the residuals and the cotangents."""
            args = tree.unflatten(flat[: len(leaves)])
            results, cotangents = flat[len(leaves) :][: len(outs)], flat[len(leaves) + len(outs) :]
            wanted = tree.unflatten([i in moved for i in range(len(leaves))])
            of_wanted = functools.partial(gradients, wanted)
            found = without_derivative(of_wanted, SECOND_DERIVATIVES)(
                args, out_tree.unflatten(results), out_tree.unflatten(cotangents)
            )
            return [tree.flatten_up_to(found)[i] for i in moved]

        d_outs = _derivative_p.bind(
            *leaves,
            *outs,
            *(d_leaves[i] for i in moved),
            push=push,
            pull=pull,
            num_residuals=len(leaves) + len(outs),
            out_avals=tuple(jax.typeof(x).to_tangent_aval() for x in outs),
        )
        return out, out_tree.unflatten(d_outs)

    return _where_traced(function, run)


def without_derivative(
    function: Callable[..., Any], message: str, of: slice = slice(None)
) -> Callable[..., Any]:
    """Returns the function, which raises TypeError with the message if it is differentiated.

    of: the positional arguments that have no derivative. The others must not be differentiated
        together with them.
    """

    @jax.custom_jvp
    def refusing(*args: Any) -> Any:
        return function(*args)

    @functools.partial(refusing.defjvp, symbolic_zeros=True)
    def refuse(primals: tuple, tangents: tuple) -> Any:
        zeros = (isinstance(x, SymbolicZero) for x in jax.tree.leaves(tangents[of], is_leaf=_is_0))
        if not all(zeros):
            raise TypeError(message)
        out = refusing(*primals)
        return out, jax.tree.map(_zero_tangent, out)

    return _where_traced(refusing, function)


def _where_traced(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `plain` where no argument is traced: eager calls are faster."""

    def call(*args: Any) -> Any:
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        return function(*args) if traced else plain(*args)

    return call


def _is_0(node: Any) -> bool:
    return isinstance(node, SymbolicZero)


def _zero_tangent(x: jax.Array) -> Any:
    return zero_from_primal(x, symbolic_zeros=True)


# The tangents of results, linear in the tangents of the arrays that move. Its operands are the
# residuals (all arrays and results), then these tangents.
_derivative_p = core.Primitive("mla_derivative")
_derivative_p.multiple_results = True


@_derivative_p.def_impl
def _push(*operands: Any, push: Any, **_: Any) -> list[jax.Array]:
    return push(*operands)


@_derivative_p.def_abstract_eval
def _avals(*_: Any, out_avals: Any, **__: Any) -> list[Any]:
    return list(out_avals)


def _jvp(primals: Any, tangents: Any, *, num_residuals: int, **params: Any) -> Any:
    if not all(isinstance(x, ad.Zero) for x in tangents[:num_residuals]):
        raise TypeError(SECOND_DERIVATIVES)
    along = map(ad.instantiate_zeros, tangents[num_residuals:])
    bind = functools.partial(_derivative_p.bind, num_residuals=num_residuals, **params)
    return bind(*primals), bind(*primals[:num_residuals], *along)


def _transpose(cotangents: Any, *operands: Any, pull: Any, num_residuals: int, **_: Any) -> Any:
    given = pull(*operands[:num_residuals], *map(ad.instantiate_zeros, cotangents))
    return [None] * num_residuals + list(given)


def _batch(
    operands: Any, axes: Any, *, push: Any, pull: Any, num_residuals: int, out_avals: Any
) -> Any:
    sizes = (x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    size = next(sizes)
    # Each element of the batch has tangents of its own, so that JAX adds up the gradients of an
    # array that they share.
    residuals, axes, moved_axes = (
        operands[:num_residuals],
        axes[:num_residuals],
        axes[num_residuals:],
    )
    moved = [
        batching.bdim_at_front(x, axis, size)
        for x, axis in zip(operands[num_residuals:], moved_axes, strict=True)
    ]
    out = _derivative_p.bind(
        *residuals,
        *moved,
        push=jax.vmap(push, in_axes=(*axes, *[0] * len(moved))),
        pull=jax.vmap(pull, in_axes=(*axes, *[0] * len(out_avals))),
        num_residuals=num_residuals,
        out_avals=tuple(core.unmapped_aval(size, 0, aval) for aval in out_avals),
    )
    return out, [0] * len(out)


ad.primitive_jvps[_derivative_p] = _jvp
ad.primitive_transposes[_derivative_p] = _transpose
batching.primitive_batchers[_derivative_p] = _batch
mlir.register_lowering(_derivative_p, mlir.lower_fun(_push, multiple_results=True))
