"""Compares every implementation with float64, for each layout, page size and dtype.

One batch is hard on all of them. It has an empty request, and queries of different lengths: decode,
MTP, a chunk after a prefix, a whole prompt, and none. Lengths are at and next to page boundaries.
Pages are in random order. Every row of the cache that no token was written to is NaN. Unused
entries of the block tables are invalid page numbers.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import plotting
from experiments.framework.console import say, show_table, track
from experiments.framework.errors import LSE_BOUND, OUTPUT_BOUND, lse_error, relative_error
from experiments.framework.experiment import Outcome, Output, Row, reading
from experiments.framework.implementations import chosen, implementations_flag
from experiments.framework.options import flag, seed_flag
from mla_jax.attention import paged_mla_attention
from mla_jax.cache import LAYOUTS, PAGE_SIZES, PagedKVCache
from mla_jax.problem import AttentionProblem
from mla_jax.reference.attention import attention_float64
from mla_jax.registry import available_implementations

SUMMARY = "every implementation x layout x page size x dtype on a hard ragged batch"

SEQ_LENS = (1, 0, 129, 64, 300, 17, 128)
QUERY_LENS = (1, 0, 1, 4, 2, 4, 0)
SOFTMAX_SCALE = 192**-0.5
GARBAGE_PAGE = -(2**31)


@dataclasses.dataclass(frozen=True)
class Options:
    implementations: tuple[str, ...] = implementations_flag()
    layouts: tuple[str, ...] = flag(LAYOUTS, "page layouts", choices=LAYOUTS, may_be_empty=False)
    page_sizes: tuple[int, ...] = flag(
        PAGE_SIZES, "tokens per page", choices=PAGE_SIZES, may_be_empty=False
    )
    dtypes: tuple[str, ...] = flag(
        tuple(OUTPUT_BOUND), "of queries and cache", choices=tuple(OUTPUT_BOUND), may_be_empty=False
    )
    heads: int = flag(16, "query heads", lower_bound=1)
    kv_lora_rank: int = flag(512, "width of V", lower_bound=1)
    rope_dim: int = flag(64, "width of the rope part", lower_bound=1)
    seed: int = seed_flag("of queries, latents and page order")


def run(options: Options, output: Output) -> Outcome:
    names = chosen(options.implementations)
    cells = [
        (dtype, page_size, layout)
        for dtype in options.dtypes
        for page_size in options.page_sizes
        for layout in options.layouts
    ]
    rows = []
    for cell in track(cells, "dtype, page size, layout"):
        rows += check_cell(options, names, *cell)
    show_table("Relative error of o against float64", _by_implementation(rows))
    for line in _refusals(rows):
        say(line)
    draw(output.path("correctness.png"), rows, names)

    ran = [row for row in rows if row["error"] is not None]
    failed = [row for row in ran if not row["passed"]]
    return Outcome(
        passed=bool(ran) and not failed,
        summary=(
            f"{len(ran) - len(failed)} of {len(ran)} combinations of {', '.join(names)} are within "
            f"their bound of float64; {len(rows) - len(ran)} can't run here."
        ),
        rows=rows,
    )


def check_cell(
    options: Options, names: list[str], dtype: str, page_size: int, layout: str
) -> list[Row]:
    """Returns one row per implementation, on the same inputs."""
    problem, (wanted_o, wanted_lse) = make_problem(options, dtype, page_size, layout)
    reasons = available_implementations(problem)
    rows = []
    for name in names:
        row: Row = {
            "implementation": name,
            "dtype": dtype,
            "page_size": page_size,
            "layout": layout,
            "error": None,
            "lse_error": None,
            "bound": OUTPUT_BOUND[dtype],
            "passed": None,
            "reason": reasons[name],
        }
        if reasons[name] is None:
            o, lse = paged_mla_attention(
                problem.q,
                problem.cache,
                problem.block_tables,
                problem.seq_lens,
                query_lens=problem.query_lens,
                softmax_scale=SOFTMAX_SCALE,
                implementation=name,
            )
            row["error"] = relative_error(o, wanted_o)
            row["lse_error"] = lse_error(lse, wanted_lse)
            row["passed"] = row["error"] <= row["bound"] and row["lse_error"] <= LSE_BOUND
        rows.append(row)
    return rows


def make_problem(
    options: Options, dtype: str, page_size: int, layout: str
) -> tuple[AttentionProblem, tuple[np.ndarray, np.ndarray]]:
    """Returns the batch, and o and lse of the reference."""
    rng = np.random.default_rng(options.seed)
    batch, most, width = len(SEQ_LENS), max(SEQ_LENS), options.kv_lora_rank + options.rope_dim
    seq_lens, query_lens = np.array(SEQ_LENS, np.int32), np.array(QUERY_LENS, np.int32)
    q = jnp.asarray(rng.normal(size=(batch, max(QUERY_LENS), options.heads, width)), dtype)
    kv = jnp.asarray(rng.normal(size=(batch, most, width)), dtype)

    pages = -(-seq_lens // page_size)
    num_pages = int(pages.sum()) + 3
    order = iter(rng.permutation(num_pages))
    tables = np.full((batch, int(pages.max()) + 1), GARBAGE_PAGE, np.int32)
    for table, count in zip(tables, pages, strict=True):
        table[:count] = [next(order) for _ in range(count)]

    with reading("layouts"):
        cache = PagedKVCache.create(
            num_pages,
            page_size=page_size,
            kv_lora_rank=options.kv_lora_rank,
            rope_dim=options.rope_dim,
            dtype=dtype,
            layout=layout,
        )
    cache = dataclasses.replace(cache, pages=jnp.full_like(cache.pages, jnp.nan))
    block_tables = jnp.asarray(tables)
    cache = cache.append(kv, block_tables, jnp.zeros(batch, jnp.int32), jnp.asarray(seq_lens))
    problem = AttentionProblem(
        q=q,
        cache=cache,
        block_tables=block_tables,
        seq_lens=jnp.asarray(seq_lens),
        query_lens=jnp.asarray(query_lens),
        plan=None,
        softmax_scale=SOFTMAX_SCALE,
        causal=True,
        rescale="multiply",
        partial_dtype=None,
    )
    return problem, _oracle(options, q, kv)


def _oracle(options: Options, q: jax.Array, kv: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Computes o and lse from the contiguous latents, without pages."""
    o = np.zeros((*q.shape[:3], options.kv_lora_rank))
    lse = np.full(q.shape[:3], -np.inf)
    for i, (length, queries) in enumerate(zip(SEQ_LENS, QUERY_LENS, strict=True)):
        o[i, :queries], lse[i, :queries] = attention_float64(
            np.asarray(q[i, :queries]),
            np.asarray(kv[i, :length]),
            softmax_scale=SOFTMAX_SCALE,
            kv_lora_rank=options.kv_lora_rank,
        )
    return o, lse


