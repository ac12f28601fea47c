"""GRPO: a response's advantage is its reward relative to its prompt's other ones; no critic.

J = E[1/G Σ_i 1/|o_i| Σ_t min(ρ_t Â_i, clip(ρ_t, 1 ± ε) Â_i) − β KL(π‖π_ref)], with
Â_i = (R_i − mean R)/std R: each response has the same weight, however long, and the KL divergence
is in the loss. The paper uses k3 (eq. 4), whose gradient is that of KL(π_ref‖π); this library uses
k2, whose gradient is that of KL(π‖π_ref). Run it: ``python examples/algorithms/grpo.py``.

Source: DeepSeekMath, arXiv 2402.03300, eqs. 3 and 4, §4.1.2 (outcome supervision).
"""

from dataclasses import replace
from typing import Any

import toy

from mossrlhf import GroupRelative, PPOMaxLoss, RewardShaper, Rollout, Trainer, TrainerConfig

GROUP = 8


class GRPO(Trainer):
    """A token of a response of n tokens weighs 1/n in the loss."""

    def estimate(self, rollout: Rollout) -> Rollout:
        """Set the weights ``[B, T]`` beside the advantages."""
        lengths = rollout.mask.sum(dim=1, keepdim=True).clamp(min=1)
        return replace(super().estimate(rollout), weights=rollout.mask / lengths)


def parts(**options: Any) -> dict[str, Any]:
    return dict(
        critic=False,
        shaper=RewardShaper(kl_coef=None),
        advantage=GroupRelative(group_size=GROUP),
        loss=PPOMaxLoss(policy_clip=0.2, kl_loss_coef=0.04),
        args=TrainerConfig(samples_per_prompt=GROUP, **options),
    )


TOY = dict(parts=parts, kind=GRPO)

if __name__ == "__main__":
    toy.main(**TOY)
