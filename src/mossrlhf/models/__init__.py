"""The trained modules: a reward model that is also the critic, the policy's log-probabilities."""

from functools import partial
from typing import TYPE_CHECKING

from mossrlhf._moved import find_old
from mossrlhf.models.actor_critic import ActorCritic
from mossrlhf.models.lora import (
    active_adapter,
    adapter_folder,
    add_adapters,
    bare_module,
    checkpoint_contexts,
    is_adapted,
    is_quantized,
    keep_differentiable,
    load_adapters,
    merged_state_dict,
    rewriting_initialization,
    save_adapters,
    shares_base,
    trained_base_parameters,
    weights_digest,
)
from mossrlhf.models.reward_model import SCORE_MOMENTS, RewardModel, ValueHead, load_classifier
from mossrlhf.models.shared_base import SharedRewardModel, copy_shared, load_shared, share_base
from mossrlhf.models.token_logprobs import (
    IGNORED_LABEL,
    TokenPath,
    announce,
    full_logits,
    language_model_loss,
    logit_scaling,
    policy_loss,
    policy_stats,
    token_path,
)

__all__ = [
    "IGNORED_LABEL",
    "SCORE_MOMENTS",
    "ActorCritic",
    "RewardModel",
    "SharedRewardModel",
    "TokenPath",
    "ValueHead",
    "active_adapter",
    "adapter_folder",
    "add_adapters",
    "announce",
    "bare_module",
    "checkpoint_contexts",
    "copy_shared",
    "full_logits",
    "is_adapted",
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
    "shares_base",
    "token_path",
    "trained_base_parameters",
    "weights_digest",
]  # fmt: skip

if not TYPE_CHECKING:  # or every name would pass for one of the module's
    __getattr__ = partial(find_old, "models")