def _by_implementation(rows: list[Row]) -> list[Row]:
    """Returns a line per cell with a column per implementation, for printing.

    `passed` says whether all that ran passed. It is None if none ran.
    """
    lines: dict[tuple, Row] = {}
    for row in rows:
        cell = {key: row[key] for key in ("dtype", "page_size", "layout", "bound")}
        line = lines.setdefault(tuple(cell.values()), cell | {"passed": None})
        line[row["implementation"]] = "refused" if row["error"] is None else row["error"]
        if row["passed"] is not None:
            line["passed"] = row["passed"] and line["passed"] is not False
    return list(lines.values())


def _refusals(rows: list[Row]) -> list[str]:
    """Returns lines that say which implementation refused how many combinations, and why."""
    reasons = [(row["implementation"], row["reason"]) for row in rows if row["reason"]]
    return [
        f"{name} refused {reasons.count((name, reason))}: {reason}"
        for name, reason in dict.fromkeys(reasons)
    ]


def draw(path: Path, rows: list[Row], names: list[str]) -> None:
    """Draws the error of each cell and its bound."""
    cells = list(dict.fromkeys((r["dtype"], r["page_size"], r["layout"]) for r in rows))
    title = "Error against float64, every implementation on every cache"
    with plotting.figure(path, title, size=(11, 4.4)) as axes:
        for i, name in enumerate(names):
            mine = [row for row in rows if row["implementation"] == name]
            axes.plot(
                range(len(cells)),
                plotting.numbers(row["error"] for row in mine),
                **plotting.points(i),
                label=plotting.name(name) + _refused_share(mine),
                markersize=7,
            )
        bounds = [OUTPUT_BOUND[cell[0]] for cell in cells]
        axes.step(
            range(len(cells)),
            bounds,
            where="mid",
            color=plotting.GREY,
            label="bound",
            linewidth=1.5,
        )
        axes.set_yscale("log")
        axes.set_ylabel("relative error of o")
        axes.set_xticks(
            range(len(cells)), [f"{size} {layout}" for _, size, layout in cells], rotation=60
        )
        axes.set_xlabel("page size and layout, by dtype")
        for dtype in dict.fromkeys(cell[0] for cell in cells):
            places = [i for i, cell in enumerate(cells) if cell[0] == dtype]
            axes.axvline(places[-1] + 0.5, color=plotting.GREY, linewidth=0.6)
            axes.text(
                np.mean(places), 1.02, dtype, ha="center", transform=axes.get_xaxis_transform()
            )
        axes.set_xlim(-0.5, max(1, len(cells)) - 0.5)
        plotting.legend(axes)


def _refused_share(rows: list[Row]) -> str:
    """Returns the share of refused cells, to be added to a name in the legend."""
    refused = sum(row["error"] is None for row in rows)
    return f", refused {refused} of {len(rows)}" if refused else ""
