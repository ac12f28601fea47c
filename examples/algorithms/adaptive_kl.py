"""PPO with an adaptive KL controller: η follows the divergence instead of being chosen.

e = clip(KL/target − 1, −0.2, 0.2), η ← η (1 + K e) after every iteration: what is chosen is how far
the policy may go, in nats per sequence. Run it: ``python examples/algorithms/adaptive_kl.py``.

Source: Ziegler et al., arXiv 1909.08593, §2.2; there K = 0.1.
"""

from typing import Any

import toy

from mossrlhf import Rollout, Trainer, presets


class AdaptiveKL(Trainer):
    """PPO-max whose η is moved by `RewardShaper.adapt`; checkpoints keep it."""

    target = 6.0  # nats per sequence
    gain = 0.5  # K; runs of a few dozen iterations take larger steps than Ziegler's

    def update(self, rollout: Rollout, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Learn, then move η by the rollout's KL; the η it was shaped with is among the metrics."""
        metrics = super().update(rollout, *args, **kwargs)
        metrics["kl/coef"] = self.shaper.kl_coef
        self.shaper.adapt(metrics["kl/ref_per_sequence"], self.target, self.gain)
        return metrics


def parts(**options: Any) -> dict[str, Any]:
    return presets.ppo_max(critic_pretrain_steps=5, **options)


TOY = dict(parts=parts, kind=AdaptiveKL)

if __name__ == "__main__":
    toy.main(**TOY)
