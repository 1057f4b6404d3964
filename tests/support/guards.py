"""Outputs with guards around them, for a Hopper kernel to leave alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.hopper import attention

GUARD_ROWS = 136  # behind each request: more than what a tile of two CTAs has
GUARD = 7.25  # which no result is


def run_guarded(attend: Any, q: Any, *args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel's `attend(q, *args, **options)` gives, from outputs that have guards.

    Raises AssertionError where anything but the rows of q [B, R, D] was written, or of its parts.
    """
    batch, rows, _ = jax.tree.leaves(q)[0].shape
    new_outputs = attention.new_outputs
    attention.new_outputs = _guarded_outputs
    try:
        o, lse = map(np.asarray, _jitted(attend.__wrapped__, tuple(options.items()))(q, *args))
    finally:
        attention.new_outputs = new_outputs
    for name, output in (("o", o), ("lse", lse)):
        guards = output.astype(np.float32)
        guards[:batch, :rows] = GUARD
        hit = np.argwhere(guards != GUARD)
        assert not len(hit), f"{name} was written at {hit[0].tolist()} and {len(hit) - 1} others"
    return o[:batch, :rows], lse[:batch, :rows]


@functools.cache
def _jitted(attend: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """(One function, so that a second batch of the same shapes does not compile again.)"""
    return jax.jit(functools.partial(attend, **dict(options)))


def _guarded_outputs(batch: int, rows: int, kv_lora_rank: int, dtype: Any) -> tuple[Any, Any]:
    """As `attention.new_outputs`, with guard rows behind each request and a request of guards."""
    shape = batch + 1, rows + GUARD_ROWS
    o = jnp.full((*shape, kv_lora_rank), GUARD, dtype)
    return jax.new_ref(o), jax.new_ref(jnp.full(shape, GUARD, jnp.float32))
