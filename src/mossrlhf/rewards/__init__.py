"""Rewards: reward models, classifiers and functions, called in the same way."""

from mossrlhf.rewards.model_reward import Classifier, ModelReward, as_reward_model, as_scorer
from mossrlhf.rewards.retry import PatientReward
from mossrlhf.rewards.reward_set import (
    RESERVED,
    Reward,
    RewardFunction,
    RewardSet,
    reward_name,
    reward_pairs,
)

__all__ = [
    "RESERVED",
    "Classifier",
    "ModelReward",
    "PatientReward",
    "Reward",
    "RewardFunction",
    "RewardSet",
    "as_reward_model",
    "as_scorer",
    "reward_name",
    "reward_pairs",
]
