"""`RewardShaper`: rewards per token from the rewards of responses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mossrlhf.functional import Reduce, kl_k1, widest
from mossrlhf.models import SCORE_MOMENTS
from mossrlhf.options import check_range, strict
from mossrlhf.types import Rollout


@dataclass
class RunningMoments:
    """Running mean and variance of numbers, over all processes.

    Args:
        count: how many numbers.
        mean: their mean.
        m2: Σ (x − mean)².

    Source: P1 eq. 18 (historical mean and std); merged as in Chan et al. (1983).
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 until two different numbers have come."""
        if self.count < 2 or self.m2 <= 0:
            return 1.0
        return float((self.m2 / (self.count - 1)) ** 0.5)

    def update(self, x: Float[Tensor, " B"], reduce: Reduce = lambda tensor: tensor) -> None:
        """Add numbers; entries that are not finite are skipped.

        Args:
            x: ``[B]``.
            reduce: sums a tensor over all processes.
        """
        x = widest(x[torch.isfinite(x)])
        count, total = reduce(torch.stack([torch.ones_like(x).sum(), x.sum()])).tolist()
        if count == 0:
            return
        batch_mean = total / count
        m2 = float(reduce(((x - batch_mean) ** 2).sum()))
        merged = self.count + count
        shift = batch_mean - self.mean
        self.m2 += m2 + shift**2 * self.count * count / merged
        self.mean += shift * count / merged
        self.count = merged

    @classmethod
    def of_reward_model(cls, model: nn.Module, count: float = 256) -> "RunningMoments":
        """Start from the mean and spread of a reward model's scores on its evaluation pairs.

        PPO's first rollouts are then normalized by a known scale instead of their own.

        Args:
            model: a `RewardModel` evaluated by `RewardTrainer.evaluate`.
            count: the weight of these moments, in numbers of scores.

        Raises:
            ValueError: where its configuration holds no moments, or `count` is below 2.

        Source: P1 eq. 18.
        """
        mean, std = (getattr(model.config, name, None) for name in SCORE_MOMENTS)
        if mean is None or std is None or count < 2:
            raise ValueError(
                f"model: its configuration has {SCORE_MOMENTS} = {(mean, std)}, and count is "
                f"{count}; expected two numbers, which RewardTrainer.evaluate() leaves there, and "
                "2 at least"
            )
        return cls(count=float(count), mean=float(mean), m2=float(std) ** 2 * (count - 1))

    def state_dict(self) -> dict[str, float]:
        """Return the moments as plain numbers."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a `state` that `state_dict` returned."""
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]


