"""Figures: the curves of runs, histograms of rewards, a critic's values over measured returns.

They are made without pyplot: no window, no global state, nothing to close.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mossrlhf.critic_evaluation import CriticEvaluation

__all__ = ["Panel", "plot_arms", "plot_critic", "plot_history", "plot_reward_histograms"]

History = Sequence[Mapping[str, Any]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""A color-blind-safe palette (Okabe and Ito), in the order of the runs."""

INK, GRID, SHADE = "#333333", "#e4e4e4", "#f0f0f0"

STYLES = SOLID, DASHED, DOTTED = ("-", (0, (4, 1.5)), (0, (1, 1.3)))
"""Of the curves of one run within a panel."""

COLLAPSED = "policy/collapsed"


@dataclass(frozen=True)
class Panel:
    """One pair of axes with the curves of some metrics.

    Args:
        title: the quantity, with its unit.
        curves: metric by label; each has its own line style.
        floor: the axis is logarithmic above it if the data exceed both 20 times this number and
            5 times their minimum. None for a linear axis.
        limits: (bottom, top) of the axis; None fits the data.
        band: two metrics; with a single run, the area between them is shaded.
    """

    title: str
    curves: Mapping[str, str]
    floor: float | None = None
    limits: tuple[float | None, float | None] = (None, None)
    band: tuple[str, str] | None = None


SCORE = Panel("Reward score (trained on)", {"score": "reward/score_mean"})
VARIETY = Panel("Distinct bigrams (share)", {"share": "response/distinct_2"}, None, (0.0, None))
KL = Panel("KL to the SFT model (nats/response)", {"k1": "kl/ref_per_sequence"}, floor=1.0)
PERPLEXITY = Panel(
    "Perplexity of the responses",
    {"under the policy": "perplexity/policy", "under the SFT model": "perplexity/ref"},
    floor=1.0,
)
LENGTH = Panel("Response length (tokens)", {"mean": "response/length_tokens"}, limits=(0.0, None))
VALUE_LOSS = Panel("Value loss (squared reward)", {"critic": "critic/loss"}, 0.01, (0.0, None))

ARM_PANELS = (SCORE, VARIETY, KL, PERPLEXITY, LENGTH, VALUE_LOSS)
"""The default panels of `plot_arms`."""


# ---- curves -------------------------------------------------------------------------------------


def plot_history(history: History, path: str | Path | None = None) -> "Figure":
    """Plot one run: the curves that show whether PPO works.

    Metrics that were not logged are left out; the critic's warm-up is left of iteration 0.

    Args:
        history: `Trainer.history`.
        path: where to write the figure, in the format of its suffix; None to write no file.

    Raises:
        ValueError: if nothing has been logged yet.

    Source: P1 figures 4 and 9.
    """
    return _plot_panels({"": history}, _history_panels(history), path)


def plot_arms(
    histories: Mapping[str, History],
    path: str | Path | None = None,
    panels: Sequence[Panel] = ARM_PANELS,
    true_quality: str | None = None,
    title: str | None = None,
) -> "Figure":
    """Plot several runs in the same panels, one color for each.

    A cross marks the iteration in which `CollapseWatch` first found a run collapsed.

    Args:
        histories: `Trainer.history` by the name of the run, in the order of the legend.
        path: where to write the figure, in the format of its suffix; None to write no file.
        panels: the panels; those without data are left out.
        true_quality: a metric that measures the true quality, e.g. ``reward/true_quality/mean``,
            plotted instead of the second panel; None for none.
        title: one line at the top; None for none.

    Raises:
        ValueError: if nothing has been logged yet, or no run logs `true_quality`.

    Source: P1 figures 4 and 9.
    """
    if true_quality is not None:
        if true_quality not in _logged(histories):
            means = sorted(name for name in _logged(histories) if name.endswith("/mean"))
            raise ValueError(f"true_quality: got {true_quality!r}, which no run logs; take {means}")
        true = Panel("True quality (never trained on)", {"mean": true_quality})
        panels = [*panels[:1], true, *panels[2:]]
    return _plot_panels(histories, panels, path, title)


