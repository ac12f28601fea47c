"""How all pictures look, and how they are written.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by the color-blind too (Okabe and Ito), in the order of the runs."""

INK, GRID = "#333333", "#e4e4e4"


def require_matplotlib() -> None:
    """Raise an ImportError that says what to install, where nothing could be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "mossrlhf[plot]"') from error


def blank() -> "Figure":
    """Return an empty figure, without pyplot; a notebook shows it. Source: ours."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    class Picture(Figure):
        """Shows itself in a notebook, which pyplot would have to teach it otherwise."""

        def _repr_png_(self) -> bytes:
            return png_bytes(self)

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Picture(figsize=(12, 8), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: "Axes", title: str, *, whole: bool = True) -> None:
    """Give axes a title and the looks of this library.

    Args:
        axes: to be dressed.
        title: what is drawn, with its unit.
        whole: whether the ticks below are whole numbers.

    Source: ours.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=12.5, color=INK, pad=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=10, length=0, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
    axes.margins(x=0.02)


def write_picture(figure: "Figure", path: str | Path | None) -> None:
    """Write a figure in the format of the path's suffix; None for nowhere. Source: ours."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".png":
        Path(path).write_bytes(png_bytes(figure))
    else:
        figure.savefig(path)


def png_bytes(figure: "Figure") -> bytes:
    """Return a figure as a PNG of few bytes. Source: ours."""
    from PIL import Image  # matplotlib brings it

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A few colors and their shades toward white: a palette takes a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE).save(packed, "png")
    return packed.getvalue()
