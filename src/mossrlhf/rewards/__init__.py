"""What is to be maximized: reward models, classifiers and functions behind one door."""

from mossrlhf.rewards.model import Classifier, ModelReward, as_reward_model, as_scorer
from mossrlhf.rewards.patient import PatientReward
from mossrlhf.rewards.together import (
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
