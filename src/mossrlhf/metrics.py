"""Sums that become means at the end: over tokens, micro-batches, steps and processes alike."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.functional.logprobs import kl_k1, kl_k3
from mossrlhf.functional.reduce import Reduce, masked_moments, masked_sum
from mossrlhf.types import Rollout


class Meter:
    """Adds up weighted means, and gives the mean of them all in one reduction.

    Tensors stay on their device until `compute`, so that nothing waits for the accelerator.

    Source: ours.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add means with the weight they were taken over.

        Args:
            stats: scalars by name.
            weight: scalar, e.g. the number of tokens of the optimizer step.
        """
        for name, value in stats.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double() * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight.double()

    def compute(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """Return the weighted mean of each name.

        Args:
            reduce: sums a tensor over all processes, where what was added are shares.
        """
        if not self._sums:
            return {}
        sums = reduce(torch.stack(list(self._sums.values())))
        means = sums / torch.stack(list(self._weights.values()))
        return dict(zip(self._sums, means.tolist(), strict=True))


def rollout_metrics(rollout: Rollout, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
    """Describe a finished rollout, over all processes: the monitors of P1 §5.2.

    Args:
        rollout: scored, annotated and estimated; what is missing is left out.
        reduce: sums a tensor over all processes.

    Returns:
        metrics by name; docs/metrics.md explains each, units are in the names.

    Source: P1 §5.2. Perplexity is exp(token-mean negative log-likelihood) of the response.
    """
    mask, sequences = rollout.mask, torch.ones(len(rollout), device=rollout.mask.device)
    count = reduce(sequences.sum())
    tokens = reduce(mask.sum().float()).clamp(min=1)
    out: dict[str, Tensor] = {
        "response/length_tokens": reduce(rollout.response_lengths.float().sum()) / count,
        "response/truncated_fraction": reduce(rollout.truncated.float().sum()) / count,
    }
    variety = torch.tensor(distinct_2(rollout.completions()), device=mask.device)
    out["response/distinct_2"] = reduce(variety) / reduce(torch.ones_like(variety))
    if rollout.logprobs is not None:
        mean_logprob = reduce(masked_sum(rollout.logprobs, mask)) / tokens
        out["perplexity/policy"] = torch.exp(-mean_logprob)
    if rollout.ref_logprobs is not None:
        mean_logprob = reduce(masked_sum(rollout.ref_logprobs, mask)) / tokens
        out["perplexity/ref"] = torch.exp(-mean_logprob)
    if rollout.logprobs is not None and rollout.ref_logprobs is not None:
        k1 = reduce(masked_sum(kl_k1(rollout.logprobs, rollout.ref_logprobs), mask))
        k3 = reduce(masked_sum(kl_k3(rollout.logprobs, rollout.ref_logprobs), mask))
        out["kl/ref_per_token"], out["kl/ref_per_sequence"] = k1 / tokens, k1 / count
        out["kl/ref_k3_per_token"], out["kl/ref_k3_per_sequence"] = k3 / tokens, k3 / count
    if rollout.entropies is not None:
        out["policy/entropy_nats_per_token"] = reduce(masked_sum(rollout.entropies, mask)) / tokens
    if rollout.sampler_logprobs is not None and rollout.logprobs is not None:
        gap = (rollout.sampler_logprobs - rollout.logprobs).abs()
        out["sampler/logprob_gap_nats"] = reduce(masked_sum(gap, mask)) / tokens
        off = torch.exp(gap) > 1.1
        out["sampler/ratio_off_fraction"] = reduce((off & mask).sum().float()) / tokens
    if rollout.scores is not None:
        applicable = torch.isfinite(rollout.scores)
        mean, variance = masked_moments(rollout.scores, applicable, reduce=reduce)
        out["reward/score_mean"], out["reward/score_std"] = mean, variance.sqrt()
    if rollout.rewards is not None:
        out["reward/return_mean"] = reduce(rollout.rewards.sum()) / count
    for name in ("advantages", "values", "returns"):
        value: Tensor | None = getattr(rollout, name)
        if value is not None:
            mean, variance = masked_moments(value, rollout.states, reduce=reduce)
            out[f"{name}/mean"], out[f"{name}/std"] = mean, variance.sqrt()
    if rollout.values is not None and rollout.returns is not None:
        out["critic/explained_variance"] = explained_variance(rollout, reduce)
    for name in rollout.extra:
        if name.startswith("reward/"):
            applicable = torch.isfinite(rollout.extra[name])
            mean, variance = masked_moments(rollout.extra[name], applicable, reduce=reduce)
            out[f"{name}/mean"], out[f"{name}/std"] = mean, variance.sqrt()
    packed = torch.stack([value.double() for value in out.values()])
    return dict(zip(out, packed.tolist(), strict=True))


def explained_variance(
    rollout: Rollout, reduce: Reduce = lambda tensor: tensor
) -> Float[Tensor, ""]:
    """1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant one, below for a worse one.

    Args:
        rollout: with values and returns.
        reduce: sums a tensor over all processes.

    Returns:
        scalar; 0 where the returns do not vary by more than rounding.

    Source: ours; customary.
    """
    assert rollout.values is not None
    assert rollout.returns is not None
    mean, total = masked_moments(rollout.returns, rollout.states, reduce=reduce)
    _, left = masked_moments(rollout.returns - rollout.values, rollout.states, reduce=reduce)
    # The mean of equal numbers is off by rounding: what then looks like variance is none.
    varies = total > 1e-12 * mean**2
    return torch.where(varies, 1 - left / total, torch.zeros_like(total))


def distinct_2(completions: Sequence[Sequence[int]]) -> float:
    """Share of different bigrams among all bigrams of a batch of responses, pooled.

    Args:
        completions: token ids of each response.

    Returns:
        in (0, 1]; 0 where there is no bigram at all.

    Source: Li et al., arXiv 1510.03055 (distinct-n).
    """
    bigrams = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0
