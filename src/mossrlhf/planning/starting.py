"""Whether adapters change a policy before they are trained, asked of small layers."""

import copy
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

SIZE = 64
"""Features of a small layer."""

_ANYWHERE = (
    "layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters",
    "modules_to_save", "layer_replication", "trainable_token_indices",
)  # fmt: skip
"""Options that say where an adapter goes, which in a single layer is clear."""


def starts_changed(policy: nn.Module, peft_config: PeftConfig) -> bool:
    """Whether a new adapter changes what a policy says, as PiSSA and OLoRA do.

    The policy has no weights, so each kind of layer it has adapters on is made small, with weights
    and an adapter of the same configuration, and asked with the adapter on and off.

    Args:
        policy: without weights, the adapter put on.
        peft_config: of the adapter.

    Raises:
        ValueError: where it cannot be told.

    Source: ours; for `mossrlhf.loading.policy.has_effect`.
    """
    if peft_config.is_prompt_learning:
        return True
    adapted = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    kinds = {_kind(module.get_base_layer()) for module in adapted}
    with torch.device("cpu"):
        try:
            if not kinds:
                raise LookupError("it is in none of the layers")
            return any(_changes(kind, peft_config) for kind in sorted(kinds))
        except Exception as error:
            raise ValueError(
                f"peft_config: whether a new {type(peft_config).__name__} changes the policy, so "
                "that Trainer copies a whole reference, cannot be told without weights "
                f"({type(error).__name__}: {error!s:.200}); pass ref_model=, such as the model's "
                "config, to count one"
            ) from error


def _kind(layer: nn.Module) -> str:
    return next((k.__name__ for k in (nn.Embedding, Conv1D) if isinstance(layer, k)), "Linear")


@torch.no_grad()
def _changes(kind: str, peft_config: PeftConfig) -> bool:
    made = {"Embedding": nn.Embedding, "Conv1D": Conv1D, "Linear": nn.Linear}[kind]
    small = nn.Sequential()
    small.add_module("layer", made(SIZE, SIZE))
    config: Any = copy.deepcopy(peft_config)
    config.target_modules = ["layer"]
    for name in _ANYWHERE:
        if hasattr(config, name):
            setattr(config, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        if hasattr(config, name):
            setattr(config, name, {})
    if isinstance(rank := getattr(config, "r", None), int) and rank:
        config.r = min(rank, SIZE // 4)
    adapted: Any = inject_adapter_in_model(config, small).eval()
    ids = torch.arange(SIZE)
    asked = ids if kind == "Embedding" else torch.eye(SIZE)
    on = adapted(asked)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    return not torch.equal(on, adapted(asked))
