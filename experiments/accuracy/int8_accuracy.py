"""Accuracy of an int8 latent cache compared with float64, by scales, dataflow and data.

Query rows attend to T keys of one request. The reference gets the keys before any rounding, so that
a bfloat16 cache also has their rounding error. The methods are:
- bfloat16: cache, queries and P; the `xla` implementation.
- token, group, tensor: an int8 cache with such scales, dequantized, and all else in float32. This
  is the error of the cache alone, and what `xla` computes with it.
- "bf16 P", "int8 P", "int8 q, ...": the dataflows of `mla_jax.reference.int8_dataflow` over that
  cache, which also round P and the queries. Int8 queries with int8 P are Ascend's dataflow. Int8
  queries, or int14 (two int8 per value), with bf16 P suit the int8 tensor cores of Hopper.
- rotated: latents and queries are first rotated by a Hadamard matrix, as `rotate_latent` does in
  the weights. The outputs are rotated back.

Rows marked `hard` are extreme data. They are shown, and no bound applies to them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import show_table, track
from experiments.framework.errors import lse_error, relative_error
from experiments.framework.experiment import Outcome, Output, Row
from experiments.framework.options import flag, seed_flag
from experiments.serving.demo import small_config
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import PagedKVCache
from mla_jax.checkpoints.weights import init_params
from mla_jax.layer import preprocess
from mla_jax.quantize import GRANULARITIES, hadamard, scales_of
from mla_jax.reference.attention import attention_float64
from mla_jax.reference.int8_dataflow import attend_int8

SUMMARY = "an int8 latent cache compared with float64, by scales, dataflow and data"

RANK, ROPE = 512, 64
PAGE_SIZE = 64
SOFTMAX_SCALE = 192**-0.5
BOUND = 1e-2  # relative error of the output, on rows that are not hard
DATAFLOWS: dict[str, dict[str, Any]] = {
    "bf16 P": {"queries": "bfloat16", "weights": "bfloat16"},
    "int8 q, bf16 P": {"queries": "int8", "weights": "bfloat16"},
    "int14 q, bf16 P": {"queries": "int14", "weights": "bfloat16"},
    "int8 q, int8 P": {"queries": "int8", "weights": "int8"},
}
SERVED = "token, bf16 P"  # the method that the bound applies to, besides the cache alone
SHOWN = (
    "bfloat16", "tensor", "token", "group", *(f"token, {name}" for name in DATAFLOWS),
    "token, rotated",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    rows: int = flag(64, "query rows", lower_bound=16)
    keys: int = flag(4096, "T of most rows", lower_bound=64)
    long_keys: int = flag(65536, "T of the long context", lower_bound=64)
    spreads: tuple[float, ...] = flag(
        (0.1, 0.3, 1.0, 1.7, 3.0, 6.0),
        "standard deviations of the scores, for the picture",
        lower_bound=1e-3,
        may_be_empty=False,
    )
    seed: int = seed_flag("of queries and keys")


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys before any rounding, both float32."""

    name: str
    hard: bool
    q: np.ndarray  # [R, 576]
    kv: np.ndarray  # [T, 576]


def run(options: Options, output: Output) -> Outcome:
    rows = []
    for case in track(list(cases(options)), "distributions"):
        rows += measure(case)
    spreads = []
    for spread in track(options.spreads, "spread of the scores"):
        spreads += measure(normal(options, f"{spread:g}", spread=spread), ("token",))
    errors = by_case(rows, "error")
    columns = {"distribution": "data"} | {method: method.replace(", ", "\n") for method in SHOWN}
    show_table("Relative error of the output against float64", errors, columns)
    show_table("Largest error of lse", by_case(rows, "lse_error"), columns)
    draw(output.path("int8_accuracy.png"), errors, by_case(spreads, "error"))

    easy = [row for row in rows if not row["hard"]]
    worst = {
        method: max(row["error"] for row in easy if row["method"] == method)
        for method in dict.fromkeys(row["method"] for row in easy)
    }
    # In order of cache size: one scale in all, one per token, four per token.
    enough = [g for g in ("tensor", "token", "group") if worst[f"{g}, bf16 P"] <= BOUND]
    return Outcome(
        passed=max(worst["token"], worst[SERVED]) <= BOUND,
        summary=(
            f"Recommended: scales per {enough[0] if enough else 'nothing'}, the fewest bytes with "
            f"an output error of at most {BOUND:g} on all rows that are not hard, where queries "
            f"stay bf16 and P is bf16. The worst of these rows with scales per token: "
            f"{worst['token']:.1e} by the cache alone, {worst[SERVED]:.1e} with bf16 P, "
            f"{worst['token, int8 q, bf16 P']:.1e} with int8 queries too, "
            f"{worst['token, int14 q, bf16 P']:.1e} with queries of 14 bits, "
            f"{worst['token, int8 q, int8 P']:.1e} with int8 P; with a bfloat16 cache "
            f"{worst['bfloat16']:.1e}."
        ),
        rows=rows,
        headline={"bound": BOUND, "worst": worst, "spreads": spreads},
    )


