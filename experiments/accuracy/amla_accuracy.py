"""Accuracy of rescaling by integer addition (AMLA), compared with float64.

One tile of query rows attends to T keys block by block, in three ways: multiply (plain online
softmax), exponent_add (AMLA), and exponent_add without the correction for the rounded residual.
Inputs and P are bf16, and sums are float32. The reference gets the rounded inputs. The
distributions are those of the AMLA paper (arXiv 2509.25224), normal and uniform. In addition, the
scores of some keys rise from block to block, so that nearly every block rescales.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import show_table, track
from experiments.framework.errors import relative_error
from experiments.framework.experiment import InputError, Outcome, Output, Row
from experiments.framework.options import flag, seed_flag
from mla_jax.online_softmax import finalize, init_state, update
from mla_jax.reference.attention import attention_float64

SUMMARY = "AMLA's rescaling by integer addition against float64, with and without compensation"

KV_LORA_RANK, ROPE_DIM = 512, 64
SOFTMAX_SCALE = 192**-0.5
METHODS: dict[str, dict[str, Any]] = {
    "multiply": {"rescale": "multiply"},
    "exponent_add": {"rescale": "exponent_add"},
    "no compensation": {"rescale": "exponent_add", "compensate": False},
}
RISES = (0.0, 0.25, 1.0, 4.0, 15.0, 60.0)  # rise of the scores, in nats per block
PAPER_BOUND = 1.25  # error of exponent_add / error of multiply; the paper says "within about 20 %"
# The same ratio for rising scores. There one key outweighs all others, so that its P is 1, which is
# exact until a residual multiplies it.
RAMP_BOUND = 1.5

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DISTRIBUTIONS: dict[str, Draw] = {
    "N(0, 1)": lambda rng, shape: rng.normal(size=shape),
    "N(0, 3)": lambda rng, shape: rng.normal(scale=math.sqrt(3), size=shape),  # variance 3
    "U(-1, 1)": lambda rng, shape: rng.uniform(-1, 1, size=shape),
}


@dataclasses.dataclass(frozen=True)
class Options:
    rows: int = flag(64, "query rows (M)", lower_bound=1)
    keys: int = flag(4096, "KV length (T), a multiple of the block", lower_bound=1)
    block: int = flag(512, "keys per block", lower_bound=1)
    repeats: int = flag(3, "draws of each distribution", lower_bound=1)
    seed: int = seed_flag("of the draws")


def run(options: Options, output: Output) -> Outcome:
    if options.keys % options.block:
        raise InputError(f"--keys must be a multiple of {options.block}, got {options.keys}")
    cases: list[tuple[str, Draw, float]] = [(name, d, 0.0) for name, d in DISTRIBUTIONS.items()]
    cases += [(f"ramp {rise:g}", DISTRIBUTIONS["N(0, 1)"], rise) for rise in RISES]
    rows = []
    for name, draw_values, rise in track(cases, "distributions"):
        errors, rescales = measure(options, draw_values, rise)
        row: Row = {"distribution": name, "rise": rise, "rescales": rescales, **errors}
        row["ratio"] = errors["exponent_add"] / errors["multiply"]
        row["ratio_uncompensated"] = errors["no compensation"] / errors["multiply"]
        rows.append(row)
    show_table(
        f"Relative error against float64 (M {options.rows}, T {options.keys}, block "
        f"{options.block}, bf16), mean of {options.repeats}",
        rows,
        {
            "distribution": "distribution",
            "rescales": "rescales",
            **{name: name for name in METHODS},
            "ratio": "add / multiply",
            "ratio_uncompensated": "uncompensated / multiply",
        },
    )
    draw(output.path("amla_accuracy.png"), rows)

    drawn = [row for row in rows if row["distribution"] in DISTRIBUTIONS]
    worst = max(row["ratio"] for row in drawn)
    uncompensated = max(row["ratio_uncompensated"] for row in drawn)
    ramped = max(row["ratio"] for row in rows)
    return Outcome(
        passed=worst <= PAPER_BOUND < uncompensated and ramped <= RAMP_BOUND,
        summary=(
            f"By integer addition the error is {worst:.2f} times that of multiplying, without "
            f"compensation {uncompensated:.2f} times (the worst of the distributions); with ramped "
            f"keys at most {ramped:.2f} times."
        ),
        rows=rows,
    )


def measure(options: Options, draw_values: Draw, rise: float) -> tuple[dict[str, float], int]:
    """Returns the mean error per method, and how many (row, block) changed the exponent."""
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    rescales = 0
    for repeat in range(options.repeats):
        q, kv = inputs(options, draw_values, rise, options.seed + repeat)
        wanted, _ = attention_float64(
            np.asarray(q)[:, None],
            np.asarray(kv),
            softmax_scale=SOFTMAX_SCALE,
            kv_lora_rank=KV_LORA_RANK,
            causal=False,
        )
        for name, method in METHODS.items():
            got = attend(q, kv, block=options.block, **method)
            errors[name].append(relative_error(got, wanted[:, 0]))
        rescales += count_rescales(q, kv, options.block)
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    return means, round(rescales / options.repeats)


def inputs(
    options: Options, draw_values: Draw, rise: float, seed: int
) -> tuple[jax.Array, jax.Array]:
    """Returns bf16 q [M, D] and kv [T, D]; a rise is in a rope channel, which V does not have."""
    rng = np.random.default_rng(seed)
    q = draw_values(rng, (options.rows, KV_LORA_RANK + ROPE_DIM))
    kv = draw_values(rng, (options.keys, KV_LORA_RANK + ROPE_DIM))
    if rise:
        q[:, -1] = 1.0
        kv[:, -1] = rise * np.arange(options.keys) / options.block / SOFTMAX_SCALE
    return jnp.asarray(q, jnp.bfloat16), jnp.asarray(kv, jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("block", "rescale", "compensate"))
def attend(
    q: jax.Array, kv: jax.Array, *, block: int, rescale: str, compensate: bool = True
) -> jax.Array:
    """Returns o [M, kv_lora_rank] float32, computed block by block."""

    def step(state: Any, keys: jax.Array) -> tuple[Any, None]:
        values = keys[:, :KV_LORA_RANK]
        scores = _scores(q, keys)
        return update(state, scores, values, rescale=rescale, compensate=compensate), None

    state = init_state(q.shape[:1], KV_LORA_RANK)
    state, _ = jax.lax.scan(step, state, kv.reshape(-1, block, kv.shape[1]))
    return finalize(state)[0]


def count_rescales(q: jax.Array, kv: jax.Array, block: int) -> int:
    """Returns how many (row, block) after the first block change the exponent round(-m / ln 2)."""
    maxima = _scores(q, kv).reshape(q.shape[0], -1, block).max(-1)
    running = np.maximum.accumulate(np.asarray(maxima), axis=1)
    return int((np.diff(np.round(-running / math.log(2)), axis=1) != 0).sum())


def _scores(q: jax.Array, kv: jax.Array) -> jax.Array:
    return SOFTMAX_SCALE * jnp.matmul(q, kv.T, preferred_element_type=jnp.float32)


def draw(path: Path, rows: list[Row]) -> None:
    """Draws the errors by distribution, and by rise of the scores."""
    title = "AMLA: rescaling the output by an integer addition to its exponent"
    with plotting.figure(path, title, columns=2, size=(12, 4.6)) as (left, right):
        shown = [row for row in rows if row["distribution"] in DISTRIBUTIONS]
        for i, method in enumerate(METHODS):
            places = [place + (i - 1) * 0.27 for place in range(len(shown))]
            heights = [row[method] for row in shown]
            bars = left.bar(
                places, heights, 0.25, label=plotting.name(method), color=plotting.look(i)["color"]
            )
            left.bar_label(bars, [f"{h * 1e4:.1f}" for h in heights], fontsize=8, padding=2)
        left.set_xticks(range(len(shown)), [row["distribution"] for row in shown])
        left.ticklabel_format(axis="y", style="sci", scilimits=(-4, -4))
        left.set_ylabel("relative error against float64")
        left.set_title("By distribution")
        plotting.legend(left)

        ramps = [row for row in rows if row["distribution"] not in DISTRIBUTIONS]
        for i, method in enumerate(METHODS):
            right.plot(
                range(len(ramps)),
                [row[method] for row in ramps],
                **plotting.look(i),
                label=plotting.name(method),
            )
        labels = [f"{row['rise']:g}\n({row['rescales']})" for row in ramps]
        right.set_xticks(range(len(ramps)), labels)
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-4, -4))
        right.set_xlabel("rise of the scores, nats per block (rescales)")
        right.set_title("Ramped keys")
