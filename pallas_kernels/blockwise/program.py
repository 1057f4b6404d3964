"""A hal Schedule in the form that the kernel reads: one row of int32 per step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mla_jax.hal.schedule import Schedule, Step

# The ops of a program. They are the stages of schedules, except that QK on loaded keys is QK_LOADED
# and that PV that adds to O is ACCUMULATE.
OPS = (
    "LOAD_L", "LOAD_R", "QK", "QK_LOADED", "QK_NOPE", "QK_ROPE", "DEQUANT", "SM",
    "PV", "ACCUMULATE", "ADD", "UP", "PV_L", "PV_R",
)  # fmt: skip
COLUMNS = ("op", "block", "kv", "s", "p", "otmp")
_SKIPPED = {"LOAD_Q", "ISSUE", "WIDEN", "STORE_L", "STORE_R"}  # these stages move no data here


def compile_schedule(schedule: Schedule) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns (names of the ops, int32 [steps, len(COLUMNS)] in issue order).

    Slots that a step does not use are 0. An UP of several blocks becomes one row per block. Raises
    IllegalScheduleError if the schedule is not legal.
    """
    schedule.check()
    rows = [row for step in schedule.steps for row in _rows(step)]
    ops = tuple(sorted({name for name, *_ in rows}))
    return ops, np.array([[ops.index(name), *rest] for name, *rest in rows], dtype=np.int32)


def _rows(step: Step) -> list[tuple[str, int, int, int, int, int]]:
    if step.stage in _SKIPPED or "@" in step.stage:  # "@" marks steps of the cluster's other CTA
        return []
    slots = {access.buffer: access.slot for access in (*step.writes, *step.reads)}
    kv = slots.get("kv_l", slots.get("kv_r", 0))
    if step.stage == "UP":
        parts = [access for access in step.reads if access.buffer == "Otmp"]
        factors = [access for access in step.reads if access.buffer == "P"]
        return [
            ("UP", part.block, kv, 0, factor.slot, part.slot)
            for part, factor in zip(parts, factors, strict=True)
        ]
    op = step.stage
    if op == "QK" and "kv_l" in slots:
        op = "QK_LOADED"
    if op == "PV" and "Otmp" not in slots:
        op = "ACCUMULATE"
    if op not in OPS:
        raise ValueError(f"the blockwise kernel has no stage {step.stage}")
    s = slots.get("S", slots.get("S_rope", 0))
    return [(op, step.block, kv, s, slots.get("P", 0), slots.get("Otmp", 0))]


def column(program_ref: Any, name: str, index: jax.Array) -> jax.Array:
    """Returns the named column of step `index`."""
    return program_ref[index, COLUMNS.index(name)]


def run_program(
    program_ref: Any,
    names: tuple[str, ...],
    ops: Mapping[str, Callable[[jax.Array], None]],
    is_live: Callable[[jax.Array], jax.Array],
) -> None:
    """Runs ops[name](index) for all steps whose block `is_live`; names as compiled."""
    branches = [ops[name] for name in names]

    def step(index: jax.Array, carry: None) -> None:
        @pl.when(is_live(column(program_ref, "block", index)))
        def _() -> None:
            lax.switch(column(program_ref, "op", index), branches, index)

    lax.fori_loop(0, program_ref.shape[0], step, None)
