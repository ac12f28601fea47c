"""Held-out prompts: what rewards say of the policy's answers, and against the reference's."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.functional.reduce import Reduce, widest


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draw from a seed of one's own, and leave the generators as they were.

    Args:
        seed: of every torch generator meanwhile.

    Source: ours; looking at a run must not change it.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def win_rates(
    ours: Float[Tensor, " B"],
    theirs: Float[Tensor, " B"],
    reduce: Reduce = lambda tensor: tensor,
) -> dict[str, float]:
    """Share of prompts on which one answer scores above, level with, or below the other.

    Args:
        ours: ``[B]`` scores of the policy's answers; NaN leaves the prompt out.
        theirs: ``[B]`` scores of the reference's, to the same prompts.
        reduce: sums a tensor over all processes.

    Returns:
        ``win_rate``, ``tie_rate`` and ``lose_rate``, which add up to 1; all are 0 where no prompt
        counts.

    Source: P1 §5.5 (win, tie, lose against the SFT model).
    """
    counted = torch.isfinite(ours) & torch.isfinite(theirs)
    outcomes = torch.stack([ours > theirs, ours == theirs, ours < theirs])
    counts = reduce(widest((outcomes & counted).sum(dim=1)))
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return dict(zip(("win_rate", "tie_rate", "lose_rate"), shares, strict=True))


def compare(
    policy: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    reduce: Reduce = lambda tensor: tensor,
) -> dict[str, float]:
    """Mean of every reward on both sides, and who wins.

    Args:
        policy: ``[B]`` rewards of the policy's answers, by name.
        reference: of the reference's answers to the same prompts, by name.
        reduce: sums a tensor over all processes.

    Returns:
        ``eval/<name>/policy``, ``eval/<name>/ref`` and the rates of `win_rates`.

    Source: P1 §5.5.
    """
    metrics: dict[str, float] = {}
    for name, ours in policy.items():
        for side, scores in (("policy", ours), ("ref", reference[name])):
            finite = torch.isfinite(scores)
            count = reduce(widest(finite.sum()))
            total = reduce(widest(torch.where(finite, scores, 0.0)).sum())
            metrics[f"eval/{name}/{side}"] = float(total / count.clamp(min=1))
        rates = win_rates(ours, reference[name], reduce)
        metrics.update({f"eval/{name}/{rate}": value for rate, value in rates.items()})
    return metrics