def _history_panels(history: History) -> list[Panel]:
    def by_label(start: str, end: str) -> dict[str, str]:
        found = [n for n in _logged({"": history}) if n.startswith(start) and n.endswith(end)]
        return {name[len(start) : -len(end)]: name for name in sorted(found)}

    # A single trained reward equals the score: it is plotted once.
    score, means = _series(history, SCORE.curves["score"]), by_label("reward/", "/mean")
    rewards = {label: name for label, name in means.items() if _series(history, name) != score}
    band, wins = ("reward/score_p05", "reward/score_p95"), by_label("eval/", "/win_rate")
    kl = {"k1 (signed)": "kl/ref_per_sequence", "k3 (≥ 0)": "kl/ref_k3_per_sequence"}
    shares = {"distinct-2": "response/distinct_2", "truncated": "response/truncated_fraction"}
    clipped = {"policy": "policy/clip_fraction", "critic": "critic/clip_fraction"}
    return [
        Panel("Reward (score: mean, 5-95 %)", {**SCORE.curves, **rewards}, band=band),
        Panel("Wins against the SFT model (share)", wins, limits=(-0.02, 1.02)),
        Panel(KL.title, kl, floor=KL.floor),
        PERPLEXITY,
        LENGTH,
        Panel("Responses (shares)", shares, limits=(-0.02, 1.02)),
        VALUE_LOSS,
        Panel("Variance the critic explains (share)", {"critic": "critic/explained_variance"}, 1.0),
        Panel("Clipped (share of tokens)", clipped, limits=(0.0, None)),
    ]


def _logged(histories: Mapping[str, History]) -> set[str]:
    return {name for history in histories.values() for entry in history for name in entry}


def _series(history: History, metric: str) -> tuple[list[float], list[float]]:
    """Iterations and values of a metric; the warm-up ends at 0, non-finite values become NaN."""
    warmup = max((entry.get("pretrain/step", 0) for entry in history), default=0)
    steps, values = [], []
    for entry in history:
        value = entry.get(metric)
        if value is not None:
            steps.append(float(entry.get("step", entry.get("pretrain/step", math.nan) - warmup)))
            values.append(float(value) if math.isfinite(value) else math.nan)
    return steps, values


def _plot_panels(
    histories: Mapping[str, History],
    panels: Sequence[Panel],
    path: str | Path | None,
    title: str | None = None,
) -> "Figure":
    if len(histories) > 1:  # warm-ups differ in length, and the policies do not move in them
        histories = {n: [e for e in history if "step" in e] for n, history in histories.items()}
    logged = _logged(histories)
    curves = [{k: m for k, m in panel.curves.items() if m in logged} for panel in panels]
    shown = [replace(p, curves=c) for p, c in zip(panels, curves, strict=True) if c]
    if not shown:
        raise ValueError("history: it has nothing to plot yet; call train() first")
    figure = new_figure()
    columns = math.ceil(math.sqrt(len(shown)))
    rows, axes = math.ceil(len(shown) / columns), None
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1, sharex=axes)
        _draw_panel(axes, panel, list(histories.values()))
        style_axes(axes, panel.title)
        _scale(axes, panel)
        if index + columns >= len(shown):
            axes.set_xlabel("PPO iteration", fontsize=11, color=INK)
    _add_legend(figure, histories, title)
    save_figure(figure, path)
    return figure


