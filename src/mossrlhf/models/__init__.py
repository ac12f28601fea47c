"""The trained modules: a value head, a reward model that is also the critic, and their union."""

from mossrlhf.models.actor_critic import ActorCritic
from mossrlhf.models.adapters import (
    adapter_folder,
    add_adapters,
    is_adapted,
    is_over,
    load_adapters,
    merged_state_dict,
    save_adapters,
    weights_digest,
)
from mossrlhf.models.beneath import bare_module, rewriting_initialization, trained_beneath
from mossrlhf.models.classifiers import load_classifier
from mossrlhf.models.quantized import is_quantized, keep_differentiable
from mossrlhf.models.reward_model import SCORE_MOMENTS, RewardModel, ValueHead
from mossrlhf.models.scoring import (
    IGNORED_LABEL,
    language_model_loss,
    policy_loss,
    policy_stats,
)
from mossrlhf.models.shared import (
    SharedRewardModel,
    as_it_spoke,
    beside,
    load_shared,
    share_base,
    speaking_as,
)
from mossrlhf.models.token_path import TokenPath, announce, logit_scaling, token_path, whole_logits

__all__ = [
    "IGNORED_LABEL",
    "SCORE_MOMENTS",
    "ActorCritic",
    "RewardModel",
    "SharedRewardModel",
    "TokenPath",
    "ValueHead",
    "adapter_folder",
    "add_adapters",
    "announce",
    "as_it_spoke",
    "bare_module",
    "beside",
    "is_adapted",
    "is_over",
    "is_quantized",
    "keep_differentiable",
    "language_model_loss",
    "load_adapters",
    "load_classifier",
    "load_shared",
    "logit_scaling",
    "merged_state_dict",
    "policy_loss",
    "policy_stats",
    "rewriting_initialization",
    "save_adapters",
    "share_base",
    "speaking_as",
    "token_path",
    "trained_beneath",
    "weights_digest",
    "whole_logits",
]
