"""The trained modules: a value head, a reward model that is also the critic, and their union."""

from mossrlhf.models.actor_critic import ActorCritic
from mossrlhf.models.adapters import (
    add_adapters,
    is_adapted,
    load_adapters,
    merged_state_dict,
    save_adapters,
)
from mossrlhf.models.classifiers import load_classifier
from mossrlhf.models.reward_model import SCORE_MOMENTS, RewardModel, ValueHead
from mossrlhf.models.scoring import (
    IGNORED_LABEL,
    language_model_loss,
    policy_loss,
    policy_stats,
)
from mossrlhf.models.token_path import TokenPath, announce, logit_scaling, token_path, whole_logits

__all__ = [
    "IGNORED_LABEL",
    "SCORE_MOMENTS",
    "ActorCritic",
    "RewardModel",
    "TokenPath",
    "ValueHead",
    "add_adapters",
    "announce",
    "is_adapted",
    "language_model_loss",
    "load_adapters",
    "load_classifier",
    "logit_scaling",
    "merged_state_dict",
    "policy_loss",
    "policy_stats",
    "save_adapters",
    "token_path",
    "whole_logits",
]
