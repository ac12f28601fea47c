"""Curves of one run, or of several runs over each other, as a person wants to see them.

Figures are made without pyplot: no window, no global state, nothing to close.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mossrlhf.drawing import COLORS, INK, blank, dress, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]

STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.3)))
"""Solid, dashed, dotted: the curves of one run within a panel."""

COLLAPSED, FLAG = "policy/collapsed", "collapse detected"
SHADE = "#f0f0f0"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: what is drawn, with its unit.
        curves: metric by label; several are told apart by their line style.
        floor: where data reach beyond 20 times this and 5 times their least, the axis is
            logarithmic above it. None for a linear axis.
        limits: (bottom, top) of the axis; None fits the data.
        band: two metrics; a single run is shaded from the one to the other.

    Source: ours.
    """

    title: str
    curves: Mapping[str, str]
    floor: float | None = None
    limits: tuple[float | None, float | None] = (None, None)
    band: tuple[str, str] | None = None


SCORE = Panel("Reward score (trained on)", {"score": "reward/score_mean"})
SCORE_BAND = ("reward/score_p05", "reward/score_p95")
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
"""What `plot_arms` draws, where it is not told otherwise."""


def plot_history(history: History, path: str | Path | None = None) -> "Figure":
    """Draw one run: the curves that tell whether PPO works.

    What was not logged is left out; the critic's warm-up stands left of iteration 0.

    Args:
        history: `Trainer.history`.
        path: where to write the picture, in the format of its suffix; None for nowhere.

    Returns:
        the figure; a notebook shows it.

    Raises:
        ImportError: without matplotlib; it says what to install.
        ValueError: where nothing has been logged yet.

    Source: P1 figures 4 and 9.
    """
    return _picture({"": history}, _history_panels(history), path)


def plot_arms(
    histories: Mapping[str, History],
    path: str | Path | None = None,
    panels: Sequence[Panel] = ARM_PANELS,
    true_quality: str | None = None,
    title: str | None = None,
) -> "Figure":
    """Draw several runs over each other, each in a color of its own.

    A cross marks the iteration in which `CollapseWatch` first took a run for collapsed.

    Args:
        histories: `Trainer.history` by the name of the run, in the order of the legend.
        path: where to write the picture, in the format of its suffix; None for nowhere.
        panels: what to draw; those of which no run has anything are left out.
        true_quality: a metric that tells the true quality, e.g. ``reward/true_quality/mean``, to be
            drawn in place of the second panel; None for none.
        title: one line above all; None for none.

    Returns:
        the figure; a notebook shows it.

    Raises:
        ImportError: without matplotlib; it says what to install.
        ValueError: where nothing has been logged yet, or `true_quality` by none of the runs.

    Source: P1 figures 4 and 9.
    """
    if true_quality is not None:
        if true_quality not in _logged(histories):
            means = sorted(name for name in _logged(histories) if name.endswith("/mean"))
            raise ValueError(f"true_quality: got {true_quality!r}, which no run logs; take {means}")
        true = Panel("True quality (never trained on)", {"mean": true_quality})
        panels = [*panels[:1], true, *panels[2:]]
    return _picture(histories, panels, path, title)


def _history_panels(history: History) -> list[Panel]:
    """What `plot_history` draws: the rewards have the names they have."""

    def get(start: str, end: str) -> dict[str, str]:
        found = [n for n in _logged({"": history}) if n.startswith(start) and n.endswith(end)]
        return {name[len(start) : -len(end)]: name for name in sorted(found)}

    # A single trained reward is the score itself: once is enough.
    trained = _series(history, SCORE.curves["score"])
    rewards = {n: m for n, m in get("reward/", "/mean").items() if _series(history, m) != trained}
    kl = {"k1 (signed)": "kl/ref_per_sequence", "k3 (≥ 0)": "kl/ref_k3_per_sequence"}
    responses = {"distinct-2": "response/distinct_2", "truncated": "response/truncated_fraction"}
    clipped = {"policy": "policy/clip_fraction", "critic": "critic/clip_fraction"}
    return [
        Panel("Reward (score: mean, 5-95 %)", {**SCORE.curves, **rewards}, band=SCORE_BAND),
        Panel("Wins against the SFT model (share)", get("eval/", "/win_rate"), None, (-0.02, 1.02)),
        Panel(KL.title, kl, floor=KL.floor),
        PERPLEXITY,
        LENGTH,
        Panel("Responses (shares)", responses, limits=(-0.02, 1.02)),
        VALUE_LOSS,
        Panel("Variance the critic explains (share)", {"critic": "critic/explained_variance"}, 1.0),
        Panel("Clipped (share of tokens)", clipped, limits=(0.0, None)),
    ]


def _logged(arms: Mapping[str, History]) -> set[str]:
    return {name for history in arms.values() for entry in history for name in entry}


