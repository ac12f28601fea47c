"""REINFORCE++: PPO's clipped surrogate without a critic, with whitened advantages.

A_t = r(y) − β Σ_{i≥t} log(π_old/π_ref)_i, then (A − mean A)/std A over all tokens of the rollout;
scores are normalized and clipped as in PPO-max, with one response per prompt. Run it:
``python examples/algorithms/reinforce_plus_plus.py``.

Source: Hu et al., arXiv 2501.03262, §3 (token-level KL penalty, clip, normalization of rewards and
advantages).
"""

from typing import Any

import toy

from mossrlhf import PPOMaxLoss, ReinforcePlusPlus, RewardShaper, TrainerConfig


def parts(**options: Any) -> dict[str, Any]:
    return dict(
        critic=False,
        shaper=RewardShaper(kl_coef=0.01, normalize=True, clip=5.0),
        advantage=ReinforcePlusPlus(gamma=1.0),
        loss=PPOMaxLoss(policy_clip=0.2),
        args=TrainerConfig(**options),
    )


TOY = dict(parts=parts)

if __name__ == "__main__":
    toy.main(**TOY)
