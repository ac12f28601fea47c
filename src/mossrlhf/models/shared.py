"""Several roles on one base: each has an adapter of its own, and speaks by it when it is asked.

A role switches its adapter on for as long as it is asked, and what spoke before speaks again. No
`requires_grad` is touched, which PEFT's own switches do: in the midst of a step that would cost
the other role its gradient.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from mossrlhf.models.adapters import (
    adapter_layers,
    adapter_parameters,
    load_adapters,
    save_adapters,
)
from mossrlhf.models.beneath import checksums, merged_modules, require_resting, trained_beneath
from mossrlhf.models.quantized import forget_quantization
from mossrlhf.models.reward_model import RewardModel, ValueHead
from mossrlhf.options import inside


@contextmanager
def speaking_as(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Let a model speak by one of its adapters, or by none.

    Args:
        model: with adapters inside.
        adapter: by name; None for the base alone.

    Source: ours.
    """
    layers = adapter_layers(model)
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        # Of another role's tokens and whole modules PEFT would look for this adapter's.
        layer._disable_adapters = adapter is None or adapter not in _adapters_of(layer)
        if adapter is not None:
            layer._active_adapter = [adapter]
    try:
        yield
    finally:
        _put_back(before)


def _adapters_of(layer: Any) -> set[str]:
    names: set[str] = set(layer._get_available_adapters())
    return names


def _put_back(states: list[tuple[Any, Any, bool]]) -> None:
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def _in_state(states: list[tuple[Any, Any, bool]]) -> Iterator[None]:
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer, _, _ in states]
    _put_back(states)
    try:
        yield
    finally:
        _put_back(before)


def as_it_spoke(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a forward and its recomputation: the latter speaks as the former did.

    Args:
        model: with or without adapters.

    Source: ours; for ``context_fn`` of `torch.utils.checkpoint.checkpoint`, which recomputes in
        the backward, when another role may have the word.
    """
    layers = adapter_layers(model)
    states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    return nullcontext(), _in_state(states)


class SharedRewardModel(RewardModel):
    """A critic or reward model whose backbone is another role's as well.

    Moving, freezing and saving concern what is its own alone: adapter and head.

    Args:
        backbone: the bare transformer, shared.
        head: its own value head.
        adapter: its own adapter in the backbone; None where it hears what the policy says, and
            has but the head.

    Source: ours; one base for four roles.
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
        """Return the head's value at every position, as `RewardModel` does, by its own adapter.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.
            right_padded: whether it is known that all padding is on the right.

        Returns:
            ``[B, L]`` float32, in units of reward; meaningless on padding.
        """
        with self.speaking():
            return super().token_values(input_ids, attention_mask, right_padded)

    def speaking(self) -> AbstractContextManager[None]:
        """Return a context in which the backbone speaks by this model's adapter."""
        return nullcontext() if self.adapter is None else speaking_as(self.backbone, self.adapter)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are this model's alone, by name: adapter and head."""
        own = {} if self.adapter is None else adapter_parameters(self.backbone, self.adapter)
        return {**own, **{f"score.{n}": p for n, p in self.score.named_parameters()}}

    def requires_grad_(self, requires_grad: bool = True) -> "SharedRewardModel":
        """Train or freeze what is its own.

        Args:
            requires_grad: whether it is trained.
        """
        for parameter in self.own_parameters().values():
            parameter.requires_grad_(requires_grad)
        return self

    def save_pretrained(self, path: str | Path, *, scores: bool = True, **kwargs: Any) -> None:
        """Write adapter and head as PEFT does for a sequence classifier, the base not at all.

        `merged` makes a model of it that stands alone.

        Args:
            path: folder, made where absent.
            scores: of no concern here: who loads it decides what pads.
            kwargs: passed on where the model has no adapter of its own, and is written whole.
        """
        if self.adapter is None:
            super().save_pretrained(path, scores=scores, **kwargs)
        else:
            save_adapters(self, Path(path), self.adapter)

    def merged(self) -> RewardModel:
        """Return a model that stands alone: a copy of the base, this one's adapter merged in."""
        alone = RewardModel(copy.deepcopy(self.backbone), copy.deepcopy(self.score))
        with speaking_as(alone.backbone, self.adapter) if self.adapter else nullcontext():
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
    """Put a further adapter on the policy's base, with a head above it.

    Args:
        policy: a ``peft.PeftModel`` around a causal language model.
        peft_config: of the adapter, of the same kind as the policy's.
        name: of the adapter; a number is put behind it where another has it.
        head: above it; None for one that says 0 everywhere.
        seed: of the adapter's first weights, whatever was drawn before.

    Raises:
        ValueError: where the policy has no adapters, its base is trained or would be changed, or
            these cannot stand beside them.

    Source: ours.
    """
    from peft import PeftModel

    if not isinstance(policy, PeftModel):
        raise ValueError(
            f"{name}: an adapter shares the policy's base, and the policy has none of its own: all "
            "of it is trained. Pass peft_config= for the policy too, or a whole model here"
        )
    if getattr(peft_config, "modules_to_save", None):
        raise ValueError(
            f"{name}: got modules_to_save={peft_config.modules_to_save}, which would be copies of "
            "whole modules; the head is trained anyway, leave it out"
        )
    require_resting(peft_config, name)
    if trained := trained_beneath(policy):
        raise ValueError(
            f"{name}: an adapter shares the policy's base, and that is trained beneath the "
            f"policy's own ({', '.join(trained[:3])}), so what this says would move along. Pass "
            "peft_config= with bias='none' for the policy, or a whole model here"
        )
    adapter = _free_name(policy, name)
    known = dict(policy.named_parameters())
    flags = [(p, p.requires_grad) for p in known.values()]
    before = checksums(known)
    try:
        with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU
            torch.default_generator.manual_seed(seed)
            policy.add_adapter(adapter, copy.deepcopy(peft_config))
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
            "the policy anew, and leave the adapter's initialization as it is"
        )
    backbone: Any = inside(policy).base_model
    backbone.peft_config = policy.peft_config  # where PEFT looks for what it is to write
    return SharedRewardModel(backbone, head, adapter).requires_grad_(True)


def _free_name(policy: Any, name: str) -> str:
    """A name that no adapter of the policy has: PEFT would put the new one in its place."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(free for free in names if free not in policy.peft_config)


def load_shared(policy: nn.Module, folder: str | Path, name: str) -> SharedRewardModel:
    """Put a saved adapter on the policy's base, with the head that was saved beside it.

    Args:
        policy: a ``peft.PeftModel`` around a causal language model.
        folder: as `RewardTrainer` or a checkpoint of `Trainer` writes one.
        name: of the adapter.

    Raises:
        ValueError: where it was trained over another base, or weights are missing.

    Source: ours.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.modules_to_save, config.inference_mode = None, False
    model = share_base(policy, config, name)
    load_adapters(model, Path(folder), str(model.adapter))
    return model


def beside(policy: nn.Module, other: SharedRewardModel, name: str) -> SharedRewardModel:
    """Put a copy of another role's adapter and head on the policy's base.

    Args:
        policy: whose base `other` shares.
        other: has an adapter.
        name: of the copy.

    Source: P1 §5.3.1: the critic starts from the reward model.
    """
    config = policy.peft_config[other.adapter]  # type: ignore[index]
    head = copy.deepcopy(other.score)
    model = share_base(policy, config, name, head)
    own = adapter_parameters(policy, model.adapter)
    with torch.no_grad():
        for key, weight in adapter_parameters(policy, str(other.adapter)).items():
            own[key].copy_(weight)
    return model
