"""Reward-model training on preference pairs."""

from mossrlhf.reward_trainer.pairs import PairModel, PairScores, RankingLoss
from mossrlhf.reward_trainer.report import RewardReport
from mossrlhf.reward_trainer.trainer import RewardTrainer

__all__ = ["PairModel", "PairScores", "RankingLoss", "RewardReport", "RewardTrainer"]
