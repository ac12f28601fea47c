"""Figures show the data they are given, whatever is missing, and leave nothing behind."""

import io
import math
import subprocess
import sys

import pytest
import torch

from mossrlhf.critic_evaluation import Agreement, CriticEvaluation
from mossrlhf.plotting import (
    ARM_PANELS,
    PERPLEXITY,
    VALUE_LOSS,
    Panel,
    plot_arms,
    plot_critic,
    plot_history,
    plot_reward_histograms,
)

matplotlib = pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

CURVES = [name for panel in ARM_PANELS for name in panel.curves.values()]


def run(steps=20, scale=1.0, collapses=None, warmup=0):
    """A made-up history; every metric has values of its own."""
    history = [
        {"pretrain/step": i + 1, "critic/loss": 9.0 - i, "reward/score_mean": 0.5}
        for i in range(warmup)
    ]
    for step in range(1, steps + 1):
        entry = {name: scale * (place + step / steps) for place, name in enumerate(CURVES)}
        entry |= {
            "step": step,
            "reward/score_p05": entry["reward/score_mean"] - 0.75,
            "reward/score_p95": entry["reward/score_mean"] + 0.5,
            "reward/reward_model/mean": entry["reward/score_mean"],
            "reward/true_quality/mean": 2 - step / steps,
            "kl/ref_k3_per_sequence": 2.0 * step,
            "response/truncated_fraction": 0.25,
            "critic/explained_variance": 0.5,
            "policy/clip_fraction": 0.1,
            "critic/clip_fraction": 0.2,
            "policy/collapsed": float(collapses is not None and step >= collapses),
        }
        history.append(entry)
        if step % 10 == 0:
            history.append({"step": step, "eval/true_quality/win_rate": 0.6})
    return history


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def curves(axes):
    """Points of each curve, crosses apart."""
    lines = [line for line in axes.lines if line.get_marker() != "X"]
    return [list(zip(*(map(float, d) for d in line.get_data()), strict=True)) for line in lines]


def crosses(axes):
    return [
        tuple(map(float, line.get_xydata()[0])) for line in axes.lines if line.get_marker() == "X"
    ]


def of(history, name):
    entries = [entry for entry in history if "step" in entry and name in entry]
    return [(float(entry["step"]), entry[name]) for entry in entries]


def test_plot_arms_draws_runs_over_each_other_in_order():
    arms = {"vanilla": run(20), "PPO-max": run(30, scale=2.0)}
    figure = plot_arms(arms)
    drawn = panels(figure)
    assert list(drawn) == [panel.title for panel in ARM_PANELS]
    for panel in ARM_PANELS:
        expected = [of(h, name) for h in arms.values() for name in panel.curves.values()]
        assert curves(drawn[panel.title]) == expected
    colors = [[line.get_color() for line in axes.lines] for axes in drawn.values()]
    first, second = colors[0]
    assert first != second
    assert all(set(inside) == {first, second} for inside in colors)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(arms)
    assert [key.get_color() for key in legend.get_lines()] == [first, second]


