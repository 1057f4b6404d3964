"""The house style of the pictures. matplotlib loads only where a picture is drawn.

Pictures are drawn of any number of series, with names and numbers as they come: `look` never runs
out, `name` makes a label of any text, `lowest` and `highest` give limits of any numbers.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Distinguishable with any colour vision (Okabe and Ito, 2008), in order of use.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#8C6D31", "#555555", "#000000",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
LINES = ("-", "--", ":", "-.")
GREY = "#8a8f98"
LONGEST_NAME = 48  # characters of a label
MOST_PIXELS = 30_000  # of a side; Agg draws at most twice as many

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e6ea",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.framealpha": 1.0,
    "legend.edgecolor": "white",
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


def look(i: int) -> dict[str, Any]:
    """Colour, marker and line style of series `i`: all differ among the first nine, and no two of
    the first 81 agree in both colour and marker."""
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def points(i: int) -> dict[str, Any]:
    """The look of series `i` as hollow markers that no line joins."""
    return look(i) | {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.6}


def name(text: Any, most: int = LONGEST_NAME) -> str:
    """Any text as a label of one line: shortened in the middle, and shown in a legend, which leaves
    out labels that start with an underscore."""
    label = " ".join(str(text).split())
    if len(label) > most:
        label = f"{label[: most // 2]}…{label[len(label) - (most - most // 2 - 1) :]}"
    return f" {label}" if label.startswith("_") else label


def numbers(values: Iterable[Any]) -> list[float]:
    """Values as floats, NaN for what is not a number (a refusal, None)."""
    return [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan
        for v in values
    ]


def lowest(values: Iterable[Any], default: float = 1.0) -> float:
    """The least finite value above 0, for the limit of an axis; `default` where there is none."""
    return min((v for v in numbers(values) if math.isfinite(v) and v > 0), default=default)


def highest(values: Iterable[Any], default: float = 1.0) -> float:
    """The largest finite value above 0, for the limit of an axis; `default` where there is none."""
    return max((v for v in numbers(values) if math.isfinite(v) and v > 0), default=default)


def several(axes: Any) -> list[Any]:
    """What `figure` yields as a list: matplotlib gives one of them without it."""
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def legend(axes: Any) -> None:
    """A legend below everything in the picture, which grows by its height; none where nothing has a
    label."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    picture = axes.figure
    width, height = picture.get_size_inches()
    columns = min(len(handles), max(1, int(13 * width) // (max(map(len, labels)) + 6)))
    picture.set_size_inches(width, height + 0.19 * math.ceil(len(handles) / columns))
    picture.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


@contextlib.contextmanager
def figure(
    path: Path, title: str, *, columns: int = 1, rows: int = 1, size: tuple[float, float]
) -> Iterator[Any]:
    """Yields the axes of a new picture (an array if there are several), then writes it to `path`.

    `size` is in inches. It goes to the Agg canvas, so no display is needed and none is touched.
    Dollar signs in titles, labels and names are shown as they are, not read as mathematics.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        picture = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(picture)
        heading = name(title, max(20, int(10 * size[0])))
        picture.suptitle(heading, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield picture.subplots(max(1, rows), max(1, columns))
        _show_dollars(picture)
        picture.savefig(path, dpi=min(150, MOST_PIXELS / max(size)))


def _show_dollars(picture: Any) -> None:
    """Turns mathematics off in every text but those that matplotlib writes, as a scale's powers."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    written = set()
    for axes in picture.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if not isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter):
                written |= set(axis.get_ticklabels())
            written |= {*axis.get_ticklabels(minor=True), axis.get_offset_text()}
    for text in picture.findobj(Text):
        if text not in written:
            text.set_parse_math(False)
