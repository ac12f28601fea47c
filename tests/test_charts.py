"""Histograms hold the numbers they were given, and the critic's picture its errors."""

import math

import pytest
import torch

from mossrlhf.critic_evaluation import Agreement, CriticEvaluation
from mossrlhf.plotting import plot_critic, plot_reward_histograms

pytest.importorskip("matplotlib")


def rows(steps=20, each=4):
    """The reward rises with the step; another one applies to even responses only."""
    return [
        {
            "step": step,
            "completion": "words",
            "reward/model": step + i / each,
            "reward/true": None if i % 2 else -1.0,
        }
        for step in range(1, steps + 1)
        for i in range(each)
    ]


def bars(axes):
    """Middle and height of every bar that is there."""
    found = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    return [(x, height) for x, height in found if height]


def test_a_row_for_each_span_and_a_column_for_each_reward():
    figure = plot_reward_histograms(rows(), spans=4)
    assert len(figure.axes) == 8
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    # They are made column by column.
    assert titles[:2] == ["model: iterations 1-5  (n = 20)", "iterations 6-10  (n = 20)"]
    assert titles[4] == "true: iterations 1-5  (n = 10)"
    for line, axes in enumerate(figure.axes[:4]):
        assert sum(height for _, height in bars(axes)) == pytest.approx(1)
        inside = [step + i / 4 for step in range(5 * line + 1, 5 * line + 6) for i in range(4)]
        assert min(inside) - 1 <= min(bars(axes))[0]
        assert max(bars(axes))[0] <= max(inside) + 1
        assert axes.lines[0].get_xdata()[0] == pytest.approx(sum(inside) / len(inside))
    left, right = figure.axes[0].get_xlim()
    assert left <= 1
    assert right >= 20.75
    assert bars(figure.axes[4])[0][1] == pytest.approx(1)


def test_fewer_iterations_than_spans_and_gaps_between_them():
    figure = plot_reward_histograms([row for row in rows() if row["step"] in (1, 20)])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["model: iteration 1  (n = 4)", "iteration 20  (n = 4)"]


def test_a_picture_is_written_and_what_has_no_reward_is_refused(tmp_path):
    plot_reward_histograms(rows(), tmp_path / "new" / "rewards.png")
    assert (tmp_path / "new" / "rewards.png").read_bytes().startswith(b"\x89PNG")
    for given in ([], [{"step": 1, "reward/a": None}], [{"step": 1, "reward/a": math.nan}]):
        with pytest.raises(ValueError, match=r"rows: none has a reward.*completion_table"):
            plot_reward_histograms(given)


def test_the_critic_is_drawn_against_the_returns():
    part = Agreement(0.0, 0.5, 2, 0.75, 0.5, 1.0, 0.9, 0.2)
    late = Agreement(0.5, 1.0, 0, *[math.nan] * 5)
    values, returns = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 3.0]).double()
    evaluation = CriticEvaluation(
        overall=part,
        by_position=(part, late),
        values=values,
        returns=returns,
        standard_errors=torch.tensor([0.1, 0.3]).double(),
        positions=torch.tensor([0, 3]),
        lengths=torch.tensor([8, 8]),
        prompts=torch.tensor([0, 1]),
        continuations=4,
        gamma=1.0,
    )
    left, right = plot_critic(evaluation).axes
    points = left.containers[0].lines[0]
    assert points.get_xdata().tolist() == returns.tolist()
    assert points.get_ydata().tolist() == values.tolist()
    whiskers = left.containers[0].lines[2][0].get_segments()
    assert [float(w[1][0] - w[0][0]) for w in whiskers] == pytest.approx([0.4, 1.2])
    heights = [bar.get_height() for bar in right.patches]
    assert heights[0] == 0.75
    assert heights[2] == pytest.approx(0.2 * math.sqrt(2 / math.pi))
