"""VC-PPO: critic warm-up, and a separate λ for the critic's targets.

A = GAE(γ, λ_policy = 0.95), R = GAE(γ, λ_critic = 1) + V: the policy keeps the small variance of
λ < 1, the critic is trained on the full return, without bias by its own errors. Otherwise PPO-max.
Run it: ``python examples/algorithms/vc_ppo.py``.

Source: Yuan et al., arXiv 2503.01491 (value pre-training and decoupled GAE).
"""

from typing import Any

import toy

from mossrlhf import AdvantageEstimator, presets


def parts(**options: Any) -> dict[str, Any]:
    advantage = AdvantageEstimator(gamma=1.0, lam=0.95, value_lam=1.0)
    return presets.ppo_max(critic_pretrain_steps=10, advantage=advantage, **options)


TOY = dict(parts=parts)

if __name__ == "__main__":
    toy.main(**TOY)
