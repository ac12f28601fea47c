"""PPO with an adaptive KL controller, which adjusts η towards a target KL.

e = clip(KL/target − 1, −0.2, 0.2), η ← η (1 + K e) after every iteration, with a target in nats per
sequence. Run it: ``python examples/algorithms/adaptive_kl.py``.

Source: Ziegler et al., arXiv 1909.08593, §2.2; there K = 0.1.
"""

from typing import Any

import toy

from mossrlhf import Rollout, Trainer, presets


class AdaptiveKL(Trainer):
    """PPO-max with `RewardShaper.adapt` after each iteration; checkpoints save η."""

    target = 6.0  # nats per sequence
    gain = 0.5  # K; runs of a few dozen iterations take larger steps than Ziegler's

    def update(self, rollout: Rollout, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Update, then adapt η to the rollout's KL; log the η that shaped the rollout."""
        metrics = super().update(rollout, *args, **kwargs)
        metrics["kl/coef"] = self.shaper.kl_coef
        self.shaper.adapt(metrics["kl/ref_per_sequence"], self.target, self.gain)
        return metrics


def parts(**options: Any) -> dict[str, Any]:
    return presets.ppo_max(critic_pretrain_steps=5, **options)


TOY = dict(parts=parts, kind=AdaptiveKL)

if __name__ == "__main__":
    toy.main(**TOY)
