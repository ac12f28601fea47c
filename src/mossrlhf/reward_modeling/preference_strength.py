"""The strength of preferences, measured by an ensemble, and the treatment of weak and wrong labels.

`PreferenceStrength.annotate` adds ``strength`` and ``strength_std`` to records. Each method is a
function from such records to records, to use alone or after another.
"""

import hashlib
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

from mossrlhf.options import check_range, strict
from mossrlhf.reward_modeling.scoring import Collate, pair_margins

Records = Sequence[Mapping[str, Any]]
Train = Callable[[list[dict[str, Any]], int], nn.Module]

STRENGTH, SPREAD = "strength", "strength_std"  # mean margin over the ensemble, and its deviation
MARGIN, SMOOTHING, FLIPPED = "margin", "label_smoothing", "flipped"  # written by the methods


@dataclass(frozen=True)
class PreferenceStrength:
    """Margins of N pairs by an ensemble of K reward models.

    Args:
        margins: ``[K, N]`` r_w − r_l, NaN if a model was not queried.
        fingerprint: checksum of the N pairs (`checksum`).

    Source: P2 (arXiv 2401.06080) §2.1: mean and standard deviation over an ensemble of reward
        models trained on the same data in different order. ``folds`` of `measure` are not in P2:
        models are queried about pairs they were not trained on, so that no early stopping has to
        keep them from memorizing wrong labels.
    """

    margins: Float[Tensor, "K N"]
    fingerprint: str

    @property
    def mean(self) -> Float[Tensor, " N"]:
        """Mean margin of each pair; it is negative if the ensemble contradicts the label."""
        return self.margins.nanmean(0)

    @property
    def std(self) -> Float[Tensor, " N"]:
        """Standard deviation of each pair's margins, unbiased; NaN if there is only one."""
        count = (~self.margins.isnan()).sum(0)
        squares = (self.margins - self.mean).square().nansum(0)
        return torch.where(count > 1, squares / (count - 1).clamp(min=1), torch.nan).sqrt()

    @classmethod
    def of(
        cls, models: Sequence[nn.Module], pairs: Records, collator: Collate, batch_size: int = 32
    ) -> "PreferenceStrength":
        """Query trained reward models about pairs.

        Args:
            models: K `RewardModel`; K ≥ 2.
            pairs: N records of ``prompt``, ``chosen``, ``rejected``.
            collator: a `PairCollator`.
            batch_size: pairs per forward pass.

        Raises:
            ValueError: if there are fewer than two models, or no pairs.
        """
        if len(models) < 2 or not len(pairs):
            raise ValueError(
                f"models, pairs: got {len(models)} and {len(pairs)}, expected two models at least "
                "and a pair; one model gives no standard deviation"
            )
        margins = [pair_margins(model, pairs, collator, batch_size) for model in models]
        return cls(torch.stack(margins), checksum(pairs))

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
        """Train an ensemble on pairs, and query it about them.

        Args:
            train: from records and a seed to a trained reward model.
            pairs: N records.
            collator: a `PairCollator`.
            models: K; P2 takes 10.
            folds: 1 trains each model on all pairs and queries it about all, as in P2. With more,
                each model is trained on all folds but one and queried about that one, so that
                ``models / folds`` models are queried about each pair.
            seed: of the splits; model k is trained with seed + k.
            batch_size: pairs per forward pass of a query.

        Raises:
            ValueError: if models and folds do not give each pair the same number of margins, two
                at least.
        """
        check_range("PreferenceStrength.measure", "models", models, 2)
        check_range("PreferenceStrength.measure", "folds", folds, 1)
        if not len(pairs):
            raise ValueError("pairs: got none, expected one at least")
        margins = torch.full((models, len(pairs)), torch.nan)
        for k, (training, held_out) in enumerate(_folds(len(pairs), models, folds, seed)):
            model = train([dict(pairs[i]) for i in training.tolist()], seed + k)
            others = [pairs[i] for i in held_out.tolist()]
            margins[k, held_out] = pair_margins(model, others, collator, batch_size)
        return cls(margins, checksum(pairs))

    def annotate(self, pairs: Records) -> list[dict[str, Any]]:
        """Return the measured ``pairs``, in the same order, with `STRENGTH` and `SPREAD` added.

        Raises:
            ValueError: if they are other pairs.
        """
        if checksum(pairs) != self.fingerprint:
            raise ValueError(
                f"pairs: these {len(pairs)} are not the {self.margins.shape[1]} that were measured,"
                " or they are in another order; measure their strength again"
            )
        columns = zip(pairs, self.mean.tolist(), self.std.tolist(), strict=True)
        return [{**pair, STRENGTH: mean, SPREAD: std} for pair, mean, std in columns]

    def save(self, path: str | Path) -> None:
        """Write the margins to ``path``, as JSON."""
        rows = [[None if math.isnan(x) else x for x in row] for row in self.margins.tolist()]
        content = {"fingerprint": self.fingerprint, "margins": rows}
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "PreferenceStrength":
        """Read what `save` wrote to ``path``.

        Raises:
            ValueError: if the file has another content.
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


def checksum(pairs: Records) -> str:
    """Return a checksum of the pairs' texts and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(pairs)):
        record = pairs[index]
        digest.update(repr([record.get(k) for k in ("prompt", "chosen", "rejected")]).encode())
    return digest.hexdigest()


