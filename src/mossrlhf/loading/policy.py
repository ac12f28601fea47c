"""Load the policy and its reference model; set dropout and activation checkpointing."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from mossrlhf.config import TrainerConfig
from mossrlhf.distributed.sharding import count
from mossrlhf.models import (
    ActorCritic,
    RewardModel,
    active_adapter,
    checkpoint_contexts,
    is_adapted,
    keep_differentiable,
    rewriting_initialization,
    trained_base_parameters,
)
from mossrlhf.models.backbone import evaluation_mode
from mossrlhf.models.lora import is_peft_model, unwrap_peft, vocabulary_size


@contextmanager
def name_argument(
    argument: str, name: Any, errors: tuple[type[Exception], ...] = (OSError, ValueError)
) -> Iterator[None]:
    """Name the argument, and the folder or hub name, in loading errors of the block."""
    caught: tuple[type[Exception], ...] = (*errors, SafetensorError)
    try:
        yield
    except caught as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{argument}: {str(name)!r} cannot be loaded ({type(error).__name__}: {error!s:.300}); "
            "expected a folder or hub name with all files that save_pretrained wrote"
        ) from error


def require_finite(model: nn.Module, argument: str) -> None:
    """Refuse a model with a weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        numbers = parameter.is_floating_point() and not parameter.is_meta
        if numbers and not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(
                f"{argument}: its parameter {name!r} is not finite; the training it comes from has "
                "diverged, or the file is damaged. Load an earlier one"
            )


def load_policy(model: Any, peft_config: Any = None, *, seed: int = 0) -> nn.Module:
    """Load a policy and prepare it for training: trained parameters in float32, adapters added.

    An adapter of the model is trained further. If `peft_config` describes another one,
    the first is merged into the base model, so that the new one starts from its outputs.

    Source: P1 §3.2: the policy starts from the SFT model.
    """
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config: got {peft_config!r:.60}, expected a peft.PeftConfig, such as "
            "LoraConfig(...)"
        )
    if isinstance(model, (str, Path)):
        with name_argument("model", model):
            model = _from_pretrained(str(model))
    if not _is_language_model(model):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a causal language model, or the folder "
            "or hub name of one"
        )
    if is_adapted(model) and not is_peft_model(model) and not _has_injected_adapter(model):
        raise ValueError(
            "model: it contains an adapter, added by PEFT or by an earlier Trainer with "
            "peft_config=; pass that trainer's policy to train the adapter further, "
            "policy.unload() for the base model, or load the model again"
        )
    require_finite(model, "model")
    keep_differentiable(model)
    if peft_config is not None:
        model = _with_new_adapter(_merged(model), peft_config, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model: none of its parameters requires a gradient, so there is nothing to train; "
            + (
                "load its adapter with is_trainable=True, pass its folder as model=, or pass "
                "peft_config= to merge it and train a new one"
                if is_peft_model(model) or _has_injected_adapter(model)
                else "call model.requires_grad_(True), or pass peft_config="
            )
        )
    for parameter in trained:
        # At 5e-7 a bfloat16 AdamW moves one weight in a hundred.
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
    return model


def _from_pretrained(name: str) -> nn.Module:
    if find_adapter_config_file(name) is None:
        return AutoModelForCausalLM.from_pretrained(name)
    # Transformers' own loader would freeze the adapter and leave the model unwrapped.
    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True)


def _is_language_model(model: Any) -> bool:
    """Whether a model continues a text; encoder-decoders and classifiers do not."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or isinstance(model, RewardModel):
        return False
    can_generate = getattr(unwrap_peft(model), "can_generate", None)  # a user's module has none
    encodes = bool(getattr(config, "is_encoder_decoder", False))
    return not encodes and (can_generate is None or bool(can_generate()))


def _has_injected_adapter(model: nn.Module) -> bool:
    """Whether transformers has added the adapter, without wrapping the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _merged(model: nn.Module) -> nn.Module:
    """Return the model with its adapter merged into its base model."""
    if _has_injected_adapter(model):
        raise ValueError(
            "model: transformers has added an adapter to it, which peft_config= would silently "
            "replace; pass the adapter's folder as model=, or a peft.PeftModel, and it is merged"
        )
    if not is_peft_model(model):
        return model
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise ValueError(
            f"model: its adapter ({type(model.base_model).__name__}) cannot be merged, so "
            "peft_config= cannot add another; leave peft_config=None to train it further"
        )
    if has_effect(model):
        warnings.warn(
            "model: its adapter is merged into its base, and the one of peft_config is added. Only "
            "the new adapter is saved, and its base is the merged model, not the original one: to "
            "load it by name later, save model.merge_and_unload() to a folder first and "
            "pass that folder as model=",
            UserWarning,
            stacklevel=3,
        )
    return merge()


