"""One base model for several roles, each with an adapter that is active while the role runs."""

import copy
import itertools
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from mossrlhf.models.lora import (
    active_adapter,
    adapter_parameters,
    checksums,
    forget_quantization,
    is_peft_model,
    load_adapters,
    merged_modules,
    rewriting_initialization,
    save_adapters,
    trained_base_parameters,
    unwrap_peft,
)
from mossrlhf.models.reward_model import RewardModel, ValueHead


class SharedRewardModel(RewardModel):
    """Score with a backbone that another role uses too, through this model's own adapter.

    Freezing and saving concern the adapter and the head alone.

    Args:
        backbone: the bare transformer, shared.
        head: its own value head.
        adapter: its own adapter in the backbone; None to read the policy's hidden states, with
            the head alone.
    """

    def __init__(
        self, backbone: PreTrainedModel, head: ValueHead | None = None, adapter: str | None = None
    ) -> None:
        super().__init__(backbone, head)
        self.adapter = adapter

    def token_values(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Shaped[Tensor, "B L"],
        right_padded: bool | None = None,
    ) -> Float[Tensor, "B L"]:
        """Return what `RewardModel.token_values` does, ``[B, L]``, with its own adapter active."""
        with self.activated():
            return super().token_values(input_ids, attention_mask, right_padded)

    def activated(self) -> AbstractContextManager[None]:
        """Return a context in which this model's adapter is the backbone's active one."""
        return (
            nullcontext() if self.adapter is None else active_adapter(self.backbone, self.adapter)
        )

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that no other model shares, by name: adapter and head."""
        own = {} if self.adapter is None else adapter_parameters(self.backbone, self.adapter)
        return {**own, **{f"score.{n}": p for n, p in self.score.named_parameters()}}

    def requires_grad_(self, requires_grad: bool = True) -> "SharedRewardModel":
        """Train or freeze adapter and head, and nothing else."""
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(requires_grad)
        return self

    def save_pretrained(self, path: str | Path, *, scores: bool = True, **kwargs: Any) -> None:
        """Write adapter and head as PEFT does for a sequence classifier, without the base model.

        `merged` returns a model to be saved whole; one without an adapter is written whole here.
        """
        if self.adapter is None:
            super().save_pretrained(path, scores=scores, **kwargs)
        else:
            save_adapters(self, Path(path), self.adapter)

    def merged(self) -> RewardModel:
        """Return a separate model: a copy of the base model with this one's adapter merged."""
        alone = RewardModel(copy.deepcopy(self.backbone), copy.deepcopy(self.score))
        with active_adapter(alone.backbone, self.adapter) if self.adapter else nullcontext():
            for name, layer in merged_modules(alone.backbone).items():
                alone.backbone.set_submodule(name, layer)
        forget_quantization(alone.backbone)
        return alone.requires_grad_(True)


def share_base(
    policy: nn.Module,
    peft_config: Any,
    name: str,
    head: ValueHead | None = None,
    *,
    seed: int = 0,
) -> SharedRewardModel:
    """Add a further adapter to the policy's base model, with a head above it.

    Args:
        policy: a ``peft.PeftModel`` around a causal language model.
        peft_config: of the adapter, of the same kind as the policy's.
        name: of the adapter; a number is appended where another has it.
        head: its value head; None for one that returns 0 everywhere.
        seed: of the adapter's first weights, whatever was sampled before.

    Raises:
        ValueError: where the policy has no adapters, its base is trained or would be changed, or
            these adapters cannot be combined with the policy's.
    """
    _require_shareable(policy, peft_config, name)
    adapted: Any = policy
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    # Under a name that is taken, PEFT would replace the other adapter.
    adapter = next(free for free in names if free not in adapted.peft_config)
    known = dict(policy.named_parameters())
    flags = [(p, p.requires_grad) for p in known.values()]
    before = checksums(known)
    try:
        with torch.random.fork_rng(devices=[]):  # adapters are initialized on the CPU
            torch.default_generator.manual_seed(seed)
            adapted.add_adapter(adapter, copy.deepcopy(peft_config))
    except ValueError as error:
        raise ValueError(
            f"{name}: its adapter cannot stand beside the policy's ({error})"
        ) from error
    for parameter, flag in flags:
        parameter.requires_grad_(flag)  # PEFT trains the newest alone
    if (after := checksums(known)) != before:
        changed = [key for key in before if after[key] != before[key]]
        raise ValueError(
            f"{name}: putting its adapter on has changed the base it shares ({changed[0]}); load "
            "the policy again, and leave the adapter's initialization as it is"
        )
    backbone: Any = unwrap_peft(policy).base_model
    backbone.peft_config = adapted.peft_config  # PEFT looks here for what it is to write
    return SharedRewardModel(backbone, head, adapter).requires_grad_(True)


def _require_shareable(policy: nn.Module, peft_config: Any, name: str) -> None:
    if not is_peft_model(policy):
        raise ValueError(
            f"{name}: an adapter shares the policy's base, and the policy has no adapter: all "
            "of it is trained. Pass peft_config= for the policy too, or a whole model here"
        )
    if getattr(peft_config, "modules_to_save", None):
        raise ValueError(
            f"{name}: got modules_to_save={peft_config.modules_to_save}, which would be copies of "
            "whole modules; the head is trained anyway, leave it out"
        )
    if (found := rewriting_initialization(peft_config)) is not None:
        raise ValueError(
            f"{name}: got init_lora_weights={found!r}, which rewrites the base of the adapter, "
            "and with it the outputs of policy and reference; leave init_lora_weights as it is"
        )
    if trained := trained_base_parameters(policy):
        raise ValueError(
            f"{name}: an adapter shares the policy's base, and that is trained besides the "
            f"policy's own ({', '.join(trained[:3])}), so this one's outputs would change too. "
            "Pass peft_config= with bias='none' for the policy, or a whole model here"
        )


def load_shared(policy: nn.Module, folder: str | Path, name: str) -> SharedRewardModel:
    """Add a saved adapter to the policy's base model, with the head that was saved beside it.

    Args:
        policy: a ``peft.PeftModel`` around a causal language model.
        folder: as `RewardTrainer` or a checkpoint of `Trainer` writes it.
        name: of the adapter.

    Raises:
        ValueError: where it was trained on another base model, or weights are missing.
    """
    config = PeftConfig.from_pretrained(str(folder))
    config.modules_to_save, config.inference_mode = None, False
    model = share_base(policy, config, name)
    load_adapters(model, Path(folder), str(model.adapter))
    return model


def copy_shared(policy: nn.Module, other: SharedRewardModel, name: str) -> SharedRewardModel:
    """Add a copy of another role's adapter and head, under a name, to the base model they share.

    Source: P1 §5.3.1: the critic starts from the reward model.
    """
    config = policy.peft_config[other.adapter]  # type: ignore[index]
    model = share_base(policy, config, name, copy.deepcopy(other.score))
    own = adapter_parameters(policy, model.adapter)
    with torch.no_grad():
        for key, weight in adapter_parameters(policy, str(other.adapter)).items():
            own[key].copy_(weight)
    return model
