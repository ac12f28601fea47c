"""Refusing what `plan` cannot make anything of, by the argument's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from mossrlhf.config import TrainerConfig
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.models import ValueHead
from mossrlhf.options import suggest
from mossrlhf.planning.spread import SHARDINGS
from mossrlhf.rewards import ModelReward

_MODELS = (nn.Module, str, Path, PreTrainedConfig)

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "args": ((TrainerConfig,), "a TrainerConfig"),
    "generation_config": ((GenerationConfig,), "a transformers GenerationConfig"),
    "loss": ((PPOMaxLoss,), "a PPOMaxLoss"),
    "critic": (
        (*_MODELS, PeftConfig, ValueHead, bool),
        "a RewardModel, a classifier, its folder, hub name or config, a PeftConfig, a ValueHead, "
        "or False for none",
    ),
    "ref_model": (_MODELS, "a causal language model, its folder, hub name or config"),
    "peft_config": ((PeftConfig,), "a peft.PeftConfig, such as LoraConfig(...)"),
    "dtype": ((torch.dtype,), "a torch.dtype, such as torch.bfloat16"),
}
"""What each argument may be; None always."""

_WORDS: dict[str, tuple[str | None, ...]] = {
    "sharding": SHARDINGS,
    "frozen": ("whole", "sharded", "offloaded", None),
    "device": ("cuda", "cpu"),
}


def require_plannable(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `plan` that are of no use, each by its name.

    Args:
        given: by name, the model aside.

    Raises:
        TypeError: where one is of another kind.
        ValueError: where a number or a word is out of range.

    Source: ours.
    """
    for name, (kinds, expected) in _KINDS.items():
        if given[name] is not None and not isinstance(given[name], kinds):
            raise TypeError(f"{name}: got {given[name]!r:.60}, expected {expected}")
    sampler = given["sampler"]
    if sampler is not None and not (callable(sampler) and hasattr(sampler, "max_new_tokens")):
        raise TypeError(
            f"sampler: got {sampler!r:.60}, expected an HFSampler, or another that is called as "
            "sampler(model, prompts) and has max_new_tokens"
        )
    _require_rewards(given["reward"])
    for name in ("prompt_tokens", "max_new_tokens", "processes"):
        value = given[name]
        if value is None and name != "processes":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected a whole number, at least 1")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name, among in _WORDS.items():
        if given[name] not in among:
            hint = suggest(str(given[name]), [word for word in among if word])
            listed = ", ".join(map(repr, among))
            raise ValueError(f"{name}: got {given[name]!r}, expected one of {listed}{hint}")


def _require_rewards(reward: Any) -> None:
    for one in reward if isinstance(reward, (list, tuple)) else [reward]:
        one = one[0] if isinstance(one, tuple) and one else one
        known = isinstance(one, (*_MODELS, ModelReward, PeftConfig))
        if one is not None and not known and not callable(one):
            raise TypeError(
                f"reward: got {one!r:.60}, expected a reward function, a reward model, its folder, "
                "hub name or config, a PeftConfig, or a list of these, with or without weights"
            )


def where_frozen(frozen: str | None, sharding: str | None, args: TrainerConfig) -> str:
    """Return where reference and reward models are, which follows from the rest, as in `Trainer`.

    Args:
        frozen: what was asked for; None for whatever follows.
        sharding: one of `SHARDINGS`.
        args: with ``offload_frozen``.

    Returns:
        "sharded" under FSDP2 and ZeRO-3, else "offloaded" or "whole".

    Raises:
        ValueError: where something else was asked for than follows.

    Source: `mossrlhf.distributed.offload.settle`.
    """
    if sharding in ("fsdp", "zero3"):
        follows, why = "sharded", f"under sharding={sharding!r} Trainer shards them"
    elif args.offload_frozen:
        follows, why = "offloaded", "TrainerConfig(offload_frozen=True) lets them wait on the CPU"
    else:
        follows, why = "whole", "TrainerConfig(offload_frozen=False) keeps them on the device"
    if frozen not in (None, follows):
        raise ValueError(
            f"frozen: got {frozen!r}, but {why}, so that it is {follows!r}; leave frozen out, or "
            "change offload_frozen or sharding"
        )
    return follows
