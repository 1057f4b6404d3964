"""Traces kernels with JAX's defaults, whatever JAX's global switches are."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """Sets JAX's defaults of the switches that would change what is traced."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


def jit_with_defaults(*static_argnames: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function with `jax.jit` that traces and runs it with JAX's defaults.

    Kernels use 32-bit types throughout, so that `jax_enable_x64` has nothing to change. Partial
    results may be NaN where no code reads them, which `jax_debug_nans` would report. A kernel can't
    run primitive by primitive, as with `jax_disable_jit`.

    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function, static_argnames=static_argnames)

        @functools.wraps(function)
        def with_defaults(*args: Any, **kwargs: Any) -> Any:
            with _defaults():
                return jitted(*args, **kwargs)

        return with_defaults

    return decorated
