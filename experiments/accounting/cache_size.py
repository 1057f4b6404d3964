"""Cache sizes of MHA, GQA, MQA and MLA, the causes of the 93.3 %, and the batch that fits."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.framework import plotting
from experiments.framework.console import show_table
from experiments.framework.experiment import Outcome, Output, Row
from experiments.framework.options import flag
from mla_jax.cache_size import (
    BITS_PER_VALUE,
    DEEPSEEK_67B,
    DEEPSEEK_V2,
    H800_NODE,
    CacheSize,
    Part,
    decompose,
    largest_batch,
    schemes,
    throughput_ceiling,
)
from mla_jax.config import PRESETS, MLAConfig

SUMMARY = "KV cache bytes by scheme and dtype; DeepSeek-V2's 93.3 % in parts; ceilings"

QUOTED_REDUCTION = 0.933  # DeepSeek-V2, abstract
QUOTED_SPEEDUP = 5.76  # DeepSeek-V2, section 3.2.3: generation throughput over DeepSeek 67B's
WEIGHTS_67B = 67e9 * 2  # bf16
WEIGHTS_V2 = 236e9  # "we first convert its parameters into the precision of FP8"


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = flag("deepseek-v2", "model of the table", choices=tuple(PRESETS))
    context: int = flag(8192, "tokens per request, for the largest batch", lower_bound=1)


def run(options: Options, output: Output) -> Outcome:
    rows = scheme_rows(MLAConfig.preset(options.model))
    parts = decompose(DEEPSEEK_67B, DEEPSEEK_V2)
    ceilings = ceiling_rows(options.context)
    show_table(f"Bytes per token of {options.model} under each scheme", by_scheme(rows))
    show_table(
        "From DeepSeek 67B to DeepSeek-V2",
        part_rows(parts),
        {
            "step": "step",
            "factor": "times smaller",
            "share": "share of the whole (log)",
            "bytes_per_token": "bytes / token after it",
            "reduction": "reduction so far",
        },
    )
    show_table(
        f"Batches on {H800_NODE.name} beside the weights, {options.context:,} tokens per request",
        ceilings,
        {
            "model": "model",
            "tokens": "tokens in the cache",
            "batch": "largest batch",
            "ceiling": "ceiling, tokens / s",
            "speedup": "over DeepSeek 67B",
        },
    )
    draw(output.path("cache_size.png"), rows, parts, options.model)

    whole = parts[-1].reduction
    return Outcome(
        passed=round(whole, 3) == QUOTED_REDUCTION,
        summary=(
            f"DeepSeek-V2's cache is {whole:.1%} smaller than DeepSeek 67B's "
            f"({QUOTED_REDUCTION:.1%} quoted): {parts[1].reduction:.1%} at equal bits, by MLA "
            f"({parts[0].factor:.2f} x) and fewer layers ({parts[1].factor:.2f} x), the rest by "
            f"the 6-bit cache ({parts[2].factor:.2f} x). Memory alone allows "
            f"{ceilings[-1]['speedup']:.1f} times the throughput ({QUOTED_SPEEDUP} was measured)."
        ),
        rows=rows,
        headline={
            "reduction": whole,
            "reduction_at_equal_bits": parts[1].reduction,
            "parts": part_rows(parts),
            "ceilings": ceilings,
            "quoted": {"reduction": QUOTED_REDUCTION, "speedup": QUOTED_SPEEDUP},
        },
    )


def scheme_rows(config: MLAConfig) -> list[Row]:
    """Returns one row per scheme and dtype; `of_mha` is relative to MHA of the same dtype."""
    rows = []
    for dtype, bits in BITS_PER_VALUE.items():
        sizes = schemes(config, bits=bits)
        for size in sizes:
            rows.append(
                {
                    "scheme": size.scheme,
                    "dtype": dtype,
                    "values": size.values,
                    "bytes_per_token_and_layer": size.bytes_per_token_and_layer,
                    "bytes_per_token": size.bytes_per_token,
                    "of_mha": size.bytes_per_token / sizes[0].bytes_per_token,
                }
            )
    return rows


def by_scheme(rows: list[Row]) -> list[Row]:
    """Returns the bytes per token with one row per scheme and one column per dtype."""
    table: dict[str, Row] = {}
    for row in rows:
        line = table.setdefault(row["scheme"], {k: row[k] for k in ("scheme", "values", "of_mha")})
        line[row["dtype"]] = row["bytes_per_token"]
    return list(table.values())


def part_rows(parts: tuple[Part, ...]) -> list[Row]:
    """Returns one row per step from DeepSeek 67B's cache to DeepSeek-V2's, its start included."""
    start = {
        "step": "DeepSeek 67B",
        "factor": 1.0,
        "share": 0.0,
        "bytes_per_token": DEEPSEEK_67B.bytes_per_token,
        "reduction": 0.0,
    }
    return [start] + [
        {
            "step": part.name,
            "factor": part.factor,
            "share": part.share,
            "bytes_per_token": part.bytes_per_token,
            "reduction": part.reduction,
        }
        for part in parts
    ]


def ceiling_rows(context: int) -> list[Row]:
    """Returns the largest batch and the throughput bound per model, on the node of the paper."""
    bf16 = dataclasses.replace(DEEPSEEK_V2, bits=BITS_PER_VALUE["bfloat16"])
    int8 = CacheSize.mla_int8(MLAConfig.preset("deepseek-v2"))
    models = (
        ("DeepSeek 67B, bf16", DEEPSEEK_67B, WEIGHTS_67B),
        ("DeepSeek-V2, fp8 weights, bf16 cache", bf16, WEIGHTS_V2),
        ("DeepSeek-V2, fp8 weights, int8 cache with scales", int8, WEIGHTS_V2),
        ("DeepSeek-V2, fp8 weights, 6-bit cache", DEEPSEEK_V2, WEIGHTS_V2),
    )
    rows: list[Row] = []
    for model, cache, weights in models:
        batch, ceiling = _ceiling(cache, weights, context)
        rows.append(
            {
                "model": model,
                "tokens": int((H800_NODE.memory - weights) / cache.bytes_per_token),
                "batch": batch,
                "ceiling": ceiling,
                "speedup": ceiling / rows[0]["ceiling"] if rows and rows[0]["ceiling"] else 1.0,
            }
        )
    return rows


def _ceiling(cache: CacheSize, weights: float, context: int) -> tuple[int, float]:
    load: dict[str, Any] = {"weights": weights, "tokens_per_request": context}
    batch = largest_batch(cache, memory=H800_NODE.memory, **load)
    return batch, throughput_ceiling(cache, batch=batch, bandwidth=H800_NODE.bandwidth, **load)


def draw(path: Path, rows: list[Row], parts: tuple[Part, ...], model: str) -> None:
    """Draws the bytes per token of each scheme, and the steps of the reduction."""
    title = "Size of a KV cache, and the causes of DeepSeek-V2's 93.3 %"
    with plotting.figure(path, title, columns=2, size=(12, 4.8)) as (left, right):
        _draw_schemes(left, rows, model)
        _draw_parts(right, parts)


def _draw_schemes(axes: Any, rows: list[Row], model: str) -> None:
    dtypes = ("bfloat16", "int8", "6-bit")
    names = list(dict.fromkeys(row["scheme"] for row in rows))
    for i, dtype in enumerate(dtypes):
        kib = [row["bytes_per_token"] / 1024 for row in rows if row["dtype"] == dtype]
        places = [place + (i - 1) * 0.27 for place in range(len(names))]
        bars = axes.bar(places, kib, 0.25, label=dtype, color=plotting.look(i)["color"])
        axes.bar_label(bars, [f"{x:,.0f}" for x in kib], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("KiB per token, whole model")
    axes.set_title(f"{model} under each scheme")
    axes.legend()


def _draw_parts(axes: Any, parts: tuple[Part, ...]) -> None:
    kib = [DEEPSEEK_67B.bytes_per_token / 1024] + [part.bytes_per_token / 1024 for part in parts]
    names = ["DeepSeek 67B", *(part.name.replace(" to ", " → ") for part in parts)]
    axes.bar(range(len(kib)), kib, 0.6, color=[plotting.GREY, *plotting.COLOURS[:3]])
    arrow = {"arrowstyle": "->", "color": "#444444"}
    for i, part in enumerate(parts, start=1):
        before, after = kib[i - 1], kib[i]
        axes.plot([i - 1.3, i + 0.3], [before, before], color=plotting.GREY, linewidth=0.8)
        axes.annotate("", (i, after), (i, before), arrowprops=arrow)
        axes.text(i + 0.05, (before + after) / 2, f"÷ {part.factor:.2f}", va="center")
        saved = f"{part.reduction:.1%} saved"
        axes.text(i, before + 4, saved, ha="center", va="bottom", fontweight="bold")
    for i, value in enumerate(kib):
        axes.text(i, value / 2, f"{value:,.0f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("KiB per token, whole model")
    axes.set_title("DeepSeek 67B to DeepSeek-V2, step by step")