def cases(options: Options) -> Iterator[Case]:
    """Yields data of unit variance, whose scores have standard deviation 1 unless the name says."""
    rng = np.random.default_rng(options.seed)
    base = normal(options, "normal")
    yield base
    shapes = (base.q.shape, base.kv.shape)
    q, kv = (rng.uniform(-math.sqrt(3), math.sqrt(3), shape) for shape in shapes)
    yield with_spread(Case("uniform", False, q, kv), 1.0)
    q = base.q.copy()
    q[:, RANK:] *= 10.0
    yield with_spread(Case("rope-dominated, scores of std 2", False, q, base.kv), 2.0)
    kv = base.kv.copy()
    kv[:, rng.choice(RANK, 4, replace=False)] *= 20.0
    yield with_spread(Case("4 outlier channels, x 20", False, base.q, kv), 1.0)
    yield normal(options, f"normal, {options.long_keys:,} keys", keys=options.long_keys)
    yield from_checkpoint(options)

    yield normal(options, "scores of std 3", spread=3.0, hard=True)
    kv = rng.standard_t(3, base.kv.shape) / math.sqrt(3)
    yield with_spread(Case("heavy tails: Student t, 3", True, base.q, kv), 1.0)
    kv = base.kv.copy()
    kv[rng.random(len(kv)) < 0.01, :RANK] *= 20.0
    yield with_spread(Case("1 % outlier tokens, x 20", True, base.q, kv), 1.0)


def normal(
    options: Options, name: str, *, keys: int = 0, spread: float = 1.0, hard: bool = False
) -> Case:
    """Returns a case of normal queries and keys."""
    rng = np.random.default_rng(options.seed)
    q, kv = (rng.normal(size=(n, RANK + ROPE)) for n in (options.rows, keys or options.keys))
    return with_spread(Case(name, hard, q, kv), spread)


def with_spread(case: Case, spread: float) -> Case:
    """Scales the queries so that the scores have a standard deviation, and rounds them to bf16."""
    scores = SOFTMAX_SCALE * (case.q @ case.kv.T)
    return dataclasses.replace(case, q=in_bfloat16(case.q * (spread / scores.std(axis=1).mean())))


