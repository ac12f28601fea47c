"""Dr. GRPO: GRPO without its two biases, the division by std R and that by the response's length.

J = E[1/G Σ_i 1/L Σ_t min(ρ_t Â_i, clip(ρ_t, 1 ± ε) Â_i)], with Â_i = R_i − mean R and L a constant:
1/|o_i| favors short right answers and long wrong ones, 1/std R questions that are nearly always or
never answered. No KL term. Run it: ``python examples/algorithms/dr_grpo.py``.

Source: Liu et al., arXiv 2503.20783, §3.2 and the listing of its appendix A.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import toy
from torch import Tensor

from mossrlhf import GroupRelative, PPOMaxLoss, RewardShaper, Rollout, TrainerConfig

GROUP = 8


@dataclass(frozen=True, kw_only=True)
class ConstantLength(PPOMaxLoss):
    """Σ over a response's tokens, divided by the constant `length`, in tokens."""

    length: int = 32

    def prepare(
        self, minibatch: Rollout, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Rollout:
        """Turn Σ/tokens into Σ/(responses · length): the surrogate is linear in the advantage."""
        minibatch = super().prepare(minibatch, reduce)
        weights = minibatch.token_weights
        tokens, responses = reduce(torch.stack([weights.sum(), weights.new_tensor(len(weights))]))
        scale = tokens / (responses * self.length)
        return replace(minibatch, advantages=minibatch.advantages * scale)


def parts(**options: Any) -> dict[str, Any]:
    return dict(
        critic=False,
        shaper=RewardShaper(kl_coef=None),
        advantage=GroupRelative(group_size=GROUP, scale=False),
        loss=ConstantLength(policy_clip=0.2),
        args=TrainerConfig(samples_per_prompt=GROUP, **options),
    )


TOY = dict(parts=parts)

if __name__ == "__main__":
    toy.main(**TOY)