@dataclass
class RollingReturnMoments(RunningMoments):
    """Moments of a rolling discounted sum of scores, R ← γ·R + score.

    P1's reward scaling divides by the standard deviation of this sum; MOSS-RLHF's code by that of
    the scores (plain `RunningMoments`). Pass it as ``RewardShaper(scale=True, moments=...)``.

    Args:
        gamma: discount γ between successive scores, in [0, 1].
        rolling: R.

    Source: P1 §5.3.1 (reward scaling), after arXiv 2005.12729.
    """

    gamma: float = 0.99
    rolling: float = 0.0

    def update(self, x: Float[Tensor, " B"], reduce: Reduce = lambda tensor: tensor) -> None:
        """Add scores to the sum, one after the other, and add its values to the moments.

        Args:
            x: ``[B]`` scores.
            reduce: sums a tensor over all processes; each process has its own rolling sum.
        """
        sums = []
        for score in x[torch.isfinite(x)].tolist():
            self.rolling = self.gamma * self.rolling + score
            sums.append(self.rolling)
        super().update(x.new_tensor(sums), reduce)

    def state_dict(self) -> dict[str, float]:
        """Return the moments as plain numbers."""
        return {**super().state_dict(), "rolling": self.rolling}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a `state` that `state_dict` returned."""
        super().load_state_dict(state)
        self.rolling = state["rolling"]


@strict
@dataclass(kw_only=True)
class RewardShaper:
    """Turns scores into rewards per token: −η(log π_old − log π_ref), plus r̃ at the last token.

    r̃ = clip((score − mean)/std, −δ, δ) by the running moments, to which the new scores are added
    first. The penalty for an unfinished response is subtracted after the clip.

    Args:
        kl_coef: η, per nat; None for no penalty.
        normalize: whether to subtract the running mean and divide by the running std.
        scale: whether to divide by the running std alone; not together with `normalize`.
        clip: δ, bound on |r̃|; None for none.
        missing_eos_penalty: subtracted from r̃ where the response hit the length limit, in
            units of r̃; None for none.
        score_after_end: whether the score comes one step after the end of a response, as in TRL;
            of rollouts that have such a step (`Rollout.with_end_states`, as `Trainer` makes them).
        moments: the running moments; of scores, or `RollingReturnMoments`.

    Raises:
        ValueError: where a number is out of range, or `normalize` and `scale` are both on.
        TypeError: where the moments are none.

    Source: P1 eqs. 18-19; order and placement as in MOSS-RLHF's code.
        η = 0.05 (P1's studies), 0.01 / 0.1 (MOSS-RLHF's scripts).
    """

    kl_coef: float | None = 0.05
    normalize: bool = False
    scale: bool = False
    clip: float | None = None
    missing_eos_penalty: float | None = None
    score_after_end: bool = False
    moments: RunningMoments = field(default_factory=RunningMoments)

    def __post_init__(self) -> None:
        check_range("RewardShaper", "kl_coef", self.kl_coef, 0)
        check_range("RewardShaper", "clip", self.clip, 0, above=True)
        check_range("RewardShaper", "missing_eos_penalty", self.missing_eos_penalty, 0)
        if not isinstance(self.moments, RunningMoments):
            raise TypeError(
                f"RewardShaper(moments=): got {self.moments!r:.60}, expected RunningMoments(...)"
            )
        if self.normalize and self.scale:
            raise ValueError(
                "RewardShaper(normalize=True, scale=True): both divide by the running std; "
                "normalize also subtracts the mean. Choose one"
            )
        if self.normalize and isinstance(self.moments, RollingReturnMoments):
            raise ValueError(
                "RewardShaper(normalize=True, moments=RollingReturnMoments()): the mean of a "
                "rolling sum is not that of the scores; use scale=True with it"
            )

    def shape(
        self, scores: Float[Tensor, " B"], reduce: Reduce = lambda tensor: tensor
    ) -> Float[Tensor, " B"]:
        """Add scores to the moments, then normalize or scale, and clip them.

        Args:
            scores: ``[B]`` by the reward; NaN (not applicable) becomes 0.
            reduce: sums a tensor over all processes.

        Returns:
            ``[B]`` r̃.

        Source: P1 eq. 18.
        """
        applicable = ~torch.isnan(scores)
        shaped = scores
        if self.normalize or self.scale:
            self.moments.update(scores, reduce)
            center = self.moments.mean if self.normalize else 0.0
            shaped = (scores - center) / self.moments.std
        if self.clip is not None:
            shaped = shaped.clamp(-self.clip, self.clip)
        return torch.where(applicable, shaped, torch.zeros_like(shaped))

    def __call__(
        self, rollout: Rollout, reduce: Reduce = lambda tensor: tensor
    ) -> Float[Tensor, "B T"]:
        """Compute the rewards of a scored and annotated rollout.

        Args:
            rollout: with `scores` or `token_scores` or both, and, where there is a KL penalty,
                `logprobs` and `ref_logprobs`.
            reduce: sums a tensor over all processes.

        Returns:
            ``[B, T]`` rewards, zero outside the mask and the step after the end.

        Raises:
            ValueError: where a field of the rollout is missing, or it has rewards per token, for
                which `normalize`, `scale` and `clip` are not defined.

        Source: P1 eq. 19.
        """
        rewards = torch.zeros_like(rollout.token_weights)
        if self.kl_coef is not None:
            if rollout.logprobs is None or rollout.ref_logprobs is None:
                raise ValueError(
                    f"RewardShaper(kl_coef={self.kl_coef}): the rollout has no log-probabilities "
                    "of policy and reference; annotate it first, or set kl_coef=None"
                )
            penalty = self.kl_coef * kl_k1(rollout.logprobs, rollout.ref_logprobs)
            rewards = torch.where(rollout.mask, -penalty, rewards)
        if rollout.token_scores is not None:
            self._require_plain()
            rewards = rewards + torch.where(rollout.mask, rollout.token_scores, 0.0)
        if rollout.scores is not None:
            shaped = self.shape(rollout.scores, reduce)
        elif rollout.token_scores is not None:
            shaped = rewards.new_zeros(len(rewards))
        else:
            raise ValueError("rollout.scores: got None; score the rollout first")
        if self.missing_eos_penalty is not None:
            shaped = shaped - self.missing_eos_penalty * rollout.truncated
        return add_at_last(rewards, shaped, rollout.states)

    def _require_plain(self) -> None:
        """Refuse `normalize`, `scale` and `clip`, which would not reach rewards per token."""
        switches = {"normalize": self.normalize, "scale": self.scale, "clip": self.clip}
        neutral = {"normalize": False, "scale": False, "clip": None}
        on = [f"{name}={value}" for name, value in switches.items() if value != neutral[name]]
        if on:
            raise ValueError(
                f"RewardShaper({', '.join(on)}): a reward gave a number per token, expected one "
                "per response, which alone is normalized, scaled or clipped; set "
                "RewardShaper(normalize=False, scale=False, clip=None) and bring the rewards to "
                "scale yourself (kl_coef works with them), or return one number per response"
            )

    def adapt(self, kl: float, target: float, gain: float = 0.1) -> None:
        """Adapt η to keep the KL divergence near a target.

        η ← η·(1 + gain·clip(kl/target − 1, −0.2, 0.2)), a proportional controller.

        Args:
            kl: of the last step, nats per sequence.
            target: the KL to aim at, nats per sequence.
            gain: K_β of the controller.

        Raises:
            ValueError: where there is no KL penalty to adapt.

        Source: Ziegler et al., arXiv 1909.08593 §2.2 (adaptive KL).
        """
        if self.kl_coef is None:
            raise ValueError("RewardShaper.adapt: kl_coef is None, there is nothing to adapt")
        error = max(-0.2, min(0.2, kl / target - 1.0))
        self.kl_coef *= 1.0 + gain * error

    def state_dict(self) -> dict[str, Any]:
        """Return the running moments and the current η, as plain numbers."""
        return {"kl_coef": self.kl_coef, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state` that `state_dict` returned."""
        self.kl_coef = state["kl_coef"]
        self.moments.load_state_dict(state["moments"])


def add_at_last(
    rewards: Float[Tensor, "B T"], scores: Float[Tensor, " B"], mask: Tensor
) -> Float[Tensor, "B T"]:
    """Add ``scores [B]`` at the last entry of each row's mask; empty rows get none.

    Source: P1 eq. 19: the score is given at the last token of the response.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return rewards + torch.where(positions == last, scores[:, None], torch.zeros_like(rewards))
