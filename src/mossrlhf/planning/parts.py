"""The four roles as `Trainer` would make them, on the meta device: nothing is read but configs."""

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from mossrlhf.loading.policy import at_least_float32, has_effect, load_policy
from mossrlhf.models import (
    RewardModel,
    SharedRewardModel,
    ValueHead,
    adapter_folder,
    share_base,
)
from mossrlhf.models.lora import is_adapted, vocabulary_size
from mossrlhf.models.reward_model import classifier_class
from mossrlhf.planning.ledger import tensors_of
from mossrlhf.planning.starting import starts_changed
from mossrlhf.rewards import ModelReward, as_reward_model, as_scorer

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(ModelReward)}

REWARD_BATCH: int = _DEFAULTS["batch_size"]
"""Sequences a reward model scores at a time, where nothing else is said."""


@dataclass
class Parts:
    """The models of a run, without weights.

    Args:
        policy: adapters included.
        critic: None where there is none.
        reference: None where it is the policy with its adapters off.
        rewards: reward models with the sequences each scores at a time; functions are left out.

    Source: ours.
    """

    policy: nn.Module
    critic: RewardModel | None
    reference: nn.Module | None
    rewards: list[tuple[nn.Module, int]]

    def modules(self) -> list[nn.Module]:
        """Return all of them."""
        found = [self.policy, self.critic, self.reference, *(m for m, _ in self.rewards)]
        return [module for module in found if module is not None]


class Maker:
    """Makes models without weights from whatever `Trainer` takes.

    Args:
        dtype: of weights loaded by name; None for what the config says.

    Source: ours.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def parts(
        self, model: Any, reward: Any, critic: Any, ref_model: Any, peft_config: Any
    ) -> Parts:
        """Make all roles.

        Args:
            model: as for `Trainer`; here and below a configuration will do for a model.
            reward: as for `Trainer`.
            critic: as for `Trainer`.
            ref_model: as for `Trainer`.
            peft_config: as for `Trainer`.
        """
        with torch.device("meta"):
            return self._parts(model, reward, critic, ref_model, peft_config)

    def _parts(
        self, model: Any, reward: Any, critic: Any, ref_model: Any, peft_config: Any
    ) -> Parts:
        bare = self.language_model(model)
        if is_adapted(bare) and peft_config is not None:
            bare = bare.merge_and_unload()
        policy = load_policy(bare, peft_config)
        rewards = [self._reward(one, policy) for one in _listed(reward)]
        found = [one for one in rewards if one is not None]
        # Before the critic, which may put an adapter on the policy that is not copied.
        reference = self._reference(ref_model, model, policy, peft_config)
        made = self._critic(critic, model, policy, [m for m, _ in found])
        return Parts(policy, made, reference, found)

    def language_model(self, model: Any) -> Any:
        """Make a causal language model of a name, a config or a model with weights.

        Args:
            model: as of `Trainer`, or a ``PreTrainedConfig``.

        Raises:
            TypeError: where it is neither.
        """
        if isinstance(model, nn.Module):
            return without_weights(model)
        if isinstance(model, (str, Path)):
            if find_adapter_config_file(str(model)) is not None:
                from peft import get_peft_model

                adapter = PeftConfig.from_pretrained(str(model))
                base = self.language_model(str(adapter.base_model_name_or_path))
                adapter.inference_mode = False
                return get_peft_model(base, adapter)
            model = AutoConfig.from_pretrained(str(model))
        if not isinstance(model, PreTrainedConfig):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a causal language model, its folder "
                "or hub name, or its config"
            )
        dtype = self.dtype or _dtype_of(model)
        made: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(model), dtype=dtype)
        return made.eval()

    def _classifier(self, given: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        if isinstance(given, nn.Module):
            return without_weights(given)
        if isinstance(given, (str, Path)):
            if (folder := adapter_folder(given)) is not None:
                given = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
            given = AutoConfig.from_pretrained(str(given))
        config = copy.deepcopy(given)
        config.num_labels = 1
        made: nn.Module = classifier_class(config)(config).to(dtype)
        return made.eval()

    def _reward(self, reward: Any, policy: nn.Module) -> tuple[nn.Module, int] | None:
        size = REWARD_BATCH
        if isinstance(reward, ModelReward):
            reward, size = reward.model, reward.batch_size
        if (adapter := _adapter(reward)) is not None and is_adapted(policy):
            shared = share_base(policy, adapter, "reward_model")
            return shared.requires_grad_(False), size
        if isinstance(reward, (nn.Module, str, Path, PreTrainedConfig)):
            scorer = as_scorer(self._classifier(reward))
            return scorer.eval().requires_grad_(False), size
        return None  # a function

    def _critic(
        self, critic: Any, model: Any, policy: nn.Module, rewards: list[nn.Module]
    ) -> RewardModel | None:
        if critic is False:
            return None
        if isinstance(critic, ValueHead):
            backbone: Any = unwrap_peft(policy).base_model
            return SharedRewardModel(backbone, without_weights(critic))
        adapter = _adapter(critic)
        first = rewards[0] if rewards else None
        if critic in (None, True) and isinstance(first, SharedRewardModel):
            configs: Any = policy.peft_config
            adapter = configs[first.adapter]
        if adapter is not None and (is_adapted(policy) or isinstance(critic, PeftConfig)):
            return share_base(policy, adapter, "critic")
        if critic in (None, True):
            alike = [r for r in rewards if isinstance(r, RewardModel)]
            alike = [r for r in alike if vocabulary_size(r) == vocabulary_size(policy)]
            if alike:
                made = copy.deepcopy(alike[0])
            else:
                base = self.language_model(model)
                base = base.merge_and_unload() if is_adapted(base) else base
                made = RewardModel(base.base_model)
        else:
            made = as_reward_model(self._classifier(critic), "critic")
        made.requires_grad_(True)
        for parameter in made.parameters():
            parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
        return made

    def _reference(
        self, ref_model: Any, model: Any, policy: nn.Module, peft_config: Any
    ) -> nn.Module | None:
        if ref_model is not None:
            return self.language_model(ref_model).eval().requires_grad_(False)
        if is_adapted(policy):
            fresh = peft_config is not None
            if not starts_changed(policy, peft_config) if fresh else _rests(model):
                return None
        return copy.deepcopy(policy).eval().requires_grad_(False)


def without_weights(module: nn.Module) -> Any:
    """Copy a module, with tensors without memory in the place of its own.

    Args:
        module: left as it is, and its weights are not copied.

    Source: ours.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(module).values():
        empty = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
        )
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


def _rests(model: Any) -> bool:
    """Whether the adapters a model came with change nothing yet; those in a folder do."""
    if not isinstance(model, nn.Module) or any(p.is_meta for p in model.parameters()):
        return False
    with torch.device(next(model.parameters()).device):
        return not has_effect(model)


def _adapter(given: Any) -> PeftConfig | None:
    """The configuration of an adapter that is to share the policy's base."""
    if isinstance(given, PeftConfig):
        return copy.deepcopy(given)
    if isinstance(given, (str, Path)) and (folder := adapter_folder(given)) is not None:
        config = PeftConfig.from_pretrained(str(folder))
        config.modules_to_save, config.inference_mode = None, False
        return config
    return None


def _dtype_of(config: PreTrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))


def _listed(reward: Any) -> list[Any]:
    listed = reward if isinstance(reward, (list, tuple)) else [reward]
    return [one[0] if isinstance(one, tuple) else one for one in listed]
