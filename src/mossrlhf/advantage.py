"""Advantage estimators: GAE, and three that need no critic."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mossrlhf.functional import (
    Reduce,
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    sequence_returns,
    whiten,
)
from mossrlhf.options import check_range, strict
from mossrlhf.types import Advantages


@strict
@dataclass(frozen=True, kw_only=True)
class AdvantageEstimator:
    """Generalized advantage estimation over the tokens of each response.

    Any callable of rewards, values and mask can stand in its place; it gets the other arguments
    that it names. For instance
    ``lambda rewards, values, mask, bootstrap=None: Advantages(rewards - values, rewards)``.

    Args:
        gamma: discount γ per token, in [0, 1].
        lam: λ per token, in [0, 1]; 0 is the one-step error, 1 the return minus the value.
        value_lam: λ of the critic's targets; None for `lam`. With 1 the critic's errors do not
            bias its targets (arXiv 2503.01491, decoupled GAE).
        whiten: whether to whiten advantages over the whole rollout and all processes; over each
            minibatch: `PPOMaxLoss.advantage_norm`.
        correction: 1 whitens by the unbiased variance, 0 by the population's.
        clip: bound on |advantage|, after whitening; None for none.

    Raises:
        ValueError: where a number is outside its range.

    Source: P1 eqs. 11-13; γ = 1, λ = 0.9 (P1, App. C.3) or 0.95 (MOSS-RLHF's code; the default).
    """

    gamma: float = 1.0
    lam: float = 0.95
    value_lam: float | None = None
    whiten: bool = False
    correction: int = 0
    clip: float | None = None

    def __post_init__(self) -> None:
        check_range("AdvantageEstimator", "gamma", self.gamma, 0, 1)
        check_range("AdvantageEstimator", "lam", self.lam, 0, 1)
        check_range("AdvantageEstimator", "value_lam", self.value_lam, 0, 1)
        check_range("AdvantageEstimator", "correction", self.correction, 0, 1)
        check_range("AdvantageEstimator", "clip", self.clip, 0, above=True)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        bootstrap: Float[Tensor, " B"] | None = None,
        counted: Bool[Tensor, "B T"] | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> Advantages:
        """Estimate A = GAE(γ, λ), and the targets R = GAE(γ, λ_value) + V.

        Args:
            rewards: ``[B, T]``, in units of reward.
            values: ``[B, T]`` of the state before each token.
            mask: ``[B, T]`` states with a value; the recursion carries across holes.
            bootstrap: ``[B]`` value after the last token; None for 0.
            counted: ``[B, T]`` tokens that are whitened together; None for `mask`.
            reduce: sums a tensor over all processes.

        Returns:
            `Advantages`, zero outside the mask.

        Source: P1 eqs. 11-13.
        """
        advantages = gae(rewards, values, mask, self.gamma, self.lam, bootstrap)
        targets = advantages
        if self.value_lam is not None and self.value_lam != self.lam:
            targets = gae(rewards, values, mask, self.gamma, self.value_lam, bootstrap)
        returns = torch.where(mask, targets + values, torch.zeros_like(values))
        if self.whiten:
            over = mask if counted is None else counted
            advantages = whiten(advantages, over, correction=self.correction, reduce=reduce)
        if self.clip is not None:
            advantages = advantages.clamp(-self.clip, self.clip)
        return Advantages(advantages, returns)


def _spread(per_sequence: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, per_sequence[:, None], torch.zeros_like(per_sequence[:, None]))


@strict
@dataclass(frozen=True, kw_only=True)
class GroupRelative:
    """GRPO's baseline: each response against the others to the same prompt; no critic.

    Args:
        group_size: responses per prompt; set `TrainerConfig.samples_per_prompt` to the same.
        scale: whether to divide by the group's standard deviation (GRPO) or not (Dr. GRPO).

    Raises:
        ValueError: where a group is of less than two.

    Source: arXiv 2402.03300 eq. 3; arXiv 2503.20783 for ``scale=False``.
    """

    group_size: int
    scale: bool = True

    def __post_init__(self) -> None:
        check_range("GroupRelative", "group_size", self.group_size, 2)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        bootstrap: Float[Tensor, " B"] | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> Advantages:
        """Estimate one advantage per response, the same for all its tokens.

        Args are those of `AdvantageEstimator` but `counted`; groups are consecutive rows, which
        never span processes, and ``values`` and ``bootstrap`` are ignored.
        """
        returns = sequence_returns(rewards, mask)
        scale = {} if self.scale else {"eps": None}
        relative = group_relative(returns, self.group_size, **scale)
        return Advantages(_spread(relative, mask), _spread(returns, mask))


@strict
@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """RLOO's baseline: the mean return of the *other* responses to the prompt; no critic.

    Args:
        group_size: responses per prompt; set `TrainerConfig.samples_per_prompt` to the same.

    Raises:
        ValueError: where a group is of less than two.

    Source: arXiv 2402.14740.
    """

    group_size: int

    def __post_init__(self) -> None:
        check_range("LeaveOneOut", "group_size", self.group_size, 2)

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        bootstrap: Float[Tensor, " B"] | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> Advantages:
        """Estimate one advantage per response, the same for all its tokens.

        Args are those of `AdvantageEstimator` but `counted`; groups are consecutive rows, which
        never span processes, and ``values`` and ``bootstrap`` are ignored.
        """
        returns = sequence_returns(rewards, mask)
        relative = leave_one_out(returns, self.group_size)
        return Advantages(_spread(relative, mask), _spread(returns, mask))


@strict
@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """REINFORCE++: rewards to go, whitened over the rollout; no critic.

    Args:
        gamma: discount γ per token, in [0, 1].

    Source: arXiv 2501.03262.
    """

    gamma: float = 1.0

    def __call__(
        self,
        rewards: Float[Tensor, "B T"],
        values: Float[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        bootstrap: Float[Tensor, " B"] | None = None,
        reduce: Reduce = lambda tensor: tensor,
    ) -> Advantages:
        """Estimate an advantage per token.

        Args are those of `AdvantageEstimator`; ``values`` and ``bootstrap`` are ignored.
        """
        advantages = reinforce_plus_plus(rewards, mask, self.gamma, reduce)
        returns = _spread(sequence_returns(rewards, mask), mask)
        return Advantages(advantages, returns)
