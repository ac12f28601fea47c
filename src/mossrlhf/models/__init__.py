"""The trained modules: a value head, a reward model that is also the critic, and their union."""

from mossrlhf.models.actor_critic import (
    IGNORED_LABEL,
    ActorCritic,
    language_model_loss,
    policy_stats,
)
from mossrlhf.models.classifiers import load_classifier
from mossrlhf.models.reward_model import RewardModel, ValueHead

__all__ = [
    "IGNORED_LABEL",
    "ActorCritic",
    "RewardModel",
    "ValueHead",
    "language_model_loss",
    "load_classifier",
    "policy_stats",
]
