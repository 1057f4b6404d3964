"""The style of all pictures. matplotlib is only imported when a picture is drawn.

A picture may have any number of series with any names and values. `look` gives a style to each,
`name` makes a label of any text, and `lowest` and `highest` give axis limits.
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
LONGEST_NAME = 48  # characters per label
MOST_PIXELS = 30_000  # per side, half of what Agg can draw

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
    """Returns colour, marker and line style of series `i`.

    All three differ among the first nine series. No two of the first 81 have the same colour and
    marker.
    """
    turn = i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": LINES[turn % len(LINES)],
    }


def points(i: int) -> dict[str, Any]:
    """Returns the style of series `i` with hollow markers and no line."""
    return look(i) | {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.6}


def name(text: Any, most: int = LONGEST_NAME) -> str:
    """Returns any text as a label of one line, shortened in the middle.

    A label that starts with an underscore gets a space in front, because matplotlib's legends leave
    such labels out.
    """
    label = " ".join(str(text).split())
    if len(label) > most:
        label = f"{label[: most // 2]}…{label[len(label) - (most - most // 2 - 1) :]}"
    return f" {label}" if label.startswith("_") else label


def numbers(values: Iterable[Any]) -> list[float]:
    """Returns values as floats, and NaN for what is not a number, such as a refusal or None."""
    return [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan
        for v in values
    ]


def lowest(values: Iterable[Any], default: float = 1.0) -> float:
    """Returns the smallest finite value above 0, or `default`, for the limit of an axis."""
    return min((v for v in numbers(values) if math.isfinite(v) and v > 0), default=default)


def highest(values: Iterable[Any], default: float = 1.0) -> float:
    """Returns the largest finite value above 0, or `default`, for the limit of an axis."""
    return max((v for v in numbers(values) if math.isfinite(v) and v > 0), default=default)


def several(axes: Any) -> list[Any]:
    """Returns the axes of `figure` as a list, also if there is only one."""
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def legend(axes: Any) -> None:
    """Draws a legend below the picture, which grows by its height; none if nothing has a label."""
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
    """Yields the axes of a new picture, an array if there are several, then writes it to `path`.

    size: in inches. Drawing uses the Agg canvas, which needs no display. Dollar signs in titles,
    labels and names are shown as they are and do not start mathematics.
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
        _write(picture, path, min(150, MOST_PIXELS / max(size)))


def _write(picture: Any, path: Path, dpi: float) -> None:
    _show_dollars(picture)
    picture.savefig(path, dpi=dpi)


def _show_dollars(picture: Any) -> None:
    """Turns off mathematics in all texts except those that matplotlib writes, such as powers."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    ours: list[Any] = []
    for axes in picture.axes:
        for part in axes.get_children():
            if not isinstance(part, Axis):
                ours += part.findobj(Text)
                continue
            ours.append(part.label)
            # An axis makes the ticks that it is asked for, which is slow.
            if isinstance(part.get_major_formatter(), FixedFormatter | FuncFormatter):
                ours += part.get_ticklabels()
    for part in picture.get_children():
        if part not in picture.axes:
            ours += part.findobj(Text)
    for text in ours:
        text.set_parse_math(False)
