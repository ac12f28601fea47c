"""Accuracy, margins and calibration of a reward model on preference pairs, with plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.plotting import COLORS, new_figure, save_figure, style_axes
from mossrlhf.reward_modeling.pairs import correctness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 20  # of a histogram


class Bin(NamedTuple):
    """Pairs of similar margin: the model's confidence in its preference, and its accuracy."""

    confidence: float  # mean of σ(|r_w − r_l|): the probability the model gives its preference
    accuracy: float  # share of pairs in which that is the chosen response; ties count half
    pairs: int


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """Metrics of a reward model on P pairs.

    Args:
        pairs: P.
        accuracy: share of pairs with r_w > r_l; ties count half.
        standard_error: of the accuracy, binomial.
        margin_mean: mean of r_w − r_l.
        margin_std: standard deviation of r_w − r_l.
        score_mean: mean of all 2P rewards.
        score_std: standard deviation of all 2P rewards.
        calibration: pairs by margin, in bins of equal size.
        calibration_error: mean of |confidence − accuracy| over the bins, weighted by pairs.
        scores: ``P`` tuples of the rewards of chosen and rejected.
        accuracy_by_step: accuracy in the evaluations during training, by optimizer step.

    Source: P1 §4.3, figure 2 (margins) and figure 3 (accuracy over steps); calibration: Guo et al.,
        arXiv 1706.04599 §2.
    """

    pairs: int
    accuracy: float
    standard_error: float
    margin_mean: float
    margin_std: float
    score_mean: float
    score_std: float
    calibration: list[Bin]
    calibration_error: float
    scores: list[tuple[float, float]]
    accuracy_by_step: list[tuple[int, float]]

    @classmethod
    def of(
        cls,
        scores: Float[Tensor, "P 2"],
        log_history: Sequence[Mapping[str, Any]] = (),
        evaluation: str = "eval",
        bins: int = 10,
    ) -> "RewardReport":
        """Compute the report from rewards.

        Args:
            scores: ``[P, 2]`` rewards of the chosen and the rejected response.
            log_history: the trainer's (``trainer.state.log_history``).
            evaluation: prefix of its metrics, before ``_accuracy``.
            bins: of the calibration, at most; each has at least ten pairs, if there are ten.

        Raises:
            ValueError: if there are no rewards, or not all are finite.
        """
        if not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"scores: got {len(scores)} pairs, {int((~torch.isfinite(scores)).any(-1).sum())} "
                "of them not finite; expected finite scores of one pair at least"
            )
        rewards = scores.double()
        margins = rewards[:, 0] - rewards[:, 1]
        accuracy = correctness(margins).mean().item()
        found = calibration(margins, max(1, min(bins, len(margins) // 10)))
        error = sum(b.pairs * abs(b.confidence - b.accuracy) for b in found) / len(margins)
        return cls(
            pairs=len(margins),
            accuracy=accuracy,
            standard_error=(accuracy * (1 - accuracy) / len(margins)) ** 0.5,
            margin_mean=margins.mean().item(),
            margin_std=margins.std(correction=0).item(),
            score_mean=rewards.mean().item(),
            score_std=rewards.std(correction=0).item(),
            calibration=found,
            calibration_error=error,
            scores=[(chosen, rejected) for chosen, rejected in rewards.tolist()],
            accuracy_by_step=[
                (int(entry["step"]), float(entry[f"{evaluation}_accuracy"]))
                for entry in log_history
                if f"{evaluation}_accuracy" in entry
            ],
        )

    def save(self, folder: str | Path) -> None:
        """Write ``reward_report.json`` and, with matplotlib, ``.png`` to ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"calibration": [b._asdict() for b in self.calibration]}
        (folder / "reward_report.json").write_text(json.dumps(content, indent=1) + "\n")
        if find_spec("matplotlib") is not None:
            self.plot(folder / "reward_report.png")

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Plot margins, rewards, calibration and the accuracy over steps.

        Args:
            path: the image file, in the format of its suffix; None to write no file.
        """
        figure = new_figure()
        panels = [_plot_margins, _plot_rewards, _plot_calibration]
        panels += [_plot_steps] if self.accuracy_by_step else []
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(2, 2, index + 1)
            title, label = panel(axes, self)
            style_axes(axes, title, whole=panel is _plot_steps)
            axes.set_xlabel(label, fontsize=11)
            if panel is not _plot_steps:
                axes.legend(frameon=False, fontsize=10)
        figure.suptitle(self._accuracy(), fontsize=15)
        save_figure(figure, path)
        return figure

    def __str__(self) -> str:
        return (
            f"{self._accuracy()}; margin {self.margin_mean:.2f} ± {self.margin_std:.2f}, "
            f"rewards {self.score_mean:.2f} ± {self.score_std:.2f}, "
            f"calibration error {self.calibration_error:.3f}"
        )

    def _accuracy(self) -> str:
        return f"right on {self.accuracy:.1%} ± {self.standard_error:.1%} of {self.pairs} pairs"


def calibration(margins: Float[Tensor, " P"], bins: int) -> list[Bin]:
    """Compare the model's confidence with its accuracy, in bins of equal size by |r_w − r_l|.

    Source: Guo et al., arXiv 1706.04599 §2, with bins of equal size; P(w ≻ l) = σ(r_w − r_l).
    """
    found = []
    for part in margins[margins.abs().argsort(stable=True)].tensor_split(bins):
        confidence = torch.sigmoid(part.abs()).mean().item()
        found.append(Bin(confidence, correctness(part.double()).mean().item(), len(part)))
    return found


def _plot_margins(axes: "Axes", report: RewardReport) -> tuple[str, str]:
    margins = [chosen - rejected for chosen, rejected in report.scores]
    reach = max(map(abs, margins)) or 1.0
    edges = torch.linspace(-reach, reach, 2 * BINS + 1).tolist()  # zero is an edge
    axes.hist([m for m in margins if m >= 0], edges, color=COLORS[0], label="right")
    axes.hist([m for m in margins if m < 0], edges, color=COLORS[1], label="wrong")
    return "Margins (pairs)", "reward of chosen − reward of rejected"


def _plot_rewards(axes: "Axes", report: RewardReport) -> tuple[str, str]:
    values = [x for pair in report.scores for x in pair]
    low, high = min(values), max(values)
    edges = torch.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    for side, label, color in ((0, "chosen", COLORS[0]), (1, "rejected", COLORS[1])):
        given = [pair[side] for pair in report.scores]
        axes.hist(given, edges, histtype="step", linewidth=1.8, color=color, label=label)
    return "Rewards (responses)", "reward"


def _plot_calibration(axes: "Axes", report: RewardReport) -> tuple[str, str]:
    confidence, accuracy, pairs = zip(*report.calibration, strict=True)
    axes.plot([0.5, 1], [0.5, 1], color="#888888", linestyle=":", label="perfect calibration")
    spread = [2 * (a * (1 - a) / n) ** 0.5 for a, n in zip(accuracy, pairs, strict=True)]
    axes.errorbar(
        confidence, accuracy, spread, marker="o", color=COLORS[0], capsize=2, label="± 2 s.e."
    )
    title = f"Accuracy (share); calibration error {report.calibration_error:.3f}"
    return title, "confidence: probability of the model's preference"


def _plot_steps(axes: "Axes", report: RewardReport) -> tuple[str, str]:
    steps, accuracies = zip(*report.accuracy_by_step, strict=True)
    axes.plot(steps, accuracies, marker="o", markersize=4, color=COLORS[0])
    return "Accuracy during training (share of pairs)", "optimizer step"