def _color(number: int, count: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(COLORS):
        return COLORS[number]
    return to_hex(colormaps["viridis"](number / (count - 1)))


def _draw_panel(axes: "Axes", panel: Panel, histories: Sequence[History]) -> None:
    """Plot a color for each run and a line style for each curve; a single run combines both."""
    from matplotlib.lines import Line2D

    alone = len(histories) == 1
    styles = [STYLES[place % len(STYLES)] for place in range(len(panel.curves))]
    own = [_color(place, len(styles)) for place in range(len(styles))]
    for number, history in enumerate(histories):
        flags = zip(*_series(history, COLLAPSED), strict=True)
        collapsed = min((step for step, flag in flags if flag), default=math.inf)
        for place, metric in enumerate(panel.curves.values()):
            color = own[place] if alone else _color(number, len(histories))
            steps, values = _series(history, metric)
            width = 1.8 if len(steps) < 200 else 1.2
            marker = "o" if len(steps) < 3 else ""  # a single point makes no line
            axes.plot(steps, values, color=color, ls=styles[place], lw=width, marker=marker)
            after = [i for i, step in enumerate(steps) if step >= collapsed]
            if after and not (alone and place):
                x, y = steps[after[0]], values[after[0]]
                axes.plot(x, y, "X", color=color, mec="white", ms=11, zorder=5)
    if alone:
        _shade(axes, panel, histories[0], own[0])
    keys = [
        Line2D([], [], color=own[place] if alone else INK, lw=1.8, ls=styles[place], label=label)
        for place, label in enumerate(panel.curves)
    ]
    if len(keys) > 1:
        box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
        axes.legend(handles=keys, fontsize=9.5, labelcolor=INK, handlelength=2.4, **box)


def _shade(axes: "Axes", panel: Panel, history: History, color: str) -> None:
    """Shade the band of a run, and its critic's warm-up in gray."""
    if panel.band is not None:
        low, high = (dict(zip(*_series(history, name), strict=True)) for name in panel.band)
        steps = sorted(low.keys() & high.keys())
        bottom, top = ([edge[x] for x in steps] for edge in (low, high))
        axes.fill_between(steps, bottom, top, color=color, alpha=0.13, lw=0)
    if warmup := _series(history, "pretrain/step")[0]:
        axes.axvspan(warmup[0], 0.5, color=SHADE, zorder=0)


def _scale(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

    low, high = axes.dataLim.intervaly
    reach = max(-low, high)
    # Between two numbers that are close, a logarithmic axis has no tick.
    if (floor := panel.floor) is None or not max(20 * floor, 5 * low) < reach < math.inf:
        axes.set_ylim(*panel.limits)
        return
    # Logarithmic above the floor, linear below it: estimates of KL pass through zero.
    axes.set_yscale("symlog", linthresh=floor, linscale=0.4)
    ticks = [1, 2, 5] if reach < 200 * max(floor, low) else [1]
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=floor, subs=ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}".replace("-", "−")))


def _add_legend(figure: "Figure", histories: Mapping[str, History], title: str | None) -> None:
    """Write the title, and the legend that holds for all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    several = len(histories) > 1
    names = list(histories) if several else []
    colors = [_color(number, len(names)) for number in range(len(names))]
    keys: list[Any] = [Line2D([], [], color=colors[i], lw=3, label=n) for i, n in enumerate(names)]
    if any(entry.get(COLLAPSED) for history in histories.values() for entry in history):
        cross: dict[str, Any] = {"ls": "", "marker": "X", "ms": 10, "color": "#888888"}
        keys.append(Line2D([], [], label="collapse detected", **cross))
    if not several and "pretrain/step" in _logged(histories):
        keys.append(Patch(color=SHADE, label="critic warm-up"))
    title = title or ("" if several else next(iter(histories)))
    if not keys and not title:
        return
    width = sum(len(str(key.get_label())) + 9 for key in keys)  # characters; about 130 fit
    legend = figure.legend(
        handles=keys,
        loc="outside upper left",
        ncols=math.ceil(len(keys) / max(1, math.ceil(width / 130))),
        fontsize=12,
        frameon=False,
        labelcolor=INK,
        title=title,
        title_fontproperties={"size": 15, "weight": "bold"},
        alignment="left",
    )
    legend.get_title().set_color(INK)


# ---- rewards and critic -------------------------------------------------------------------------


def plot_reward_histograms(
    rows: Sequence[Mapping[str, Any]], path: str | Path | None = None, spans: int = 5
) -> "Figure":
    """Plot how each reward is distributed over the responses, from early in a run to late.

    Args:
        rows: of ``completions.jsonl``, as `completion_table` reads them: the first responses of
            each logged iteration, with a ``step`` and a number under ``reward/<name>``.
        path: where to write the figure, in the format of its suffix; None to write no file.
        spans: parts of the run with equally many logged iterations, one row of histograms each.

    Raises:
        ValueError: if no row has a reward that is a finite number.

    Source: P1 Fig. 13 (histograms of the reward over the steps of training).
    """
    names = sorted({name for row in rows for name in row if name.startswith("reward/")})
    names = [name for name in names if any(_is_plottable(row.get(name)) for row in rows)]
    if not names:
        raise ValueError(
            "rows: none has a reward that is a finite number; pass what "
            "completion_table('<output_dir>/completions.jsonl') returns"
        )
    parts = _split(sorted({row["step"] for row in rows}), spans)
    figure = new_figure()
    figure.set_size_inches(max(12, 3.5 * len(names)), 1.2 + 1.5 * len(parts))
    for column, name in enumerate(names):
        found = [(row["step"], row[name]) for row in rows if _is_plottable(row.get(name))]
        low, high = min(x for _, x in found), max(x for _, x in found)
        pad = 0.5 if low == high else 0.0  # a constant reward still needs a bar of some width
        first = None
        for line, steps in enumerate(parts):
            inside = [reward for step, reward in found if step in steps]
            place = line * len(names) + column + 1
            axes = figure.add_subplot(len(parts), len(names), place, sharex=first, sharey=first)
            first = first or axes
            shares = [1 / len(inside) for _ in inside]  # there may be none
            color, bounds = COLORS[column % len(COLORS)], (low - pad, high + pad)
            axes.hist(inside, bins=20, range=bounds, weights=shares, color=color)
            if inside:
                axes.axvline(sum(inside) / len(inside), color=INK, ls=DOTTED, lw=1.4)
            when = f"s {min(steps)}-{max(steps)}" if len(steps) > 1 else f" {min(steps)}"
            title = f"iteration{when}  (n = {len(inside)})"
            heading = f"{name.removeprefix('reward/')}: {title}" if line == 0 else title
            style_axes(axes, heading, whole=False)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    save_figure(figure, path)
    return figure


def _is_plottable(value: Any) -> bool:
    # Being finite is not enough: maximum − minimum must be finite too.
    return isinstance(value, int | float) and abs(value) < 1e300


def _split(steps: Sequence[int], count: int) -> list[set[int]]:
    """Cut iterations into parts of nearly equal length."""
    count = max(1, min(count, len(steps)))
    edges = [round(i * len(steps) / count) for i in range(count + 1)]
    return [set(steps[a:b]) for a, b in pairwise(edges)]


def plot_critic(evaluation: "CriticEvaluation", path: str | Path | None = None) -> "Figure":
    """Plot a critic's values over the returns of continuations, and its error by position.

    Args:
        evaluation: what `Trainer.evaluate_critic` returns.
        path: where to write the figure, in the format of its suffix; None to write no file.

    Returns:
        the figure; a notebook shows it. Left: one point per state, with twice the standard error
        of its return. Right: the mean absolute error in each part of the response, above the
        noise that a perfect critic would show as well.
    """
    figure = new_figure()
    figure.set_size_inches(12, 5)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    values, returns = evaluation.values.tolist(), evaluation.returns.tolist()
    reach, dot = (2 * evaluation.standard_errors).tolist(), COLORS[0]
    left.errorbar(returns, values, xerr=reach, fmt="o", ms=4, color=dot, ecolor=GRID, zorder=2)
    ends = [min(returns + values), max(returns + values)]
    left.plot(ends, ends, color=INK, lw=1, ls=DASHED, zorder=1)
    style_axes(left, "Value of the critic over the mean return", whole=False)
    left.set_xlabel(f"mean return of {evaluation.continuations} continuations", color=INK)
    left.set_ylabel("value", color=INK)
    parts = evaluation.by_position
    middles, width = [(part.start + part.end) / 2 for part in parts], 0.8 / len(parts)
    errors = [part.mean_absolute_error for part in parts]
    # The mean of |x| is √(2/π) times the standard deviation, if x is normal.
    floor = [math.sqrt(2 / math.pi) * part.noise for part in parts]
    right.bar(middles, errors, width, color=COLORS[0], label="mean absolute error")
    right.bar(middles, floor, width, color=COLORS[4], label="of it, noise of the returns")
    style_axes(right, "Error by position (units of reward)", whole=False)
    right.set_xlabel("share of the response before the state", color=INK)
    right.legend(frameon=False, labelcolor=INK)
    save_figure(figure, path)
    return figure


# ---- figures and files --------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Raise an ImportError that names the package to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "mossrlhf[plot]"') from error


def new_figure() -> "Figure":
    """Return an empty figure, made without pyplot; a notebook shows it."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    class NotebookFigure(Figure):
        """Shows itself in a notebook, which otherwise takes pyplot."""

        def _repr_png_(self) -> bytes:
            return png_bytes(self)

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = NotebookFigure(figsize=(12, 8), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: "Axes", title: str, *, whole: bool = True) -> None:
    """Give axes a title and the library's style; `whole`: ticks below are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=12.5, color=INK, pad=8)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=10, length=0, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
    axes.margins(x=0.02)


def save_figure(figure: "Figure", path: str | Path | None) -> None:
    """Write a figure in the format of the path's suffix; None writes nothing."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix == ".png":
        Path(path).write_bytes(png_bytes(figure))
    else:
        figure.savefig(path)


def png_bytes(figure: "Figure") -> bytes:
    """Return a figure as a small PNG."""
    from PIL import Image  # matplotlib depends on it

    full, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png")
    # A few colors and their shades toward white: with a palette it takes a third of the bytes.
    Image.open(full).convert("RGB").quantize(dither=Image.Dither.NONE).save(packed, "png")
    return packed.getvalue()
