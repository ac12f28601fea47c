"""Figures of benchmarks/scaling.py as a picture."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from growth import AXES, Figures, Row, both, fitted, rows

from mossrlhf.plotting import COLORS, INK, new_figure, save_figure, style_axes

LOOKS = (
    {"color": COLORS[0], "ls": "-", "marker": "o"},
    {"color": COLORS[1], "ls": "--", "marker": "s"},
    {"color": COLORS[2], "ls": ":", "marker": "^"},
)
TIME = {
    "iteration": ("seconds",),
    "drawing": ("stages", "collect"),
    "learning": ("stages", "update"),
}
SPEED = {"rollouts / s": ("rollouts",)}
MEMORY = {"peak": ("peak",), "weights, grads, Adam": ("states",), "rest": ("rest",)}


def draw(figures: Figures, path: Path | None) -> Any:
    """Draw time above memory, an axis a column, all logarithmic.

    Args:
        figures: of `scaling.run`.
        path: where to write the picture; None for nowhere.

    Returns:
        the figure.
    """
    done = {
        axis: [row for row in points if "failed" not in row]
        for axis, points in rows(figures).items()
    }
    done = {axis: points for axis, points in done.items() if points}
    figure = new_figure()
    figure.set_size_inches(3.7 * len(done), 8)
    above, below = [], []
    for place, (axis, points) in enumerate(done.items()):
        name, unit = AXES[axis]
        upper, lower = (
            figure.add_subplot(2, len(done), 1 + place + row * len(done)) for row in range(2)
        )
        speeds = axis == "processes"
        style_axes(upper, f"{'Speed' if speeds else 'Time'} by {name}")
        style_axes(lower, f"Memory by {name}")
        _panel(
            upper, points, SPEED if speeds else TIME, "rollouts / s" if speeds else "s / iteration"
        )
        _panel(lower, points, MEMORY, "MB of the first process" if speeds else "MB")
        for axes in (upper, lower):
            axes.set_xlabel(unit, fontsize=11, color=INK)
        below.append(lower)
        above += [] if speeds else [upper]
    for alike in (above, below):
        _same_heights(alike)
    save_figure(figure, path)
    return figure


def _panel(
    axes: Any, points: Sequence[Row], curves: Mapping[str, Sequence[str]], unit: str
) -> None:
    """Draw curves over the points of an axis; with time, a line that grows as the axis does."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    xs = [row["x"] for row in points]
    for look, (label, names) in zip(LOOKS, curves.items(), strict=False):
        ys = [row[names[0]] if len(names) == 1 else row[names[0]][names[1]] for row in points]
        said = f"{label}: {both(fitted(points, *names))}"
        axes.plot(xs, ys, lw=1.8, ms=5, label=said, **look)
    if curves is not MEMORY:
        last = axes.lines[0].get_ydata()[-1]
        line = [last * x / xs[-1] for x in xs]
        axes.plot(xs, line, color="#999999", lw=1, zorder=1, label="exponent 1")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([row["value"] for row in points]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for one, form in ((axes.xaxis, _short), (axes.yaxis, "{:,.10g}".format)):
        one.set_minor_locator(NullLocator())
        one.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
    axes.margins(x=0.06)
    axes.set_ylabel(unit, fontsize=11, color=INK)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(*_room(low, high))
    legend = axes.legend(
        loc="upper left",
        fontsize=9,
        labelcolor=INK,
        handlelength=2.4,
        frameon=False,
        title="exponent: all points / last two",
        title_fontsize=9,
        alignment="left",
    )
    legend.get_title().set_color(INK)
    legend.set_in_layout(False)  # it would make the panels narrow


def _short(value: float) -> str:
    """Write a number so that four of them fit below a panel."""
    return f"{value / 1000:,.3g}k" if value >= 1000 else f"{value:,.10g}"


def _room(low: float, high: float) -> tuple[float, float]:
    """Return limits of a logarithmic axis that leave room for a legend above the curves."""
    span = max(log(high / low, 10), 0.7)
    return low / 10 ** (0.08 * span), high * 10 ** (0.6 * span)


def _same_heights(panels: Sequence[Any]) -> None:
    """Give panels of the same unit the same limits, so that they can be compared."""
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
