"""The PPO-max loss, and what it knows of each token."""

from mossrlhf.loss.ppo_max import PPOMaxLoss
from mossrlhf.loss.rows import TokenRows
from mossrlhf.loss.separable import coupling

__all__ = ["PPOMaxLoss", "TokenRows", "coupling"]
