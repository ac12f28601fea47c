"""Composable PPO-max: the paper's algorithm as parts to assemble, swap and read.

Names are imported when first used, so that ``import mossrlhf`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mossrlhf._moved import MOVED, register
from mossrlhf.version import __version__

_HOMES = {
    "types": ("Advantages", "LossOutput", "Rollout", "TokenStats"),
    "models": ("ActorCritic", "RewardModel", "ValueHead", "policy_stats"),
    "rewards": ("ModelReward", "PatientReward", "RewardFunction", "RewardSet"),
    "reward_shaping": ("RewardShaper", "RollingReturnMoments", "RunningMoments"),
    "advantage": ("AdvantageEstimator", "GroupRelative", "LeaveOneOut", "ReinforcePlusPlus"),
    "loss": ("PPOMaxLoss",),
    "minibatches": ("RolloutBuffer", "micro_batches"),
    "sampling": ("ContinuousSampler", "HFSampler", "Sampler", "VLLMSampler"),
    "config": ("TrainerConfig",),
    "checkpoint.folders": ("last_checkpoint",),
    "planning": ("MemoryPlan", "plan"),
    "metrics": ("CollapseWarning", "CollapseWatch", "StillPolicyWarning", "StillWatch"),
    "trainer": ("Trainer",),
    "reward_modeling.trainer": ("RewardTrainer",),
    "reward_modeling.pairs": ("RankingLoss",),
    "reward_modeling.report": ("RewardReport",),
    "reward_modeling.scoring": ("score_responses",),
    "reward_modeling.preference_strength": (
        "AdaptiveMargin",
        "FlipLabels",
        "PreferenceStrength",
        "SmoothLabels",
    ),
    "sft_trainer": ("SFTTrainer",),
    "toyworld": ("ToyWorld",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
register()
_MODULES = ("data", "functional", "kernels", "presets", "toyworld")

__all__ = [
    "ActorCritic", "AdaptiveMargin", "AdvantageEstimator", "Advantages", "CollapseWarning",
    "CollapseWatch", "ContinuousSampler", "FlipLabels", "GroupRelative", "HFSampler",
    "LeaveOneOut", "LossOutput", "MemoryPlan", "ModelReward", "PPOMaxLoss", "PatientReward",
    "PreferenceStrength", "RankingLoss", "ReinforcePlusPlus", "RewardFunction", "RewardModel",
    "RewardReport", "RewardSet", "RewardShaper", "RewardTrainer", "RollingReturnMoments",
    "Rollout", "RolloutBuffer", "RunningMoments", "SFTTrainer", "Sampler", "SmoothLabels",
    "StillPolicyWarning", "StillWatch", "TokenStats", "ToyWorld", "Trainer", "TrainerConfig",
    "VLLMSampler", "ValueHead", "__version__", "data", "functional", "kernels",
    "last_checkpoint", "micro_batches", "plan", "policy_stats", "presets", "score_responses",
    "toyworld",
]  # fmt: skip

if TYPE_CHECKING:
    from mossrlhf import data, functional, kernels, presets, toyworld
    from mossrlhf.advantage import (
        AdvantageEstimator,
        GroupRelative,
        LeaveOneOut,
        ReinforcePlusPlus,
    )
    from mossrlhf.checkpoint.folders import last_checkpoint
    from mossrlhf.config import TrainerConfig
    from mossrlhf.loss import PPOMaxLoss
    from mossrlhf.metrics import CollapseWarning, CollapseWatch, StillPolicyWarning, StillWatch
    from mossrlhf.minibatches import RolloutBuffer, micro_batches
    from mossrlhf.models import ActorCritic, RewardModel, ValueHead, policy_stats
    from mossrlhf.planning import MemoryPlan, plan
    from mossrlhf.reward_modeling.pairs import RankingLoss
    from mossrlhf.reward_modeling.preference_strength import (
        AdaptiveMargin,
        FlipLabels,
        PreferenceStrength,
        SmoothLabels,
    )
    from mossrlhf.reward_modeling.report import RewardReport
    from mossrlhf.reward_modeling.scoring import score_responses
    from mossrlhf.reward_modeling.trainer import RewardTrainer
    from mossrlhf.reward_shaping import RewardShaper, RollingReturnMoments, RunningMoments
    from mossrlhf.rewards import ModelReward, PatientReward, RewardFunction, RewardSet
    from mossrlhf.sampling import ContinuousSampler, HFSampler, Sampler, VLLMSampler
    from mossrlhf.sft_trainer import SFTTrainer
    from mossrlhf.toyworld import ToyWorld
    from mossrlhf.trainer import Trainer
    from mossrlhf.types import Advantages, LossOutput, Rollout, TokenStats


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mossrlhf.{_HOME[name]}"), name)
    if name in _MODULES or name in MOVED:
        return import_module(f"mossrlhf.{name}")
    raise AttributeError(f"module 'mossrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
