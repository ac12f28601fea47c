"""RLOO: REINFORCE on whole responses, minus the mean reward of the *other* ones; no critic.

∇J = E[1/k Σ_i (R(y_i) − 1/(k − 1) Σ_{j≠i} R(y_j)) ∇ log π(y_i|x)], with the KL penalty in
R(y) = r(y) − β log(π(y|x)/π_ref(y|x)): no ratio, no clip, and one optimizer step per rollout, so
that the policy that sampled the responses is the one that is updated. Run it:
``python examples/algorithms/rloo.py``.

Source: Ahmadian et al., arXiv 2402.14740, §3.2 (RLOO) and eq. 3 (R).
"""

from dataclasses import replace
from typing import Any

import toy
from dr_grpo import ConstantLength
from torch import Tensor

from mossrlhf import LeaveOneOut, RewardShaper, TrainerConfig

GROUP = 4


class Reinforce(ConstantLength):
    """−A log π(y|x): summed over a response's tokens (`length` 1), averaged over responses."""

    def policy_loss(self, logprob: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
        """Return −A log π of each token, ``[N]``."""
        return -advantage * logprob


def parts(**options: Any) -> dict[str, Any]:
    args = TrainerConfig(samples_per_prompt=GROUP, **options)
    return dict(
        critic=False,
        shaper=RewardShaper(kl_coef=0.03),
        advantage=LeaveOneOut(group_size=GROUP),
        loss=Reinforce(length=1),
        args=replace(args, minibatch_size=args.rollout_size),
    )


TOY = dict(parts=parts)

if __name__ == "__main__":
    toy.main(**TOY)
