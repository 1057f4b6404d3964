"""What the writers of tables share: committed results, shapes in words, Markdown tables."""

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's packages, whatever is installed

Row = dict[str, Any]

# The name that JAX gives the GPU whose results are in the folder of `benchmarks` of that name.
CARDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


def load(root: Path, name: str) -> Row:
    """The result of an experiment on a CPU."""
    return read(root / "benchmarks" / "results" / f"{name}.json")


def result_of(root: Path, card: str, experiment: str) -> Row:
    """The result of an experiment on a GPU."""
    return read(root / "benchmarks" / card / experiment / "result.json")


def measured(root: Path, card: str) -> Row:
    """Our decode kernels and the baselines, timed in one process on one GPU."""
    return read(root / "benchmarks" / "measured" / f"{card}_decode.json")


def read(path: Path) -> Row:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def day(result: Row, row: Row) -> str:
    """The date on which a row of a benchmark was measured."""
    return result["sessions"][row["session"]]["started"][:10]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; columns after the first `words` are aligned to the right."""
    numbers = len(header) - words
    lines = [header, [*["---"] * words, *["---:"] * numbers], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 119 characters, as all our Markdown."""
    return "\n".join(textwrap.wrap(text, 119, break_on_hyphens=False, break_long_words=False))


SHAPE = ("heads", "query tokens", "requests", "KV tokens per request")


def shape_cells(heads: int, s_q: int, batch: int, lengths: str, kv_len: int) -> list[str]:
    """The cells under `SHAPE`."""
    ragged = "ragged, mean " if lengths == "varlen" else ""
    return [str(heads), str(s_q), str(batch), f"{ragged}{kv_len}"]
