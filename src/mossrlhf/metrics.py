"""Metrics of optimizer steps, rollouts and evaluations; detection of collapse and stalled runs."""

import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from math import log
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mossrlhf.distributed.sharding import local
from mossrlhf.functional import Reduce, kl_k1, kl_k3, masked_moments, masked_sum, widest
from mossrlhf.types import Rollout

OFF = log(1.1)
"""Nats: log-probabilities that differ by more have a ratio outside [1/1.1, 1.1]."""

SHARES = (0.05, 0.5, 0.95)
"""Quantiles of the scores that are logged."""


class Meter:
    """Accumulates weighted means, and reduces them over all processes at once.

    Tensors stay on their device until `compute`, so that nothing waits for the accelerator.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, stats: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add shares of means (scalars by name), of a weight such as the tokens of the step."""
        for name, value in stats.items():
            self._sums[name] = self._sums.get(name, 0.0) + widest(value) * weight
            self._weights[name] = self._weights.get(name, 0.0) + widest(weight)

    def compute(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """Return the weighted mean of each name; `reduce` sums a tensor over all processes."""
        if not self._sums:
            return {}
        sums = reduce(torch.stack(list(self._sums.values())))
        means = sums / torch.stack(list(self._weights.values()))
        return dict(zip(self._sums, means.tolist(), strict=True))


def rollout_metrics(rollout: Rollout, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
    """Return the metrics of a finished rollout over all processes: the monitors of P1 §5.2.

    Source: P1 §5.2. Perplexity is exp(token-mean negative log-likelihood) of the response.
    """
    rollout = _widened(rollout)
    mask = rollout.mask
    ones = widest(torch.ones(len(rollout), device=mask.device))
    count, tokens = reduce(ones.sum()), reduce(widest(mask).sum()).clamp(min=1)

    def per_token(x: Tensor) -> Tensor:
        return reduce(masked_sum(x, mask)) / tokens

    def spread(name: str, x: Tensor, counted: Tensor) -> dict[str, Tensor]:
        mean, variance = masked_moments(x, counted, reduce=reduce)
        return {f"{name}mean": mean, f"{name}std": variance.sqrt()}

    out = {
        "response/length_tokens": reduce(widest(rollout.response_lengths).sum()) / count,
        "response/truncated_fraction": reduce(widest(rollout.truncated).sum()) / count,
        "response/distinct_2": reduce(distinct_2(rollout.completions()) * ones[0])
        / reduce(ones[0]),
    }
    logprobs, ref_logprobs = rollout.logprobs, rollout.ref_logprobs
    if logprobs is not None:
        out["perplexity/policy"] = torch.exp(-per_token(logprobs))
    if ref_logprobs is not None:
        out["perplexity/ref"] = torch.exp(-per_token(ref_logprobs))
    if logprobs is not None and ref_logprobs is not None:
        k1, k3 = per_token(kl_k1(logprobs, ref_logprobs)), per_token(kl_k3(logprobs, ref_logprobs))
        out |= {"kl/ref_per_token": k1, "kl/ref_per_sequence": k1 * tokens / count}
        out |= {"kl/ref_k3_per_token": k3, "kl/ref_k3_per_sequence": k3 * tokens / count}
    if rollout.entropies is not None:
        out["policy/entropy_nats_per_token"] = per_token(rollout.entropies)
    if rollout.sampler_logprobs is not None and logprobs is not None:
        gap = (rollout.sampler_logprobs - logprobs).abs()
        out["sampler/logprob_gap_nats"] = per_token(gap)
        out["sampler/ratio_off_fraction"] = per_token(widest(gap > OFF))
    if rollout.scores is not None:
        counted = torch.isfinite(rollout.scores)
        out |= spread("reward/score_", rollout.scores, counted)
        found = quantiles(rollout.scores, counted, SHARES, reduce)
        out |= {f"reward/score_p{share * 100:02.0f}": found[i] for i, share in enumerate(SHARES)}
    for name, rewards in rollout.extra.items():
        if name.startswith("reward/"):
            out |= spread(f"{name}/", rewards, torch.isfinite(rewards))
    if rollout.rewards is not None:
        out["reward/return_mean"] = reduce(rollout.rewards.sum()) / count
    for name in ("advantages", "values", "returns"):
        value: Tensor | None = getattr(rollout, name)
        if value is not None:
            out |= spread(f"{name}/", value, rollout.states)
    if rollout.values is not None and rollout.returns is not None:
        out["critic/explained_variance"] = explained_variance(rollout, reduce)
    return dict(zip(out, torch.stack(list(out.values())).tolist(), strict=True))


def _widened(rollout: Rollout) -> Rollout:
    """Convert floating tensors to the widest type, so that sums over tokens are exact enough."""
    wide: dict[str, Any] = {
        spec.name: widest(value)
        for spec in fields(rollout)
        if isinstance(value := getattr(rollout, spec.name), Tensor) and value.is_floating_point()
    }
    return replace(rollout, **wide, extra={k: widest(v) for k, v in rollout.extra.items()})


def quantiles(
    x: Float[Tensor, " B"],
    counted: Bool[Tensor, " B"],
    shares: Sequence[float],
    reduce: Reduce = lambda tensor: tensor,
) -> Float[Tensor, " Q"]:
    """Return quantiles over all processes, without gathering the numbers.

    Processes can only add, so each quantile is bracketed by counts of the numbers below the edges
    of finer and finer bins. The result is NumPy's ``inverted_cdf``, except that numbers closer than
    a millionth of the standard deviation count as one.
    """
    mean, variance = masked_moments(x, counted, reduce=reduce)
    x = torch.where(counted, x, torch.inf)
    # Less than 5 % are more than √19 = 4.36 standard deviations away (Cantelli's inequality).
    reach, marks = 4.5 * variance.sqrt(), torch.arange(1, 65, device=x.device)
    wanted = reduce(widest(counted).sum()) * x.new_tensor(shares) - 1e-6  # 0.95 · 20 rounds up
    low, width = (mean - reach).expand(len(wanted)), 2 * reach / len(marks)
    for _ in range(4):
        ruler = low[:, None] + width * marks
        below = reduce(widest(x <= ruler[..., None]).sum(-1))
        low = low + width * (below < wanted[:, None]).sum(-1)
        high, width = low + width, width / len(marks)
    inside = (x > low[:, None]) & (x <= high[:, None])
    total, count = reduce(masked_sum(x.expand_as(inside), inside, 1)), reduce(widest(inside).sum(1))
    # The bins have no width if all numbers are equal.
    return torch.where(count > 0, total / count.clamp(min=1), mean)


def explained_variance(
    rollout: Rollout, reduce: Reduce = lambda tensor: tensor
) -> Float[Tensor, ""]:
    """Return 1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant one."""
    assert rollout.values is not None
    assert rollout.returns is not None
    mean, total = masked_moments(rollout.returns, rollout.states, reduce=reduce)
    _, left = masked_moments(rollout.returns - rollout.values, rollout.states, reduce=reduce)
    # The mean of equal numbers has a rounding error, which looks like variance.
    varies = total > 1e-12 * mean**2
    return torch.where(varies, 1 - left / total, torch.zeros_like(total))


def distinct_2(completions: Sequence[Sequence[int]]) -> float:
    """Return the share of different bigrams among all bigrams of a batch of responses, pooled.

    Source: Li et al., arXiv 1510.03055 (distinct-n).
    """
    bigrams = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def win_rates(
    ours: Float[Tensor, " B"],
    theirs: Float[Tensor, " B"],
    reduce: Reduce = lambda tensor: tensor,
) -> dict[str, float]:
    """Return the shares of prompts on which our reward is higher, equal, or lower.

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
    """Return the mean of every reward for policy and reference, and the win rates.

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


Dataset = Sequence[Mapping[str, Any]]


LATELY = 10
"""Iterations that `CollapseWatch.lately` looks back."""


class CollapseWarning(UserWarning):
    """The policy has collapsed to a few responses with a high reward."""


class StillPolicyWarning(UserWarning):
    """Optimizer steps leave the policy's parameters unchanged."""


class CollapseWatch:
    """Warn when responses are monotonous and far from the reference, at any length.

    Collapsed: KL per sequence above a bound *and* distinct-2 below half of the reference's.
    Score and loss do not show it, and length only sometimes.

    Args:
        kl_bound: nats per sequence.
        reference_distinct_2: of as many responses of the reference; None disables the warning.

    Source: P1 §5.2 (pattern collapse: KL explodes, diversity goes); the rule is ours.
    """

    def __init__(self, kl_bound: float, reference_distinct_2: float | None) -> None:
        self.kl_bound = kl_bound
        self.reference_distinct_2 = reference_distinct_2
        self.flags: deque[bool] = deque(maxlen=LATELY)

    def state_dict(self) -> dict[str, Any]:
        """Return the flags of the last iterations, for JSON."""
        return {"flags": list(self.flags)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state` that `state_dict` returned."""
        self.flags = deque(state["flags"], maxlen=LATELY)

    @property
    def lately(self) -> bool:
        """Whether the policy was collapsed in one of the last ten iterations."""
        return any(self.flags)

    def __call__(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the policy has collapsed, by ``kl/ref_per_sequence`` and
        ``response/distinct_2`` among the `metrics`; warn unless it was collapsed `lately`.
        """
        kl = metrics.get("kl/ref_per_sequence")
        distinct = metrics.get("response/distinct_2")
        if kl is None or distinct is None or self.reference_distinct_2 is None:
            return False
        collapsed = kl > self.kl_bound and distinct < 0.5 * self.reference_distinct_2
        if collapsed and not self.lately:
            warnings.warn(
                f"the policy has collapsed: KL to the reference {kl:.1f} nats per sequence "
                f"(bound {self.kl_bound:g}) and distinct-2 {distinct:.3f}, under half of the "
                f"reference's {self.reference_distinct_2:.3f}. Ignore the score from here on; "
                "raise RewardShaper(kl_coef=), clip the reward, or lower the learning rate",
                CollapseWarning,
                stacklevel=3,
            )
        self.flags.append(collapsed)
        return collapsed


class StillWatch:
    """Warn when the policy's parameters do not change, iteration after iteration.

    In pure bfloat16 a learning rate of 5e-7 is rounded away: AdamW changes hardly any weight and
    nothing fails. A sample of the parameters is compared before and after each iteration.

    Args:
        parameters: of the policy; only the trained ones are compared.
        patience: iterations in a row before the warning.
        least: share of the sampled weights that must change.
        sample: weights compared in each parameter.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        patience: int = 3,
        least: float = 0.05,
        sample: int = 256,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.patience, self.least, self.sample = patience, least, sample
        self.still = 0
        self._before = self._sampled()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of iterations without a change, for JSON."""
        return {"still": self.still}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state` of `state_dict`, after the parameters have been restored."""
        self.still = int(state["still"])
        self._before = self._sampled()

    def _sampled(self) -> Tensor:
        # A parameter may have no element in this process's shard.
        held = [local(p.detach()) for p in self.parameters]
        parts = [p.flatten()[: self.sample].float() for p in held if p.numel()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def __call__(self, learning_rate: float) -> float:
        """Return the share of sampled weights that changed since the last call.

        Warn once when the patience runs out; at a `learning_rate` of 0 no change is expected.
        """
        now = self._sampled()
        changed = float((now != self._before).float().mean()) if now.numel() else 1.0
        self._before = now
        self.still = self.still + 1 if changed < self.least and learning_rate > 0 else 0
        if self.still == self.patience:
            warnings.warn(
                f"the policy is not moving: {changed:.1%} of its weights changed in the last "
                f"iteration, {self.patience} iterations in a row under {self.least:.0%}, at a "
                f"learning rate of {learning_rate:g}. Train float32 parameters (with bf16=True for "
                "the arithmetic), check requires_grad, or raise learning_rate",
                StillPolicyWarning,
                stacklevel=3,
            )
        return changed
