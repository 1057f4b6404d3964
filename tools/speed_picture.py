"""The README's picture: decode speed beside the baselines, from the rows of its table."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tables_common import CARDS
from tables_speed import BASELINES, OURS, fastest, summary_rows

PATH = Path("docs/images/h200_decode.svg")
COLUMN = "us_separated"
NAMES = {OURS: "mla-jax", **BASELINES}
COLOURS = {OURS: "#0072B2", "flashmla": "#8a8f98", "flashinfer_fa3": "#c9cdd4"}


def data(root: Path) -> list[dict[str, Any]]:
    """What is drawn: per row a label, and the speed of each relative to the faster baseline."""
    rows = []
    for shape, found in summary_rows(root):
        ragged = "~" if shape.lengths == "varlen" else ""
        tokens = f"\n{shape.s_q} query tokens" if shape.s_q > 1 else ""
        best = fastest(found, COLUMN)
        rows.append({
            "label": f"{shape.heads} heads\n{shape.batch} × {ragged}{shape.kv_len}{tokens}",
            **{name: round(best / found[name][COLUMN], 6) for name in NAMES},
        })  # fmt: skip
    return rows


def digest(root: Path) -> str:
    """Of what is drawn; the picture carries it, since its bytes depend on matplotlib's version."""
    return hashlib.sha256(json.dumps(data(root)).encode()).hexdigest()


def is_current(root: Path) -> bool:
    """Whether the committed picture was drawn from the committed rows."""
    path = root / PATH
    return path.is_file() and digest(root) in path.read_text(encoding="utf-8")


def draw(root: Path) -> None:
    """Writes the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = data(root)
    style = {"svg.hashsalt": "mla-jax", "font.size": 9, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(figsize=(10, 3.8), layout="constrained")
        width = 0.27
        for i, name in enumerate(NAMES):
            places = [row + (i - 1) * width for row in range(len(rows))]
            speeds = [row[name] for row in rows]
            bars = axes.bar(places, speeds, width, label=NAMES[name], color=COLOURS[name])
            if name == OURS:
                axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.axhline(1, color="#444444", linewidth=0.8)
        axes.set_xticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("speed, faster baseline = 1")
        axes.set_xlabel("requests × KV tokens per request; ~ marks ragged lengths, by their mean")
        axes.set_title(
            f"Speed of MLA decode on an {CARDS['h200']}, bfloat16 cache (higher is better)",
            loc="left", fontweight="bold", fontsize=10,
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="upper right")
        (root / PATH).parent.mkdir(parents=True, exist_ok=True)
        note = {"Date": None, "Description": f"data sha256 {digest(root)}"}
        figure.savefig(root / PATH, metadata=note)
        plt.close(figure)
    text = (root / PATH).read_text(encoding="utf-8")
    lines = [line.rstrip() for line in text.splitlines()]
    (root / PATH).write_text("\n".join(lines) + "\n", encoding="utf-8")