def test_perplexities_have_two_line_styles_and_a_legend():
    axes = panels(plot_arms({"a": run(), "b": run()}))[PERPLEXITY.title]
    styles = [line.get_linestyle() for line in axes.lines]
    assert styles == ["-", "--", "-", "--"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["under the policy", "under the SFT model"]


def test_true_quality_replaces_the_second_panel():
    arms = {"a": run(), "b": run(10)}
    figure = plot_arms(arms, true_quality="reward/true_quality/mean", title="What is seen")
    titles = list(panels(figure))
    assert len(titles) == len(ARM_PANELS)
    assert "True quality" in titles[1]
    assert curves(figure.axes[1]) == [of(h, "reward/true_quality/mean") for h in arms.values()]
    assert figure.legends[0].get_title().get_text() == "What is seen"
    with pytest.raises(ValueError, match=r"'reward/quality'.*'reward/true_quality/mean'"):
        plot_arms(arms, true_quality="reward/quality")


def test_collapse_is_marked_at_its_first_iteration():
    arms = {"vanilla": run(collapses=7), "PPO-max": run()}
    figure = plot_arms(arms)
    for panel in ARM_PANELS:
        expected = [of(arms["vanilla"], name)[6] for name in panel.curves.values()]
        assert crosses(panels(figure)[panel.title]) == expected
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["vanilla", "PPO-max", "collapse detected"]


@pytest.mark.parametrize(("largest", "scale"), [(300.0, "symlog"), (15.0, "linear")])
def test_kl_axis_is_logarithmic_only_over_magnitudes(largest, scale):
    def arm(kl):
        return [{"step": s, "kl/ref_per_sequence": kl * s / 10 - 0.5} for s in range(11)]

    (axes,) = plot_arms({"a": arm(largest), "b": arm(5.0)}).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low <= -0.5
    assert high >= largest - 0.5


def test_plot_history_draws_everything_of_one_run():
    history = run(20, collapses=12, warmup=4)
    figure = plot_history(history)
    drawn = panels(figure)
    assert len(drawn) == 9
    score = drawn["Reward (score: mean, 5-95 %)"]
    before = [(-3.0, 0.5), (-2.0, 0.5), (-1.0, 0.5), (0.0, 0.5)]
    assert curves(score)[0] == before + of(history, "reward/score_mean")
    before = [(-3.0, 9.0), (-2.0, 8.0), (-1.0, 7.0), (0.0, 6.0)]
    assert curves(drawn[VALUE_LOSS.title]) == [before + of(history, "critic/loss")]
    assert curves(drawn["Wins against the SFT model (share)"]) == [[(10.0, 0.6), (20.0, 0.6)]]
    assert crosses(score) == [of(history, "reward/score_mean")[11]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["collapse detected", "critic warm-up"]


def test_reward_that_equals_the_score_is_drawn_once():
    history = run()
    score = panels(plot_history(history))["Reward (score: mean, 5-95 %)"]
    names = ["reward/score_mean", "reward/true_quality/mean"]
    assert curves(score) == [of(history, name) for name in names]
    (band,) = score.collections
    edges = band.get_paths()[0].get_extents()
    center = [value for _, value in of(history, "reward/score_mean")]
    assert edges.ymin == pytest.approx(min(center) - 0.75)
    assert edges.ymax == pytest.approx(max(center) + 0.5)


@pytest.mark.parametrize("missing", ["critic/", "reward/", "reward/score_p05", "kl/", "policy/"])
def test_missing_metrics_are_left_out(missing):
    history = [
        {name: value for name, value in entry.items() if not name.startswith(missing)}
        for entry in run(warmup=2, collapses=3)
    ]
    for figure in (plot_history(history), plot_arms({"a": history, "b": run()})):
        assert figure.axes
        for axes in figure.axes:
            assert axes.lines


def test_single_points_and_gaps_are_drawn():
    values = [1.0, math.nan, math.inf, None, 3.0]
    broken = [{"step": s, "critic/loss": value} for s, value in enumerate(values, start=1)]
    figure = plot_arms({"a": broken, "b": [{"step": 1, "critic/loss": 2.0}, {"note": 1.0}]})
    (first, second) = figure.axes[0].lines
    assert [math.isnan(y) for y in first.get_ydata()] == [False, True, True, False]
    assert first.get_marker() != "o"
    assert second.get_marker() == "o"  # of one point there is no line


def test_plot_arms_takes_panels_and_file_formats(tmp_path):
    own = Panel("Entropy", {"mean": "policy/entropy_nats_per_token"})
    history = [{"step": 1, "policy/entropy_nats_per_token": 2.0}]
    path = tmp_path / "new" / "entropy.svg"
    figure = plot_arms({"a": history, "b": history}, path, panels=[own, ARM_PANELS[0]])
    assert list(panels(figure)) == ["Entropy"]
    assert path.read_text().lstrip().startswith("<?xml")


def test_more_runs_than_colors_have_different_colors():
    arms = {f"arm {number}": run(3, scale=number) for number in range(1, 12)}
    figure = plot_arms(arms)
    assert len({line.get_color() for line in figure.axes[0].lines}) == len(arms)
    assert len(figure.legends[0].get_texts()) == len(arms)


@pytest.mark.parametrize("history", [[], [{"step": 1, "time/step_seconds": 1.0}]])
def test_empty_history_is_refused(history):
    with pytest.raises(ValueError, match="call train"):
        plot_history(history)
    with pytest.raises(ValueError, match="call train"):
        plot_arms({"a": history, "b": history})
    with pytest.raises(ValueError, match="call train"):
        plot_arms({})


def test_png_is_small_and_shown_in_notebooks(tmp_path):
    path = tmp_path / "curves.png"
    arms = {f"a rather long name, number {i}": run(200, scale=i) for i in range(1, 6)}
    figure = plot_arms(arms, path, title="A title")
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.size == (1200, 800)
    shown = Image.open(io.BytesIO(figure._repr_png_()))
    assert shown.size == (1200, 800)
    assert len(shown.convert("RGB").getcolors(1 << 16)) > 20  # no blank page


def test_pyplot_is_not_imported(root):
    code = f"""
import sys
sys.path.insert(0, {str(root / "src")!r})
from mossrlhf.plotting import plot_history
print("matplotlib" in sys.modules)
plot_history([{{"step": 1, "critic/loss": 1.0}}])._repr_png_()
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr


def test_rc_parameters_are_not_changed():
    before = dict(matplotlib.rcParams)
    plot_arms({"a": run(), "b": run()})
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("values", [(21.0, 49.0), (183.0, 184.0), (1.2, 49.0), (0.0, 4000.0)])
def test_every_axis_has_ticks(values):
    history = [{"step": i, "perplexity/policy": value} for i, value in enumerate(values)]
    (axes,) = plot_history(history).axes
    low, high = axes.get_ylim()
    assert sum(low <= mark <= high for mark in axes.get_yticks()) >= 2


def test_large_numbers_are_written_out():
    figure = plot_history([{"step": i, "perplexity/ref": 10.0**i} for i in range(7)])
    figure.draw_without_rendering()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"1", "1,000", "1,000,000"} <= set(labels)


def test_missing_matplotlib_names_the_package_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "mossrlhf\[plot\]"'):
        plot_history(run())


# ---- rewards and critic --------------------------------------------------------------------------


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


def test_histograms_have_a_row_per_span_and_a_column_per_reward():
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


def test_histograms_of_fewer_iterations_than_spans():
    figure = plot_reward_histograms([row for row in rows() if row["step"] in (1, 20)])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["model: iteration 1  (n = 4)", "iteration 20  (n = 4)"]


def test_histograms_are_written_and_need_a_finite_reward(tmp_path):
    plot_reward_histograms(rows(), tmp_path / "new" / "rewards.png")
    assert (tmp_path / "new" / "rewards.png").read_bytes().startswith(b"\x89PNG")
    for given in ([], [{"step": 1, "reward/a": None}], [{"step": 1, "reward/a": math.nan}]):
        with pytest.raises(ValueError, match=r"rows: none has a reward.*completion_table"):
            plot_reward_histograms(given)


def test_plot_critic_draws_values_over_returns():
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
