"""The house style of figures, and how they get into a report or a PNG.

Figures are built without pyplot, so nothing is global and nothing needs closing.
"""

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from cycler import cycler
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and in print.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY, INK = "#e69f00", "#56b4e9", "#8a929c", "#1f2933"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
FAINT = "#d9dee4"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    # Text as outlines: a report looks the same wherever it is opened.
    "svg.fonttype": "path",
    # Equal input gives equal bytes.
    "svg.hashsalt": "olmax",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Inside, figures are made and drawn in the house style."""
    with matplotlib.rc_context(_STYLE):
        yield


def panels(
    rows: int, columns: int, *, width: float = 8.6, height: float = 3.0, **kwargs
) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels (inches; `height` is that of one row) and its axes."""
    figure = Figure(figsize=(width, height * rows))
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def label_lines(
    axes: Axes, texts: Sequence[str], ends: Sequence[tuple[float, float]], colors: Sequence[str]
):
    """Writes each line's name beside its last point, spread so that names do not overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.065
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    placed = -float("inf")
    for i in order:
        placed = max(ends[i][1], placed + gap)
        axes.annotate(
            texts[i],
            (ends[i][0], placed),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colors[i],
            annotation_clip=False,
        )


def svg_data_uri(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,...`."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def save_png(figure: Figure, path: epath.PathLike, *, dpi: int = 160) -> epath.Path:
    """Writes the figure as PNG and returns its path."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    path.write_bytes(buffer.getvalue())
    return path
