"""The house style of the pictures. matplotlib loads only where a picture is drawn."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Distinguishable with any colour vision (Okabe and Ito, 2008), in order of use.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
    "#56B4E9", "#8C6D31", "#555555", "#000000",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
GREY = "#8a8f98"

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


@contextlib.contextmanager
def figure(
    path: Path, title: str, *, columns: int = 1, rows: int = 1, size: tuple[float, float]
) -> Iterator[Any]:
    """Yields the axes of a new picture (an array if there are several), then writes it to `path`.

    `size` is in inches. It goes to the Agg canvas, so no display is needed and none is touched.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        picture = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(picture)
        picture.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield picture.subplots(rows, columns)
        picture.savefig(path)
