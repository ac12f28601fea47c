"""What is to be maximized: reward models, classifiers and functions behind one door."""

from mossrlhf.rewards.model import ModelReward, as_reward_model
from mossrlhf.rewards.together import RESERVED, Reward, RewardFunction, RewardSet, reward_name

__all__ = [
    "RESERVED",
    "ModelReward",
    "Reward",
    "RewardFunction",
    "RewardSet",
    "as_reward_model",
    "reward_name",
]