def _with_new_adapter(model: nn.Module, peft_config: PeftConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # adapters are initialized on the CPU
        torch.default_generator.manual_seed(seed)
        # PEFT writes the modules it has found into the config, which may serve other models.
        try:
            return get_peft_model(model, copy.deepcopy(peft_config))
        except ValueError as error:
            raise ValueError(
                f"peft_config: cannot be added to a {type(model).__name__} ({error}); name "
                "modules that it has, or set target_modules='all-linear'"
            ) from error


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which parameters of a floating dtype are trained."""
    return dtype if dtype == torch.float64 else torch.float32


def load_reference(ref_model: Any, policy: nn.Module) -> nn.Module | None:
    """Return the given reference or a copy of the policy, frozen; None for its adapters off.

    Source: P1 §3.2: the reference is the SFT model.
    """
    if ref_model is None:
        if is_peft_model(policy):
            if (why := _why_copied(policy)) is None:
                return None
            warnings.warn(f"ref_model: got None, and {why}", UserWarning, stacklevel=2)
        ref_model = copy.deepcopy(policy)
    elif isinstance(ref_model, (str, Path)):
        with name_argument("ref_model", ref_model):
            ref_model = AutoModelForCausalLM.from_pretrained(str(ref_model))
    elif not isinstance(ref_model, nn.Module):
        raise TypeError(
            f"ref_model: got {ref_model!r}, expected a causal language model, the folder or hub "
            "name of one, or None for a copy of the policy"
        )
    elif {*map(id, ref_model.parameters())} & {*map(id, policy.parameters())}:
        ref_model = copy.deepcopy(ref_model)  # its weights must not be trained
    require_finite(ref_model, "ref_model")
    if vocabulary_size(ref_model) != vocabulary_size(policy):
        raise ValueError(
            f"ref_model: its vocabulary has {vocabulary_size(ref_model)} tokens, the policy's "
            f"{vocabulary_size(policy)}; it must read the policy's tokens. Resize its embeddings, "
            "or leave ref_model=None for a copy of the policy"
        )
    return ref_model.eval().requires_grad_(False)


def _why_copied(policy: Any) -> str | None:
    """Return why the base of the policy cannot be its reference; None if it can."""
    costs = "the reference is a copy of the whole policy, which costs the memory of a second base"
    if trained := trained_base_parameters(policy):
        return (
            f"parameters of the policy's base are trained besides its adapter "
            f"({', '.join(trained[:3])}), so {costs}. To avoid it, leave bias='none' in "
            "peft_config"
        )
    if not has_effect(policy):
        return None
    names = map(rewriting_initialization, policy.peft_config.values())
    if name := next(filter(None, names), None):
        return (
            f"init_lora_weights={name!r} has rewritten the base of the policy's adapter, so "
            f"{costs}. To avoid it, leave init_lora_weights at its default"
        )
    return (
        f"the policy's adapter already changes its outputs, so {costs}. To avoid it, pass "
        "peft_config=: the adapter is merged and a new one is added"
    )


@torch.no_grad()
def has_effect(policy: Any) -> bool:
    """Whether a policy's adapters change the logits of a few tokens; new ones do not."""
    size = vocabulary_size(policy)
    # The last ones too: an adapter may have trained only added tokens.
    ids = torch.tensor([[*range(min(8, size)), *range(max(0, size - 8), size)]])
    ids = ids.to(policy.get_input_embeddings().weight.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluation_mode(policy):
        adapted = policy(**given).logits
        with active_adapter(policy, None):
            return not torch.equal(adapted, policy(**given).logits)


def save_policy(policy: Any, folder: Path) -> None:
    """Write a policy to a folder, with the active adapter only."""
    if not is_peft_model(policy):
        policy.save_pretrained(folder)
        return
    own = list(policy.active_adapters)
    policy.save_pretrained(folder, selected_adapters=own)
    if len(own) == 1 and own != ["default"]:
        # PEFT writes it to a folder of its name, where its `from_pretrained` does not look.
        below = folder / own[0]
        for file in below.iterdir():
            file.replace(folder / file.name)
        below.rmdir()


def set_switches(
    args: TrainerConfig, actor_critic: ActorCritic, ref_model: nn.Module | None
) -> None:
    """Set dropout and activation checkpointing as in a config."""
    for module in (actor_critic, ref_model):
        if module is not None and args.disable_dropout:
            disable_dropout(module)
    if args.gradient_checkpointing:
        checkpoint_activations(actor_critic.policy)
        if actor_critic.critic is not None:
            checkpoint_activations(actor_critic.critic.backbone)


def checkpoint_activations(model: Any) -> None:
    """Recompute a model's activations in the backward pass instead of keeping them."""
    # Adapters on a frozen base get a gradient only if the input requires one.
    if not all(parameter.requires_grad for parameter in model.parameters()):
        model.enable_input_require_grads()
    renamed = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.20
    enable: Any = renamed or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": partial(checkpoint_contexts, model)})


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to zero: dropout would make the ratios noisy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):  # attention keeps a number
                setattr(module, name, 0.0)


def count_parameters(module: nn.Module | None) -> str:
    """Describe a model in a line: size, trained parameters, dtypes and device."""
    if module is None:
        return "none"
    parameters = list(module.parameters())
    total, trained = count(parameters), count(p for p in parameters if p.requires_grad)
    types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    name = type(module).__name__
    return f"{name}, {total:,} parameters, {trained:,} trained, {types}, {parameters[0].device}"