def from_checkpoint(options: Options) -> Case:
    """Returns queries and latents of the demo's layer for normal hidden states.

    The queries are those of the last tokens, and every row sees all keys. The queries include the
    ratio of the layer's softmax scale to the one used here.
    """
    config, rng = small_config(), np.random.default_rng(options.seed)

    @jax.jit
    def rows(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = init_params(key, config, jnp.float32)
        return preprocess(params, config, x, jnp.arange(options.keys)[None])

    x = rng.normal(size=(1, options.keys, config.hidden_size)).astype(np.float32)
    q, kv = map(np.asarray, rows(jax.random.key(options.seed), x))
    q = q.reshape(-1, RANK + ROPE)[-options.rows :] * (config.softmax_scale / SOFTMAX_SCALE)
    return Case("the demo's checkpoint", False, in_bfloat16(q), kv[0])


def in_bfloat16(x: Any) -> np.ndarray:
    """Rounds values to bfloat16 and returns them as float32."""
    return np.asarray(x, jnp.bfloat16).astype(np.float32)


def measure(case: Case, granularities: tuple[str, ...] = GRANULARITIES) -> list[Row]:
    """Returns one row per method."""
    oracle = functools.partial(
        attention_float64, softmax_scale=SOFTMAX_SCALE, kv_lora_rank=RANK, causal=False
    )
    wanted = [x[0] for x in oracle(case.q[None], case.kv)]
    found = {"bfloat16": attend(case, filled(case, jnp.bfloat16), jnp.bfloat16)}
    for granularity in granularities:
        found |= over_int8(case, granularity)
    rotation = hadamard(RANK)
    for name, (o, lse) in over_int8(turn(case, rotation), "token").items():
        o = np.asarray(o, np.float64) @ rotation.T
        found[name.replace("token", "token, rotated")] = (o, lse)
    return [
        {
            "distribution": case.name,
            "hard": case.hard,
            "method": method,
            "error": relative_error(o, wanted[0]),
            "lse_error": lse_error(lse, wanted[1]),
        }
        for method, (o, lse) in found.items()
    ]


def over_int8(case: Case, granularity: str) -> dict[str, tuple[Any, Any]]:
    """Returns (o [R, RANK], lse [R]) with the cache alone, and with each dataflow over it."""
    cache = filled(case, jnp.int8, granularity)
    found = {granularity: attend(case, cache, jnp.float32)}
    stored = jax.jit(PagedKVCache.stored_rows)(cache, table(case), np.arange(len(case.kv))[None])
    latent, k_rope = (np.asarray(stored[name])[0] for name in ("pages", "rope_pages"))
    # One scale for all is given per token: then it shares the compiled program of those.
    scales = np.asarray(stored["scales"])
    scales = scales[0] if scales.ndim else scales
    scales = np.broadcast_to(scales, (len(case.kv), *scales.shape[1:]))
    for name, options in DATAFLOWS.items():
        found[f"{granularity}, {name}"] = attend_int8(
            *jax.device_put((case.q, latent, scales, k_rope)),
            softmax_scale=SOFTMAX_SCALE,
            **options,
        )
    return found


def filled(case: Case, dtype: Any, granularity: str | None = None) -> PagedKVCache:
    """Returns a cache with the keys of the case, which also calibrate a scale for all of them."""
    kv = jax.device_put(np.asarray(case.kv, np.float32 if granularity else dtype))
    cache = PagedKVCache.create(
        -(-len(kv) // PAGE_SIZE),
        page_size=PAGE_SIZE,
        kv_lora_rank=RANK,
        rope_dim=ROPE,
        dtype=dtype,
        scale_granularity=granularity,
        scale=scales_of(kv[:, :RANK], "tensor") if granularity == "tensor" else None,
    )
    return cache.append(kv[None], table(case), jax.device_put(np.zeros(1, np.int32)))


def table(case: Case) -> jax.Array:
    """Returns the block table [1, pages] of a case."""
    return jax.device_put(np.arange(-(-len(case.kv) // PAGE_SIZE), dtype=np.int32)[None])


def attend(case: Case, cache: PagedKVCache, dtype: Any) -> tuple[Any, Any]:
    """Returns o [R, RANK] and lse [R] of plain JAX; the rows are the heads of one token."""
    o, lse = paged_mla_attention(
        jax.device_put(np.asarray(case.q, dtype)[None, None]),
        cache,
        table(case),
        jax.device_put(np.full(1, len(case.kv), np.int32)),
        softmax_scale=SOFTMAX_SCALE,
        implementation="xla",
    )
    return np.asarray(o)[0, 0], np.asarray(lse)[0, 0]


def turn(case: Case, rotation: np.ndarray) -> Case:
    """Rotates the latent of a case: scores stay the same, and outputs are rotated alike."""
    q, kv = case.q.copy(), case.kv.copy()
    for rows in (q, kv):
        rows[:, :RANK] = rows[:, :RANK] @ rotation
    return dataclasses.replace(case, q=q, kv=kv)


def by_case(rows: list[Row], key: str) -> list[Row]:
    """Returns a line per distribution with a column per method, for printing."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = {"distribution": row["distribution"], "hard": row["hard"]}
        lines.setdefault(row["distribution"], line)[row["method"]] = row[key]
    return list(lines.values())


def draw(path: Path, errors: list[Row], spreads: list[Row]) -> None:
    """Draws the errors by data and method, and by the spread of the scores."""
    with plotting.figure(
        path, "An int8 latent cache against float64", columns=2, size=(14, 5.4)
    ) as (left, right):
        for i, method in enumerate(SHOWN):
            left.plot(
                range(len(errors)),
                plotting.numbers(row.get(method) for row in errors),
                **plotting.points(i),
                label=plotting.name(method),
            )
        labels = [plotting.name(row["distribution"]) for row in errors]
        left.set_xticks(range(len(errors)), labels, rotation=30, ha="right")
        hard = [i for i, row in enumerate(errors) if row["hard"]]
        if hard:
            left.axvspan(min(hard) - 0.5, max(hard) + 0.5, color="#f4f4f6", zorder=-1)
            left.text(max(hard) + 0.4, 0.98, "hard", ha="right", va="top",
                      transform=left.get_xaxis_transform())  # fmt: skip
        left.set_title("By data and method")
        plotting.legend(left)

        for i, method in enumerate(SHOWN):
            if any(method in row for row in spreads) and "rotated" not in method:
                right.plot(
                    [float(row["distribution"]) for row in spreads],
                    plotting.numbers(row.get(method) for row in spreads),
                    **plotting.look(i),
                    label=plotting.name(method),
                )
        right.set_xscale("log")
        right.set_xlabel("standard deviation of the scores, nats")
        right.set_title("Normal data, from a flat to a sharp softmax")
        for axes in (left, right):
            axes.axhline(BOUND, color=plotting.GREY, linestyle="--")
            axes.set_yscale("log")
            axes.set_ylabel("relative error of the output")
