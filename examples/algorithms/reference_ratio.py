"""PPO-max with importance sampling fixed to the reference: an unlimited experience buffer.

ρ_t = π(a_t|s_t)/π_ref(a_t|s_t) in place of π/π_old: as if all responses had been sampled by the
reference. The clip then bounds the distance from the reference for each token, the KL penalty that
for the whole response. A token that the policy has made ρ times as likely is pushed down ρ times
as hard, and not pushed up beyond the clip. So it takes smaller steps than the others here. Run it:
``python examples/algorithms/reference_ratio.py``.

Source: P1 §5.3 and its figure 7: with the KL penalty, training is more stable and ends lower.
"""

from typing import Any

import toy

from mossrlhf import PPOMaxLoss, presets


def parts(**options: Any) -> dict[str, Any]:
    loss = PPOMaxLoss(policy_clip=0.2, value_clip=0.2, reference_ratio=True)
    return presets.ppo_max(critic_pretrain_steps=5, loss=loss, **options)


TOY = dict(parts=parts, learning_rate=5e-4)

if __name__ == "__main__":
    toy.main(**TOY)
