"""Pictures beside the curves: how rewards are spread, and how a critic agrees with returns."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mossrlhf.drawing import COLORS, GRID, INK, blank, dress, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mossrlhf.critic_evaluation import CriticEvaluation

SPANS = 5
"""Parts of a run that have a histogram of their own."""


def plot_reward_histograms(
    rows: Sequence[Mapping[str, Any]], path: str | Path | None = None, spans: int = SPANS
) -> "Figure":
    """Draw how each reward is spread over the responses, early in a run to late.

    Args:
        rows: of ``completions.jsonl``, as `completion_table` reads them: the first responses of
            each logged iteration, with a ``step`` and a number under ``reward/<name>``.
        path: where to write the picture, in the format of its suffix; None for nowhere.
        spans: parts of the run, of equally many logged iterations, each with a row of its own.

    Returns:
        the figure; a notebook shows it. A column for each reward; the dotted line is the mean.

    Raises:
        ImportError: without matplotlib; it says what to install.
        ValueError: where no row has a reward that is a finite number.

    Source: P1 Fig. 13 (histograms of the reward over the steps of training).
    """
    names = sorted({name for row in rows for name in row if name.startswith("reward/")})
    names = [name for name in names if any(map(_number, (row.get(name) for row in rows)))]
    if not names:
        raise ValueError(
            "rows: none has a reward that is a finite number; pass what "
            "completion_table('<output_dir>/completions.jsonl') returns"
        )
    parts = _spans(sorted({row["step"] for row in rows}), spans)
    figure = blank()
    figure.set_size_inches(max(12, 3.5 * len(names)), 1.2 + 1.5 * len(parts))
    for column, name in enumerate(names):
        given = [row[name] for row in rows if _number(row.get(name))]
        low, high = min(given), max(given)
        pad = 0.5 if low == high else 0.0  # a reward that is always the same has a bar all the same
        bounds, first = (low - pad, high + pad), None
        for line, steps in enumerate(parts):
            inside = [r[name] for r in rows if r["step"] in steps and _number(r.get(name))]
            place = line * len(names) + column + 1
            axes = figure.add_subplot(len(parts), len(names), place, sharex=first, sharey=first)
            first = first or axes
            shares = [1 / len(inside) for _ in inside]  # there may be none
            color = COLORS[column % len(COLORS)]
            axes.hist(inside, bins=20, range=bounds, weights=shares, color=color)
            if inside:
                axes.axvline(sum(inside) / len(inside), color=INK, ls=(0, (1, 1.3)), lw=1.4)
            when = f"{min(steps)}-{max(steps)}" if len(steps) > 1 else f"{min(steps)}"
            title = f"iteration{'s' * (len(steps) > 1)} {when}  (n = {len(inside)})"
            heading = f"{name.removeprefix('reward/')}: {title}" if line == 0 else title
            dress(axes, heading, whole=False)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    write_picture(figure, path)
    return figure


def _number(value: Any) -> bool:
    # Not only finite: the span from the least to the largest must be a number too.
    return isinstance(value, int | float) and abs(value) < 1e300


def _spans(steps: Sequence[int], count: int) -> list[set[int]]:
    """Cut iterations into parts of nearly equal length."""
    count = max(1, min(count, len(steps)))
    edges = [round(i * len(steps) / count) for i in range(count + 1)]
    return [set(steps[a:b]) for a, b in pairwise(edges)]


def plot_critic(evaluation: "CriticEvaluation", path: str | Path | None = None) -> "Figure":
    """Draw a critic's values against the returns of continuations, and its error by position.

    Args:
        evaluation: by `Trainer.evaluate_critic`.
        path: where to write the picture, in the format of its suffix; None for nowhere.

    Returns:
        the figure; a notebook shows it. On the left a point for each state, with twice the
        standard error of its return; on the right the mean absolute error in each part of the
        response, above the noise that a perfect critic would show as well.

    Raises:
        ImportError: without matplotlib; it says what to install.

    Source: ours.
    """
    figure = blank()
    figure.set_size_inches(12, 5)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    values, returns = evaluation.values.tolist(), evaluation.returns.tolist()
    reach = [2 * error for error in evaluation.standard_errors.tolist()]
    left.errorbar(
        returns, values, xerr=reach, fmt="o", ms=4, color=COLORS[0], ecolor=GRID, zorder=2
    )
    ends = [min(returns + values), max(returns + values)]
    left.plot(ends, ends, color=INK, lw=1, ls=(0, (4, 1.5)), zorder=1)
    dress(left, "Value of the critic over the mean return", whole=False)
    left.set_xlabel(f"mean return of {evaluation.continuations} continuations", color=INK)
    left.set_ylabel("value", color=INK)
    parts = evaluation.by_position
    middles = [(part.start + part.end) / 2 for part in parts]
    width = 0.8 / len(parts)
    errors = [part.mean_absolute_error for part in parts]
    right.bar(middles, errors, width, color=COLORS[0], label="mean absolute error")
    # The mean of |x| is √(2/π) of x's standard deviation, where x is normal.
    floor = [math.sqrt(2 / math.pi) * part.noise for part in parts]
    right.bar(middles, floor, width, color=COLORS[4], label="of it, noise of the returns")
    dress(right, "Error by position (units of reward)", whole=False)
    right.set_xlabel("share of the response behind the state", color=INK)
    right.legend(frameon=False, labelcolor=INK)
    write_picture(figure, path)
    return figure
