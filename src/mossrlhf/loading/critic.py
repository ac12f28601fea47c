"""Load the critic and the reward models from objects, folders, hub names or defaults."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from mossrlhf.distributed.sharding import is_sharded
from mossrlhf.loading.policy import at_least_float32, has_effect, name_argument, require_finite
from mossrlhf.models import (
    RewardModel,
    SharedRewardModel,
    ValueHead,
    adapter_folder,
    copy_shared,
    is_quantized,
    load_classifier,
    load_shared,
    share_base,
    shares_base,
)
from mossrlhf.models.backbone import evaluation_mode
from mossrlhf.models.lora import is_peft_model, unwrap_peft, vocabulary_size
from mossrlhf.rewards import ModelReward, as_reward_model, as_scorer


def load_critic(
    critic: Any, policy: nn.Module, rewards: list[RewardModel], *, seed: int = 0
) -> RewardModel | None:
    """Return the given critic, else a copy of the reward model, else of the policy.

    Source: P1 §5.3.1: the critic starts from the reward model.
    """
    if critic is False:
        return None
    vocabulary = vocabulary_size(policy)
    if (shared := _shared_critic(critic, policy, rewards, seed)) is not None:
        return shared
    if critic is None or critic is True:
        alike = [model for model in rewards if vocabulary_size(model) == vocabulary]
        if alike:
            made = RewardModel(copy.deepcopy(alike[0].backbone), copy.deepcopy(alike[0].score))
        else:
            made = RewardModel.from_language_model(_without_adapters(policy))
    elif isinstance(critic, (str, Path)):
        with name_argument("critic", critic, (OSError,)):
            made = RewardModel.from_pretrained(critic)
    else:
        made = as_reward_model(critic, "critic")
        if any(made.score.weight is model.score.weight for model in rewards):
            made = copy.deepcopy(made)  # otherwise the reward would be trained too
    require_finite(made, "critic")
    if made.score.bias is not None:
        made.require_layout("critic")
    if vocabulary_size(made) != vocabulary:
        raise ValueError(
            f"critic: its vocabulary has {vocabulary_size(made)} tokens, the policy's "
            f"{vocabulary}; it must read the policy's tokens. Resize its embeddings, or leave "
            "critic=None"
        )
    if any(is_quantized(module) for module in made.modules()):
        raise ValueError(
            "critic: its weights are quantized (to eight or four bits) and cannot be trained; put "
            "it on the policy's base as an adapter: critic=LoraConfig(...)"
        )
    made.requires_grad_(True)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
    return made


def _shared_critic(
    critic: Any, policy: nn.Module, rewards: list[RewardModel], seed: int
) -> SharedRewardModel | None:
    """Return a critic on the policy's base model; None if `critic` is of another kind."""
    if isinstance(critic, PeftConfig):
        return share_base(policy, critic, "critic", seed=seed + 1)  # weights unlike the policy's
    if isinstance(critic, ValueHead):
        backbone: Any = unwrap_peft(policy).base_model
        made = SharedRewardModel(backbone, critic)
        made.require_layout("critic")
        return made
    if isinstance(critic, (str, Path)) and (folder := adapter_folder(critic)) is not None:
        return load_shared(policy, folder, "critic") if shares_base(policy, folder) else None
    if critic in (None, True) and rewards and isinstance(rewards[0], SharedRewardModel):
        return copy_shared(policy, rewards[0], "critic")
    return None


def _without_adapters(policy: Any) -> Any:
    """Return a copy of the policy's base model, with adapters merged if they have an effect."""
    if is_peft_model(policy):
        if has_effect(policy) and hasattr(policy, "merge_and_unload"):
            return copy.deepcopy(policy).merge_and_unload()
        policy = policy.get_base_model()
    copied = copy.deepcopy(policy)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            get_base_layer = getattr(child, "get_base_layer", None)
            if get_base_layer is not None:
                setattr(module, name, get_base_layer())
    return copied


def load_reward(
    reward: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "",
    policy: nn.Module | None = None,
) -> Any:
    """Load a reward model, with its tokenizer if that is not the policy's."""
    name = name or "reward_model"
    folder = adapter_folder(reward) if isinstance(reward, (str, Path)) else None
    if folder is not None and policy is not None and shares_base(policy, folder):
        return ModelReward(model=load_shared(policy, folder, name), name=name)
    if isinstance(reward, (str, Path)):
        bare = folder is not None and not (folder / "tokenizer_config.json").is_file()
        with name_argument("reward", reward, (OSError,)):
            other = None if bare else _other_tokenizer(str(reward), tokenizer)
            model = load_classifier(reward)
        require_finite(model, "reward")
        return ModelReward(model=model, tokenizer=other, name=name)
    if isinstance(reward, nn.Module):
        scorer = as_scorer(reward)
        own = scorer if isinstance(scorer, RewardModel) else scorer.model
        other = _remembered_tokenizer(own.config, tokenizer)
        reward = ModelReward(model=scorer, tokenizer=other, name=name)
    if isinstance(reward, ModelReward):
        require_finite(reward.model, "reward")
    if isinstance(reward, ModelReward) and reward.tokenizer is None:
        size = vocabulary_size(reward.model)
        if size < len(tokenizer):
            raise ValueError(
                f"reward: its model has {size} tokens, the policy's tokenizer {len(tokenizer)}; "
                "pass ModelReward(model=, tokenizer=) with its own tokenizer, and it reads the "
                "decoded text"
            )
    return reward


def load_rewards(
    rewards: Sequence[tuple[Any, Any]],
    tokenizer: PreTrainedTokenizerBase,
    policy: nn.Module | None = None,
) -> list[tuple[Any, Any]]:
    """Load (reward, weight) pairs as `load_reward` does, each path or name under its own name."""
    loaded, named = [], 0
    for reward, weight in rewards:
        named += isinstance(reward, (str, Path))
        name = f"reward_model_{named}" if isinstance(reward, (str, Path)) and named > 1 else ""
        loaded.append((load_reward(reward, tokenizer, name, policy), weight))
    return loaded


@contextmanager
def lent_base(policy: Any) -> Iterator[nn.Module | None]:
    """Yield the policy, for rewards to add adapters to, and delete those adapters after the block.

    Yields None if the policy has no adapters, or is sharded and cannot get more.
    """
    if not is_peft_model(policy) or is_sharded(policy):
        yield None
        return
    before = set(policy.peft_config)
    try:
        with evaluation_mode(policy):
            yield policy
    finally:
        flags = [(p, p.requires_grad) for p in policy.parameters()]
        for name in set(policy.peft_config) - before:
            policy.delete_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _remembered_tokenizer(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model's `name_or_path`; None if it is the policy's or missing."""
    if not config.name_or_path:
        return None
    try:
        return _other_tokenizer(config.name_or_path, tokenizer)
    except (OSError, ValueError):
        return None  # saved without one, or deleted: assume the policy's tokenizer


def _other_tokenizer(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    own = AutoTokenizer.from_pretrained(name)
    return None if own.get_vocab() == tokenizer.get_vocab() else own
