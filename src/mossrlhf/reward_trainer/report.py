"""How well a reward model tells good from bad, in figures and in a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.plotting import COLORS, new_figure, save_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 20
"""Of a histogram."""


class Bin(NamedTuple):
    """Pairs of like margin: how sure the model is, and how often it is right."""

    confidence: float  # mean of σ(|r_w − r_l|): the probability it gives to its own choice
    accuracy: float  # share of them in which that is the preferred response; ties count half
    pairs: int


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """What there is to say about a reward model on P pairs.

    Args:
        pairs: P.
        accuracy: share of pairs with r_w > r_l; ties count half.
        standard_error: of the accuracy, binomial.
        margin_mean: of r_w − r_l.
        margin_std: of r_w − r_l.
        score_mean: of all 2P scores.
        score_std: of all 2P scores.
        calibration: pairs by margin, in bins of like size.
        calibration_error: mean of |confidence − accuracy| over the bins, by their pairs.
        scores: ``P`` pairs of scores, preferred first.
        accuracy_by_step: what evaluations in training found, by optimizer step.

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
        """Make a report of scores.

        Args:
            scores: ``[P, 2]`` of the preferred response and of the other.
            log_history: of the trainer (``trainer.state.log_history``).
            evaluation: what the names of its metrics begin with, before ``_accuracy``.
            bins: of the calibration, at most; each has ten pairs at least, where there are ten.

        Raises:
            ValueError: where there are no scores, or not all are finite.
        """
        if not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"scores: got {len(scores)} pairs, {int((~torch.isfinite(scores)).any(-1).sum())} "
                "of them not finite; expected finite scores of one pair at least"
            )
        scores = scores.double()
        margins = scores[:, 0] - scores[:, 1]
        right = (margins > 0).double() + 0.5 * (margins == 0)
        accuracy = right.mean().item()
        found = calibration(margins, max(1, min(bins, len(margins) // 10)))
        error = sum(b.pairs * abs(b.confidence - b.accuracy) for b in found) / len(margins)
        return cls(
            pairs=len(margins),
            accuracy=accuracy,
            standard_error=(accuracy * (1 - accuracy) / len(margins)) ** 0.5,
            margin_mean=margins.mean().item(),
            margin_std=margins.std(correction=0).item(),
            score_mean=scores.mean().item(),
            score_std=scores.std(correction=0).item(),
            calibration=found,
            calibration_error=error,
            scores=[(chosen, rejected) for chosen, rejected in scores.tolist()],
            accuracy_by_step=[
                (int(entry["step"]), float(entry[f"{evaluation}_accuracy"]))
                for entry in log_history
                if f"{evaluation}_accuracy" in entry
            ],
        )

    def save(self, folder: str | Path) -> None:
        """Write ``reward_report.json`` and, where matplotlib is installed, ``reward_report.png``.

        Args:
            folder: made where absent.
        """
        from importlib.util import find_spec

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self) | {"calibration": [b._asdict() for b in self.calibration]}
        (folder / "reward_report.json").write_text(json.dumps(content, indent=1) + "\n")
        if find_spec("matplotlib") is not None:
            self.plot(folder / "reward_report.png")

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw margins, scores, calibration and the accuracy over steps.

        Args:
            path: where to write the picture, in the format of its suffix; None for nowhere.

        Returns:
            the figure; a notebook shows it.

        Raises:
            ImportError: without matplotlib; it says what to install.
        """
        figure = new_figure()
        draw = [_draw_margins, _draw_scores, _draw_calibration]
        draw += [_draw_steps] if self.accuracy_by_step else []
        for index, panel in enumerate(draw):
            axes = figure.add_subplot(2, 2, index + 1)
            style_axes(axes, panel(axes, self), whole=panel is _draw_steps)
        right = f"right on {self.accuracy:.1%} ± {self.standard_error:.1%} of {self.pairs} pairs"
        figure.suptitle(right, fontsize=15)
        save_figure(figure, path)
        return figure

    def __str__(self) -> str:
        return (
            f"right on {self.accuracy:.1%} ± {self.standard_error:.1%} of {self.pairs} pairs; "
            f"margin {self.margin_mean:.2f} ± {self.margin_std:.2f}, "
            f"scores {self.score_mean:.2f} ± {self.score_std:.2f}, "
            f"calibration error {self.calibration_error:.3f}"
        )


def calibration(margins: Float[Tensor, " P"], bins: int) -> list[Bin]:
    """Sort pairs by how sure the model is of them, and see how often it is right.

    Args:
        margins: ``[P]`` r_w − r_l.
        bins: of as many pairs each, or one less.

    Source: Guo et al., arXiv 1706.04599 §2, with bins of like size; P(w ≻ l) = σ(r_w − r_l).
    """
    found = []
    for part in margins[margins.abs().argsort(stable=True)].tensor_split(bins):
        right = (part > 0).double() + 0.5 * (part == 0)
        confidence = torch.sigmoid(part.abs()).mean().item()
        found.append(Bin(confidence, right.mean().item(), len(part)))
    return found


def _draw_margins(axes: "Axes", report: RewardReport) -> str:
    margins = [chosen - rejected for chosen, rejected in report.scores]
    reach = max(map(abs, margins)) or 1.0
    edges = torch.linspace(-reach, reach, 2 * BINS + 1).tolist()  # zero is an edge
    axes.hist([m for m in margins if m >= 0], edges, color=COLORS[0], label="right")
    axes.hist([m for m in margins if m < 0], edges, color=COLORS[1], label="wrong")
    axes.legend(frameon=False, fontsize=10)
    axes.set_xlabel("score of the preferred response less the other's", fontsize=11)
    return "Margins (pairs)"


def _draw_scores(axes: "Axes", report: RewardReport) -> str:
    values = [x for pair in report.scores for x in pair]
    low, high = min(values), max(values)
    edges = torch.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    for side, label, color in ((0, "preferred", COLORS[0]), (1, "other", COLORS[1])):
        given = [pair[side] for pair in report.scores]
        axes.hist(given, edges, histtype="step", linewidth=1.8, color=color, label=label)
    axes.legend(frameon=False, fontsize=10)
    axes.set_xlabel("score", fontsize=11)
    return "Scores (responses)"


def _draw_calibration(axes: "Axes", report: RewardReport) -> str:
    sure, right, pairs = zip(*report.calibration, strict=True)
    axes.plot([0.5, 1], [0.5, 1], color="#888888", linestyle=":", label="as sure as right")
    spread = [2 * (a * (1 - a) / n) ** 0.5 for a, n in zip(right, pairs, strict=True)]
    axes.errorbar(sure, right, spread, marker="o", color=COLORS[0], capsize=2, label="± 2 s.e.")
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    axes.set_xlabel("probability the model gives to its choice", fontsize=11)
    return f"Right (share); calibration error {report.calibration_error:.3f}"


def _draw_steps(axes: "Axes", report: RewardReport) -> str:
    steps, accuracies = zip(*report.accuracy_by_step, strict=True)
    axes.plot(steps, accuracies, marker="o", markersize=4, color=COLORS[0])
    axes.set_xlabel("optimizer step", fontsize=11)
    return "Accuracy in training (share of pairs)"
