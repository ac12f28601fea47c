"""The trained modules: a value head, a reward model that is also the critic, and their union."""

from mossrlhf.models.actor_critic import ActorCritic
from mossrlhf.models.classifiers import load_classifier
from mossrlhf.models.reward_model import RewardModel, ValueHead
from mossrlhf.models.scoring import (
    IGNORED_LABEL,
    language_model_loss,
    policy_loss,
    policy_stats,
)
from mossrlhf.models.token_path import TokenPath, announce, logit_scaling, token_path, whole_logits

__all__ = [
    "IGNORED_LABEL",
    "ActorCritic",
    "RewardModel",
    "TokenPath",
    "ValueHead",
    "announce",
    "language_model_loss",
    "load_classifier",
    "logit_scaling",
    "policy_loss",
    "policy_stats",
    "token_path",
    "whole_logits",
]
