"""How strong preferences are, as an ensemble sees it, and what to make of weak and wrong ones.

Records that `PreferenceStrength.annotate` has seen carry ``strength`` and ``strength_std``. The
methods are functions from such records to records, each of them usable alone or after another::

    records = strength.annotate(pairs)
    for method in (FlipLabels(share=0.2), SmoothLabels(), AdaptiveMargin()):
        records = method(records)
    RewardTrainer(..., margin_column="margin", smoothing_column="label_smoothing")
"""

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf.judging import Collate, fingerprint, pair_margins
from mossrlhf.options import check_range, strict

Records = Sequence[Mapping[str, Any]]
Train = Callable[[list[dict[str, Any]], int], nn.Module]

STRENGTH, SPREAD = "strength", "strength_std"
"""The columns of a pair's mean margin over the ensemble, and of its standard deviation."""

MARGIN, SMOOTHING, FLIPPED = "margin", "label_smoothing", "flipped"
"""The columns that the methods write."""


@dataclass(frozen=True)
class PreferenceStrength:
    """What K reward models think of N pairs.

    Args:
        margins: ``[K, N]`` r_w − r_l, NaN where a model was not asked.
        fingerprint: of the N pairs, by which they are known again.

    Source: P2 (arXiv 2401.06080) §2.1: mean and standard deviation over an ensemble of reward
        models trained on the same data in different order. Asking models about pairs that they
        have not seen (`measure` with ``folds``) is ours: it needs no early stopping to
        keep them from learning wrong labels by heart.
    """

    margins: Float[Tensor, "K N"]
    fingerprint: str

    @property
    def mean(self) -> Float[Tensor, " N"]:
        """Mean margin of each pair; its sign says whether the ensemble agrees with the label."""
        return self.margins.nanmean(0)

    @property
    def std(self) -> Float[Tensor, " N"]:
        """Standard deviation of each pair's margins, unbiased; NaN where only one was asked."""
        asked = (~self.margins.isnan()).sum(0)
        squares = (self.margins - self.mean).square().nansum(0)
        return torch.where(asked > 1, squares / (asked - 1).clamp(min=1), torch.nan).sqrt()

    @classmethod
    def of(
        cls, models: Sequence[nn.Module], pairs: Records, collator: Collate, batch_size: int = 32
    ) -> "PreferenceStrength":
        """Ask trained reward models about pairs.

        Args:
            models: K `RewardModel`; K ≥ 2.
            pairs: N records of ``prompt``, ``chosen``, ``rejected``.
            collator: a `PairCollator`.
            batch_size: pairs at a time.

        Raises:
            ValueError: where there are fewer than two models, or no pairs.
        """
        if len(models) < 2 or not len(pairs):
            raise ValueError(
                f"models, pairs: got {len(models)} and {len(pairs)}, expected two models at least "
                "and a pair; one model has no opinion of how sure it is"
            )
        margins = [pair_margins(model, pairs, collator, batch_size) for model in models]
        return cls(torch.stack(margins), fingerprint(pairs))

    @classmethod
    def measure(
        cls,
        train: Train,
        pairs: Records,
        collator: Collate,
        *,
        models: int = 10,
        folds: int = 1,
        seed: int = 0,
        batch_size: int = 32,
    ) -> "PreferenceStrength":
        """Train an ensemble on pairs, and ask it about them.

        Args:
            train: makes a reward model of records and a seed.
            pairs: N records.
            collator: a `PairCollator`.
            models: K; P2 takes 10.
            folds: 1: each model learns all pairs and is asked about all, as in P2. More: it learns
                all but one part in so many, and is asked about that part alone; every pair is asked
                about ``models / folds`` times.
            seed: of the splits; model k is trained with seed + k.
            batch_size: pairs at a time, in asking.

        Raises:
            ValueError: where some pair would be asked about fewer than twice, or more often than
                others.
        """
        check_range("PreferenceStrength.measure", "models", models, 2)
        check_range("PreferenceStrength.measure", "folds", folds, 1)
        if not len(pairs):
            raise ValueError("pairs: got none, expected one at least")
        margins = torch.full((models, len(pairs)), torch.nan)
        for k, (learned, asked) in enumerate(_folds(len(pairs), models, folds, seed)):
            model = train([dict(pairs[i]) for i in learned.tolist()], seed + k)
            others = [pairs[i] for i in asked.tolist()]
            margins[k, asked] = pair_margins(model, others, collator, batch_size)
        return cls(margins, fingerprint(pairs))

    def annotate(self, pairs: Records) -> list[dict[str, Any]]:
        """Return the records with `STRENGTH` and `SPREAD` beside what they have.

        Args:
            pairs: those that were asked about, in their order.

        Raises:
            ValueError: where they are others.
        """
        if fingerprint(pairs) != self.fingerprint:
            raise ValueError(
                f"pairs: these {len(pairs)} are not the {self.margins.shape[1]} that were asked "
                "about, or stand in another order; measure their strength anew"
            )
        columns = zip(self.mean.tolist(), self.std.tolist(), strict=True)
        known = zip(pairs, columns, strict=True)
        return [{**pair, STRENGTH: mean, SPREAD: std} for pair, (mean, std) in known]

    def save(self, path: str | Path) -> None:
        """Write it beside the data, as JSON.

        Args:
            path: of the file.
        """
        rows = [[None if math.isnan(x) else x for x in row] for row in self.margins.tolist()]
        content = {"fingerprint": self.fingerprint, "margins": rows}
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "PreferenceStrength":
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            ValueError: where it is no such file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [[math.nan if x is None else x for x in row] for row in content["margins"]]
            margins = torch.tensor(rows)
            if margins.ndim != 2 or not len(margins):
                raise ValueError(f"margins of the shape {tuple(margins.shape)}")
            return cls(margins, str(content["fingerprint"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected what PreferenceStrength.save writes, got {error!r}"
            ) from error


@strict
@dataclass(frozen=True, kw_only=True)
class FlipLabels:
    """Swaps the responses of the pairs whose labels are likeliest wrong.

    Args:
        share: of all pairs, those of the lowest strength, in [0, 1]; None to go by `below` alone.
        below: strength under which a label is flipped, in units of score; None for no bound.
            With both, what meets both is flipped.

    Raises:
        ValueError: where neither is given, or `share` is out of range.

    Source: P2 §3.1: labels of the lowest-strength data are flipped. A bound on the strength, so
        that what the ensemble agrees with is left alone, is ours.
    """

    share: float | None = None
    below: float | None = 0.0

    def __post_init__(self) -> None:
        check_range("FlipLabels", "share", self.share, 0, 1)
        if self.share is None and self.below is None:
            raise ValueError("FlipLabels(share=None, below=None): expected one of the two")

    def __call__(self, records: Records) -> list[dict[str, Any]]:
        """Return records with wrong labels put right, and whether they were in `FLIPPED`.

        Raises:
            ValueError: where records have no strength, or margins and α of the labels as they are.
        """
        strengths = _strengths(records)
        if any(name in record for record in records for name in (MARGIN, SMOOTHING)):
            raise ValueError(
                f"records: they have {MARGIN!r} or {SMOOTHING!r} already, which are of the labels "
                "before they are flipped; let FlipLabels come first"
            )
        limit = math.inf if self.below is None else self.below
        chosen = {i for i, s in enumerate(strengths) if s < limit}
        if self.share is not None:
            order = sorted(range(len(strengths)), key=strengths.__getitem__)
            chosen &= set(order[: round(self.share * len(order))])
        return [
            _flipped(r) if i in chosen else {FLIPPED: False, **r} for i, r in enumerate(records)
        ]


@strict
@dataclass(frozen=True, kw_only=True)
class SmoothLabels:
    """Gives every pair the α that its strength asks for: the probability that its label is wrong.

    α = σ(−strength), at most `highest`.

    Args:
        highest: bound on α, in [0, 0.5).
        scale: of the strengths before σ: small where the ensemble is surer than it is right.

    Raises:
        ValueError: where a number is out of range.

    Source: P2 §3.1 smooths labels by one α; an α of each pair's own, by its strength, is ours.
    """

    highest: float = 0.45
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_range("SmoothLabels", "scale", self.scale, 0, above=True)
        if not 0 <= self.highest < 0.5:
            raise ValueError(
                f"SmoothLabels(highest=): got {self.highest}, expected a number in [0, 0.5)"
            )

    def __call__(self, records: Records) -> list[dict[str, Any]]:
        """Return records with α in `SMOOTHING`.

        Raises:
            ValueError: where records have no strength.
        """
        alphas = torch.sigmoid(-self.scale * torch.tensor(_strengths(records), dtype=torch.float64))
        known = zip(records, alphas.clamp(max=self.highest).tolist(), strict=True)
        return [{**record, SMOOTHING: alpha} for record, alpha in known]


@strict
@dataclass(frozen=True, kw_only=True)
class AdaptiveMargin:
    """Asks for a lead as large as the ensemble sees one.

    Args:
        scale: factor on the strength.
        lowest: bound on the margin from below, in units of score; None for none, so that a pair
            that the ensemble contradicts may be wrong by as much.
        highest: bound from above; None for none.

    Raises:
        ValueError: where a number is out of range.

    Source: P2 §3.1 (adaptive margin: the strength itself); the bounds are ours.
    """

    scale: float = 1.0
    lowest: float | None = 0.0
    highest: float | None = None

    def __post_init__(self) -> None:
        check_range("AdaptiveMargin", "scale", self.scale, 0)
        if None not in (self.lowest, self.highest) and self.lowest > self.highest:  # type: ignore[operator]
            raise ValueError(
                f"AdaptiveMargin(lowest={self.lowest}, highest={self.highest}): expected lowest "
                "to be the lower"
            )

    def __call__(self, records: Records) -> list[dict[str, Any]]:
        """Return records with m in `MARGIN`.

        Raises:
            ValueError: where records have no strength.
        """
        margins = self.scale * torch.tensor(_strengths(records), dtype=torch.float64)
        if self.lowest is not None or self.highest is not None:
            margins = margins.clamp(self.lowest, self.highest)
        known = zip(records, margins.tolist(), strict=True)
        return [{**record, MARGIN: margin} for record, margin in known]


def _strengths(records: Records) -> list[float]:
    found = [record.get(STRENGTH) for record in records]
    if any(not isinstance(x, numbers.Real) or math.isnan(x) for x in found):
        raise ValueError(
            f"records: not all have a number in {STRENGTH!r}; call "
            "PreferenceStrength.annotate(pairs) first"
        )
    return [float(x) for x in found if x is not None]


def _flipped(record: Mapping[str, Any]) -> dict[str, Any]:
    again = not record.get(FLIPPED, False)  # flipped twice, a label is what it was
    turned = {"chosen": record["rejected"], "rejected": record["chosen"], FLIPPED: again}
    return {**record, **turned, STRENGTH: -record[STRENGTH]}


def _folds(
    count: int, models: int, folds: int, seed: int
) -> list[tuple[Int[Tensor, " a"], Int[Tensor, " b"]]]:
    """What each model learns, and what it is asked about; every round of folds cuts anew."""
    everything = torch.arange(count)
    if folds == 1:
        return [(everything, everything)] * models
    if models % folds or models < 2 * folds or count < folds:
        raise ValueError(
            f"models, folds: got {models} and {folds} for {count} pairs, expected models to be 2, "
            f"3, … times folds, so that each pair is asked about as often, and twice at least"
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(models // folds):
        fold = torch.randperm(count, generator=generator) % folds
        found += [((fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]) for k in range(folds)]
    return found
