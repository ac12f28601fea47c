"""How well one list of numbers agrees with another: errors, ranks, variance explained."""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How well values agree with returns measured with some noise.

    Args:
        start: share of the response behind the earliest of the states.
        end: share of the response behind the latest, exclusive.
        states: how many.
        mean_absolute_error: of |V − G|, in units of reward; NaN without states.
        mean_error: of V − G, in units of reward: above 0 the values are too high.
        rank_correlation: Spearman's ρ of V and G, in [−1, 1]; NaN where either is all alike.
        explained_variance: 1 − Var(G − V)/Var(G); NaN where G is all alike.
        noise: mean standard error of G, in units of reward. A perfect critic has a
            `mean_absolute_error` of about 0.8 of it, not 0.

    Source: ours; customary.
    """

    start: float
    end: float
    states: int
    mean_absolute_error: float
    mean_error: float
    rank_correlation: float
    explained_variance: float
    noise: float

    def numbers(self) -> dict[str, float]:
        """Return all but `start` and `end`, by name."""
        return {n: v for n, v in asdict(self).items() if n not in ("start", "end")}


def agreement(
    values: Float[Tensor, " S"],
    returns: Float[Tensor, " S"],
    standard_errors: Float[Tensor, " S"],
    start: float,
    end: float,
) -> Agreement:
    """Compare values with returns.

    Args:
        values: ``[S]`` V, in units of reward.
        returns: ``[S]`` G, measured.
        standard_errors: ``[S]`` of G.
        start: share of the response behind the earliest of the states.
        end: share behind the latest, exclusive.

    Source: ours.
    """
    if not len(values):
        return Agreement(start, end, 0, *[math.nan] * 5)
    off = values - returns
    total = returns.var(correction=0)
    # The mean of equal numbers is off by rounding: what then looks like variance is none.
    varies = bool(total > 1e-12 * returns.mean() ** 2)
    return Agreement(
        start,
        end,
        len(values),
        float(off.abs().mean()),
        float(off.mean()),
        rank_correlation(values, returns),
        float(1 - off.var(correction=0) / total) if varies else math.nan,
        float(standard_errors.mean()),
    )


def rank_correlation(x: Float[Tensor, " S"], y: Float[Tensor, " S"]) -> float:
    """Spearman's ρ: the correlation of the ranks, those of equal numbers being their mean.

    Args:
        x: ``[S]``.
        y: ``[S]``.

    Returns:
        in [−1, 1]; NaN where one of them is all alike.

    Source: Spearman (1904).
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale else math.nan


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