@strict
@dataclass(frozen=True, kw_only=True)
class FlipLabels:
    """Swap the responses of the pairs whose labels are most likely wrong.

    Args:
        share: share of all pairs, taken from the lowest strength, in [0, 1]; None for no such
            limit.
        below: strength under which a label is flipped, in units of reward; None for no such limit.
            A label is flipped if it meets both.

    Raises:
        ValueError: if neither is given, or `share` is out of range.

    Source: P2 §3.1: labels of the lowest-strength data are flipped. P2 has no limit on the
        strength, which spares labels that the ensemble agrees with.
    """

    share: float | None = None
    below: float | None = 0.0

    def __post_init__(self) -> None:
        check_range("FlipLabels", "share", self.share, 0, 1)
        if self.share is None and self.below is None:
            raise ValueError("FlipLabels(share=None, below=None): expected one of the two")

    def __call__(self, records: Records) -> list[dict[str, Any]]:
        """Return the records with wrong labels flipped, marked in `FLIPPED`.

        Raises:
            ValueError: if records have no strength, or margins and α of the labels before the flip.
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
    """Give every pair its own α, the probability that its label is wrong.

    α = σ(−strength), at most `highest`.

    Args:
        highest: upper bound of α, in [0, 0.5).
        scale: factor on the strength before σ; below 1 for an overconfident ensemble.

    Raises:
        ValueError: if a number is out of range.

    Source: P2 §3.1, which smooths all labels by the same α.
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
        """Return the records with α in `SMOOTHING`; they must have a strength."""
        alphas = torch.sigmoid(-self.scale * torch.tensor(_strengths(records), dtype=torch.float64))
        return _with_column(records, SMOOTHING, alphas.clamp(max=self.highest))


@strict
@dataclass(frozen=True, kw_only=True)
class AdaptiveMargin:
    """Give every pair a margin m in proportion to its strength.

    Args:
        scale: factor on the strength.
        lowest: lower bound of m, in units of reward; None for none, so that m is negative where
            the ensemble contradicts the label.
        highest: upper bound; None for none.

    Raises:
        ValueError: if a number is out of range.

    Source: P2 §3.1 (adaptive margin: the strength itself), without bounds.
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
        """Return the records with m in `MARGIN`; they must have a strength."""
        margins = self.scale * torch.tensor(_strengths(records), dtype=torch.float64)
        if self.lowest is not None or self.highest is not None:
            margins = margins.clamp(self.lowest, self.highest)
        return _with_column(records, MARGIN, margins)


def _strengths(records: Records) -> list[float]:
    found = [record.get(STRENGTH) for record in records]
    if any(not isinstance(x, numbers.Real) or math.isnan(x) for x in found):
        raise ValueError(
            f"records: not all have a number in {STRENGTH!r}; call "
            "PreferenceStrength.annotate(pairs) first"
        )
    return [float(x) for x in found if x is not None]


def _with_column(records: Records, name: str, column: Tensor) -> list[dict[str, Any]]:
    pairs = zip(records, column.tolist(), strict=True)
    return [{**record, name: value} for record, value in pairs]


def _flipped(record: Mapping[str, Any]) -> dict[str, Any]:
    flipped = not record.get(FLIPPED, False)  # flipped twice, a label is the original
    swapped = {"chosen": record["rejected"], "rejected": record["chosen"], FLIPPED: flipped}
    return {**record, **swapped, STRENGTH: -record[STRENGTH]}


def _folds(
    count: int, models: int, folds: int, seed: int
) -> list[tuple[Int[Tensor, " a"], Int[Tensor, " b"]]]:
    """Return the indices that each model is trained on and queried about."""
    everything = torch.arange(count)
    if folds == 1:
        return [(everything, everything)] * models
    if models % folds or models < 2 * folds or count < folds:
        raise ValueError(
            f"models, folds: got {models} and {folds} for {count} pairs, expected models to be 2, "
            f"3, … times folds, so that each pair gets the same number of margins, two at least"
        )
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(models // folds):  # each round splits the pairs differently
        fold = torch.randperm(count, generator=generator) % folds
        found += [((fold != k).nonzero()[:, 0], (fold == k).nonzero()[:, 0]) for k in range(folds)]
    return found