def _series(history: History, metric: str) -> tuple[list[float], list[float]]:
    """Iterations and values of a metric: warm-up counts up to 0, what is not finite is NaN."""
    warmup = max((entry.get("pretrain/step", 0) for entry in history), default=0)
    steps, values = [], []
    for entry in history:
        value = entry.get(metric)
        if value is not None:
            steps.append(float(entry.get("step", entry.get("pretrain/step", math.nan) - warmup)))
            values.append(float(value) if math.isfinite(value) else math.nan)
    return steps, values


def _picture(
    arms: Mapping[str, History],
    panels: Sequence[Panel],
    path: str | Path | None,
    title: str | None = None,
) -> "Figure":
    if len(arms) > 1:  # their warm-ups differ in length, and the policies rest in them
        arms = {name: [e for e in history if "step" in e] for name, history in arms.items()}
    logged = _logged(arms)
    curves = [{k: m for k, m in panel.curves.items() if m in logged} for panel in panels]
    shown = [replace(p, curves=c) for p, c in zip(panels, curves, strict=True) if c]
    if not shown:
        raise ValueError("history: there is nothing in it to draw yet; call train() first")
    figure = blank()
    columns = math.ceil(math.sqrt(len(shown)))
    rows, axes = math.ceil(len(shown) / columns), None
    for index, panel in enumerate(shown):
        axes = figure.add_subplot(rows, columns, index + 1, sharex=axes)
        _draw(axes, panel, list(arms.values()))
        dress(axes, panel.title)
        _scale(axes, panel)
        if index + columns >= len(shown):
            axes.set_xlabel("PPO iteration", fontsize=11, color=INK)
    _head(figure, arms, title)
    write_picture(figure, path)
    return figure


def _color(number: int, count: int) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if count <= len(COLORS):
        return COLORS[number]
    return to_hex(colormaps["viridis"](number / (count - 1)))


def _draw(axes: "Axes", panel: Panel, histories: Sequence[History]) -> None:
    """Draw a color for each run, a line style for each curve; in a single run they go together."""
    from matplotlib.lines import Line2D

    alone = len(histories) == 1
    styles = [STYLES[place % len(STYLES)] for place in range(len(panel.curves))]
    own = [_color(place, len(styles)) for place in range(len(styles))]
    for number, history in enumerate(histories):
        for place, metric in enumerate(panel.curves.values()):
            color = own[place] if alone else _color(number, len(histories))
            steps, values = _series(history, metric)
            width = 1.8 if len(steps) < 200 else 1.2
            marker = "o" if len(steps) < 3 else ""  # of a single point there is no line
            axes.plot(steps, values, color=color, ls=styles[place], lw=width, marker=marker)
            if not alone or place == 0:
                _cross(axes, history, steps, values, color)
    if alone:
        _surroundings(axes, panel, histories[0], own[0])
    keys = [
        Line2D([], [], color=own[place] if alone else INK, lw=1.8, ls=styles[place], label=label)
        for place, label in enumerate(panel.curves)
    ]
    if len(keys) > 1:
        box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "framealpha": 0.8}
        axes.legend(handles=keys, fontsize=9.5, labelcolor=INK, handlelength=2.4, **box)


def _cross(
    axes: "Axes", history: History, steps: Sequence[float], values: Sequence[float], color: str
) -> None:
    flags = zip(*_series(history, COLLAPSED), strict=True)
    start = min((step for step, flag in flags if flag), default=math.inf)
    after = [i for i, step in enumerate(steps) if step >= start]
    if after:
        axes.plot(steps[after[0]], values[after[0]], "X", color=color, mec="white", ms=11, zorder=5)


def _surroundings(axes: "Axes", panel: Panel, history: History, color: str) -> None:
    """Draw the band of a run, and its critic's warm-up in gray."""
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
    # Between two numbers that are close, a logarithmic axis has no mark.
    if (floor := panel.floor) is None or not max(20 * floor, 5 * low) < reach < math.inf:
        axes.set_ylim(*panel.limits)
        return
    # Logarithmic above the floor, linear below it: estimates of KL pass through zero.
    axes.set_yscale("symlog", linthresh=floor, linscale=0.4)
    marks = [1, 2, 5] if reach < 200 * max(floor, low) else [1]
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=floor, subs=marks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}".replace("-", "−")))


def _head(figure: "Figure", arms: Mapping[str, History], title: str | None) -> None:
    """Write the title, and the legend that holds for all panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    several = len(arms) > 1
    colors = [_color(number, len(arms)) for number in range(len(arms))] if several else []
    named = zip(arms, colors, strict=False)
    keys: list[Any] = [Line2D([], [], color=color, lw=3, label=name) for name, color in named]
    if any(entry.get(COLLAPSED) for history in arms.values() for entry in history):
        keys.append(Line2D([], [], ls="", marker="X", ms=10, color="#888888", label=FLAG))
    if not several and "pretrain/step" in _logged(arms):
        keys.append(Patch(color=SHADE, label="the critic alone learns"))
    title = title or ("" if several else next(iter(arms)))
    if not keys and not title:
        return
    width = sum(len(str(key.get_label())) + 9 for key in keys)  # in characters, of some 130
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
