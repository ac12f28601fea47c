"""The four models of PPO, made of whatever a user gives: objects, names or nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mossrlhf.config import TrainerConfig
from mossrlhf.models import RewardModel
from mossrlhf.rewards import ModelReward, as_reward_model


def load_policy(model: Any, peft_config: Any = None) -> nn.Module:
    """Make the policy ready to be trained: trained parameters are float32, adapters put on.

    Args:
        model: a causal language model, or a folder or hub name.
        peft_config: a ``peft.PeftConfig``; the base is then frozen. None trains all of it.

    Raises:
        TypeError: where `model` is neither.
        ValueError: where nothing of it is trainable.

    Source: P1 §3.2: the policy starts from the SFT model.
    """
    if isinstance(model, (str, Path)):
        model = AutoModelForCausalLM.from_pretrained(str(model))
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a causal language model, or the folder "
            "or hub name of one"
        )
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model: none of its parameters requires a gradient, so there is nothing to train; "
            "call model.requires_grad_(True), or pass peft_config="
        )
    for parameter in trained:
        # At 5e-7 a bfloat16 AdamW moves one weight in a hundred.
        parameter.data = parameter.data.to(_at_least_float32(parameter.dtype))
    return model


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def load_reference(ref_model: Any, policy: nn.Module) -> nn.Module | None:
    """Make the reference: what was given, else a frozen copy of the policy as it is now.

    Args:
        ref_model: a causal language model, a folder or hub name, or None.
        policy: as `load_policy` returns it.

    Returns:
        the reference; None where it is the policy itself with its adapters off.

    Source: P1 §3.2: the reference is the SFT model.
    """
    if ref_model is None:
        if is_adapted(policy):
            return None
        ref_model = copy.deepcopy(policy)
    elif ref_model is policy:
        ref_model = copy.deepcopy(policy)  # what is frozen must not be what is trained
    elif isinstance(ref_model, (str, Path)):
        ref_model = AutoModelForCausalLM.from_pretrained(str(ref_model))
    return ref_model.eval().requires_grad_(False)


def is_adapted(policy: nn.Module) -> bool:
    """Whether PEFT adapters sit around the model.

    Args:
        policy: any module.

    Source: ours.
    """
    from peft import PeftModel

    return isinstance(policy, PeftModel)


@contextmanager
def as_reference(reference: nn.Module | None, policy: nn.Module) -> Iterator[nn.Module]:
    """Lend the reference: the model itself, or the policy with its adapters off.

    Args:
        reference: as `load_reference` returns it.
        policy: the adapted policy.

    Source: ours.
    """
    if reference is not None:
        yield reference
    else:
        with policy.disable_adapter():  # type: ignore[operator]
            yield policy


def load_critic(
    critic: nn.Module | str | Path | bool | None, policy: nn.Module, rewards: list[RewardModel]
) -> RewardModel | None:
    """Make the critic: what was given, else a copy of the reward model, else of the policy.

    Args:
        critic: a `RewardModel`, a one-label classifier, a folder or hub name; False for no
            critic; None for a copy of the first reward model with the policy's vocabulary, else
            of the policy's backbone with a zero `ValueHead`.
        policy: the policy.
        rewards: reward models that read the policy's tokens.

    Raises:
        ValueError: where its vocabulary is not the policy's.

    Source: P1 §5.3.1: the critic starts from the reward model.
    """
    if critic is False:
        return None
    vocabulary = vocabulary_size(policy)
    if critic is None or critic is True:
        alike = [model for model in rewards if vocabulary_size(model) == vocabulary]
        if alike:
            made = RewardModel(copy.deepcopy(alike[0].backbone), copy.deepcopy(alike[0].score))
        else:
            base = policy.get_base_model() if is_adapted(policy) else policy  # type: ignore
            made = RewardModel.from_language_model(_without_adapters(base))
    elif isinstance(critic, (str, Path)):
        made = RewardModel.from_pretrained(critic)
    else:
        made = as_reward_model(critic)
        if any(made.score.weight is model.score.weight for model in rewards):
            made = copy.deepcopy(made)  # or the reward would be trained along
    if vocabulary_size(made) != vocabulary:
        raise ValueError(
            f"critic: its vocabulary has {vocabulary_size(made)} tokens, the policy's "
            f"{vocabulary}; it must read the policy's tokens. Resize its embeddings, or leave "
            "critic=None"
        )
    made.requires_grad_(True)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(_at_least_float32(parameter.dtype))
    return made


def _without_adapters(base: nn.Module) -> Any:
    copied = copy.deepcopy(base)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            get_base_layer = getattr(child, "get_base_layer", None)
            if get_base_layer is not None:
                setattr(module, name, get_base_layer())
    return copied


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of tokens a model embeds.

    Args:
        model: a transformers model or `RewardModel`.

    Source: ours.
    """
    backbone = model.backbone if isinstance(model, RewardModel) else model
    return int(backbone.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def load_reward(reward: Any, tokenizer: PreTrainedTokenizerBase, name: str = "") -> Any:
    """Load a reward model from its folder or hub name, with its tokenizer where it has another.

    Args:
        reward: a path or name is loaded; anything else is returned as it is, but a model with
            a vocabulary other than the policy's is refused.
        tokenizer: the policy's.
        name: what metrics call it; empty for "reward_model".

    Raises:
        ValueError: where a model cannot read the policy's tokens and has no tokenizer.

    Source: ours.
    """
    if isinstance(reward, (str, Path)):
        model = RewardModel.from_pretrained(reward)
        own = AutoTokenizer.from_pretrained(str(reward))
        other = None if own.get_vocab() == tokenizer.get_vocab() else own
        return ModelReward(model=model, tokenizer=other, name=name or "reward_model")
    if isinstance(reward, nn.Module):
        reward = ModelReward(model=reward, name=name or "reward_model")
    if isinstance(reward, ModelReward) and reward.tokenizer is None:
        size = vocabulary_size(reward.model)
        if size < len(tokenizer):
            raise ValueError(
                f"reward: its model knows {size} tokens, the policy's tokenizer {len(tokenizer)}; "
                "pass ModelReward(model=, tokenizer=) with its own tokenizer, and it is scored "
                "through text"
            )
    return reward


def load_tokenizer(model: nn.Module | str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, by its name.

    Args:
        model: a folder or hub name, or a model that remembers where it came from.

    Raises:
        ValueError: where it does not.

    Source: ours.
    """
    name = str(model) if isinstance(model, (str, Path)) else ""
    if not name:
        name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        raise ValueError(
            "processing_class: got None, and the model does not say where it came from; pass its "
            "tokenizer"
        )
    return AutoTokenizer.from_pretrained(name)


def make_accelerator(args: TrainerConfig) -> Accelerator:
    """Make the accelerator a config asks for; without `bf16` the launcher's choice holds.

    Args:
        args: precision, trackers, output directory.

    Source: ours.
    """
    return Accelerator(
        mixed_precision="bf16" if args.bf16 else None,
        log_with=list(args.report_to) or None,
        project_dir=args.output_dir,
        # Roles run in turn: the other's parameters take no part in a backward.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def policy_context(policy: nn.Module) -> int | None:
    """Return the most tokens the policy's positions reach, or None where it has no such bound.

    Args:
        policy: a transformers model.

    Source: ours.
    """
    config = policy.config.get_text_config()  # type: ignore[union-attr, operator]
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def prompt_budget(policy: nn.Module, args: TrainerConfig, max_new_tokens: int) -> int | None:
    """Return the most tokens a prompt may have, so that a response fits behind it.

    Args:
        policy: a transformers model.
        args: `max_prompt_length`.
        max_new_tokens: longest response, in tokens.

    Returns:
        tokens; None where neither the config nor the model sets a bound.

    Raises:
        ValueError: where prompt and response cannot both fit into the model's context.

    Source: C: at most 2048 tokens with the response.
    """
    limit = policy_context(policy)
    if limit is None:
        return args.max_prompt_length
    left = limit - max_new_tokens
    wanted = args.max_prompt_length
    if left < 1 or (wanted is not None and wanted > left):
        raise ValueError(
            f"max_prompt_length: {wanted} prompt tokens and max_new_tokens={max_new_tokens} do "
            f"not fit into the model's context of {limit}; lower one of them"
        )
    return wanted or left


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute a model's activations in the backward pass instead of keeping them.

    Args:
        model: a transformers model, with or without adapters.

    Source: ours.
    """
    # Adapters on a frozen base: without a gradient at the input there would be none at all.
    if not all(p.requires_grad for p in model.parameters()):
        model.enable_input_require_grads()  # type: ignore[operator]
    renamed = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20
    (renamed or model.gradient_checkpointing_enable)()  # type: ignore[operator]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to zero.

    Args:
        model: any module. Numbers called "…dropout…" count, as attention keeps its own.

    Source: ours; left on, ratios are noise from the first minibatch.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def count_parameters(module: nn.Module | None) -> str:
    """Say how large a model is, how much of it is trained, in which type and where.

    Args:
        module: any; None says so.

    Source: ours.
    """
    if module is None:
        return "none"
    parameters = list(module.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    name = type(module).__name__
    return f"{name}, {total:,} parameters, {trained:,} trained, {types}, {parameters[0].device}"
