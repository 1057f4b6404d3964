"""Tables of prefill times on a GPU, from committed results."""

from pathlib import Path

from tables_common import CARDS, Row, read, table, wrapped

OURS, PLANNED = "hopper", "hopper, planned before"
LATENTS, EXPANSION = "hopper, from latents", "expansion for baselines"
BASELINES = {"fa3": "FlashAttention-3", "flashinfer_fa3": "FlashInfer", "cudnn": "cuDNN"}
COLUMNS = {
    "ms_burst": "in bursts of 4 ms after 60 ms without work",
    "ms_sustained": "back to back for 0.15 seconds without a pause",
}
SHAPE = ["heads", "requests", "query tokens", "earlier tokens"]


def prefill(root: Path, card: str, column: str) -> str:
    """The rates of our prefill kernel and of the baselines, in one of `COLUMNS`."""
    lines = []
    for found in _by_shape(_measured(root, card)["rows"]):
        fastest = min(found[name][column] for name in BASELINES if name in found)
        lines.append([
            *_shape(found[OURS]),
            *(_tflops(found, name, column) for name in (OURS, PLANNED, *BASELINES)),
            *(f"{fastest / found[name][column]:.2f}" for name in (OURS, PLANNED)),
        ])  # fmt: skip
    header = [*SHAPE, "ours", "ours, planned before", *BASELINES.values()]
    header += ["speed over the fastest baseline", "planned before"]
    caption = f"TFLOPS, {COLUMNS[column]}: bfloat16, causal, {made(root, card)}."
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def beside_flashinfer(root: Path, card: str) -> str:
    """The rates that the experiment `prefill` measured beside FlashInfer."""
    result = read(root / "benchmarks" / "measured" / f"{card}_prefill_bursts.json")
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in result["rows"]:
        shapes.setdefault((row["heads"], row["batch"]), {})[row["implementation"]] = row
    lines = []
    for (heads, batch), found in shapes.items():
        ours, theirs = (found[name]["tflops"] for name in ("hopper", "flashinfer"))
        error = found["hopper"]["error"]
        lines.append([f"{heads}", batch, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}",
                      f"{error:.1e}"])  # fmt: skip
    header = ["heads", "batch", "ours", "FlashInfer", "speed over FlashInfer", "our error"]
    versions = result["environment"]["versions"]
    caption = (
        f"TFLOPS in bursts: bfloat16, causal, {CARDS[card]}, {result['started'][:10]}, jax "
        f"{versions['jax']}, our code at {versions['commit']}."
    )
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def latents(root: Path, card: str) -> str:
    """The time from latents to the output of attention."""
    lines = []
    for found in _by_shape(_measured(root, card)["rows"]):
        if LATENTS in found:
            cells = _shape(found[OURS])
            for column in COLUMNS:
                fastest = min(found[name][column] for name in BASELINES if name in found)
                fastest += found[EXPANSION][column]
                ours = found[LATENTS][column]
                cells += [f"{ours:.2f}", f"{fastest:.2f}", f"{fastest / ours:.2f}"]
            lines.append(cells)
    header = [*SHAPE, "ours, ms", "baseline, ms", "speed", "ours, sustained", "baseline", "speed"]
    return table(header, lines, words=0)


def layer(root: Path, card: str) -> str:
    """The time and the temporary memory of a whole layer, in both forms."""
    result = _measured(root, card)
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in result["layer"]:
        key = row["requests"], row["queries"], row["prefix"]
        shapes.setdefault(key, {})[row["form"]] = row
    lines = []
    for shape, forms in shapes.items():
        absorbed, expanded = forms["absorbed"], forms["expanded"]
        lines.append([
            *map(str, shape),
            *(f"{form['ms_burst']:.2f}" for form in (absorbed, expanded)),
            f"{absorbed['ms_burst'] / expanded['ms_burst']:.1f}",
            f"{expanded['ms_sustained']:.2f}",
            *(f"{form['temporaries_mib']:,}" for form in (absorbed, expanded)),
        ])  # fmt: skip
    header = ["requests", "query tokens", "earlier tokens", "absorbed, ms", "expanded, ms"]
    header += ["ratio", "expanded, sustained, ms", "absorbed, temporary MiB", "expanded"]
    commits = " and ".join(sorted({row["kernel"] for row in result["layer"]}))
    caption = (
        f"Milliseconds per call of `mla_layer` with DeepSeek-V3's shapes, bfloat16, {CARDS[card]}, "
        f"{result['date'][:10]}, jax {result['versions']['jax']}, our code at {commits}."
    )
    return f"{wrapped(caption)}\n\n{table(header, lines, words=0)}"


def summary(root: Path) -> str:
    """Two rows for the README, of 4096 and of 8 x 1024 tokens, and a sentence about a layer."""
    result = _measured(root, "h200")
    lines = []
    for found in _by_shape(result["rows"])[:2]:
        fastest = min(found[name]["ms_sustained"] for name in BASELINES if name in found)
        lines.append([
            *_shape(found[OURS])[:3],
            *(_tflops(found, name, "ms_sustained") for name in (OURS, *BASELINES)),
            f"{fastest / found[OURS]['ms_sustained']:.2f}",
        ])  # fmt: skip
    header = [*SHAPE[:3], "prefill, TFLOPS", *BASELINES.values(), "speed over the fastest baseline"]
    expanded = next(row for row in result["layer"] if row["form"] == "expanded")
    words = (
        f"Back to back, our kernel at {result['versions']['kernel']}. A layer of DeepSeek-V3 takes "
        f"{expanded['ms_burst']:.1f} ms for {expanded['queries']} tokens."
    )
    return f"{table(header, lines, words=0)}\n\n{wrapped(words)}"


def made(root: Path, card: str) -> str:
    """The GPU, the date and the versions."""
    result = _measured(root, card)
    versions = result["versions"]
    return (
        f"{CARDS[card]}, {result['date'][:10]}, jax {versions['jax']}, FlashInfer "
        f"{versions['flashinfer'].split()[0]}, torch {versions['torch']}, our kernels at "
        f"{versions['kernel']}"
    )


def _measured(root: Path, card: str) -> Row:
    return read(root / "benchmarks" / "measured" / f"{card}_prefill.json")


def _by_shape(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each shape, by the name of what ran."""
    shapes: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = row["heads"], row["requests"], row["queries"], row["prefix"]
        shapes.setdefault(key, {})[row["variant"]] = row
    return list(shapes.values())


def _shape(row: Row) -> list[str]:
    queries = f"{row['queries']}" if row["queries"] else "ragged, about 1000"
    return [f"{row['heads']}", f"{row['requests']}", queries, f"{row['prefix']}"]


def _tflops(found: dict[str, Row], name: str, column: str) -> str:
    row = found.get(name)
    return "-" if row is None else f"{row['flops'] / row[column] / 1e9:.0f}"
