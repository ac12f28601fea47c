"""The policy and its reference, adapters included."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.utils import find_adapter_config_file

from mossrlhf.models import (
    RewardModel,
    keep_differentiable,
    rewriting_initialization,
    trained_beneath,
)
from mossrlhf.options import inside
from mossrlhf.roles.reading import loading, require_finite, vocabulary_size


def load_policy(model: Any, peft_config: Any = None, *, seed: int = 0) -> nn.Module:
    """Make the policy ready to be trained: trained parameters are float32, adapters put on.

    An adapter the model comes with is trained on; where `peft_config` asks for another, it is
    merged into the base first, so that the new one starts from what the model says now.

    Args:
        model: a causal language model, with or without an adapter, or a folder or hub name of
            one; the folder may hold an adapter alone.
        peft_config: a ``peft.PeftConfig``; the base is then frozen. None trains all of it.
        seed: of the new adapter's first weights, whatever was drawn before.

    Raises:
        TypeError: where `model` is neither, or `peft_config` is none.
        ValueError: where nothing of it is trainable, a weight is not finite, its adapter cannot be
            merged, or it is the inside of an adapted model.

    Warns:
        UserWarning: where an adapter is merged: what is saved stands on the merged model.

    Source: P1 §3.2: the policy starts from the SFT model.
    """
    _require_config(peft_config)
    if isinstance(model, (str, Path)):
        with loading("model", model):
            model = _load(str(model))
    if not _writes(model):
        raise TypeError(
            f"model: got {type(model).__name__}, expected a causal language model, or the folder "
            "or hub name of one"
        )
    _require_own_weights(model)
    require_finite(model, "model")
    keep_differentiable(model)
    if peft_config is not None:
        from peft import get_peft_model

        model = _merged(model)
        with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU
            torch.default_generator.manual_seed(seed)
            # PEFT writes the modules it has found into the config, which may serve other models.
            try:
                model = get_peft_model(model, copy.deepcopy(peft_config))
            except ValueError as error:
                raise ValueError(
                    f"peft_config: cannot be put on a {type(model).__name__} ({error}); name "
                    "modules that it has, or set target_modules='all-linear'"
                ) from error
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "model: none of its parameters requires a gradient, so there is nothing to train; "
            + (
                "load its adapter with is_trainable=True, pass its folder as model=, or pass "
                "peft_config= to merge it and train a new one"
                if is_adapted(model) or _is_injected(model)
                else "call model.requires_grad_(True), or pass peft_config="
            )
        )
    for parameter in trained:
        # At 5e-7 a bfloat16 AdamW moves one weight in a hundred.
        parameter.data = parameter.data.to(at_least_float32(parameter.dtype))
    return model


def _require_config(peft_config: Any) -> None:
    if peft_config is None:
        return
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config: got {peft_config!r:.60}, expected a peft.PeftConfig, such as "
            "LoraConfig(...)"
        )


def _writes(model: Any) -> bool:
    """Whether this is a model that goes on with a text, and no encoder-decoder or classifier."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig) or isinstance(model, RewardModel):
        return False
    can_generate = getattr(inside(model), "can_generate", None)  # a module of one's own has none
    encodes = bool(getattr(config, "is_encoder_decoder", False))
    return not encodes and (can_generate is None or bool(can_generate()))


def _load(name: str) -> nn.Module:
    if find_adapter_config_file(name) is None:
        return AutoModelForCausalLM.from_pretrained(name)
    # Transformers' own loader would freeze the adapter and hide it inside the base.
    from peft import AutoPeftModelForCausalLM

    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True)


def _require_own_weights(model: nn.Module) -> None:
    """Refuse the inside of an adapted model: it looks bare, and only its adapter would learn."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if is_adapted(model) or _is_injected(model):
        return
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "model: an adapter is inside it, put there by PEFT or by an earlier Trainer with "
            "peft_config=; pass that trainer's policy to train the adapter on, policy.unload() "
            "for the bare model, or load the model anew"
        )


def _is_injected(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def _merged(model: nn.Module) -> nn.Module:
    """Return the model with the adapter it came with merged into its base."""
    if _is_injected(model):
        raise ValueError(
            "model: transformers has put an adapter inside it, which peft_config= would silently "
            "replace; pass the adapter's folder as model=, or a peft.PeftModel, and it is merged"
        )
    if not is_adapted(model):
        return model
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise ValueError(
            f"model: its adapter ({type(model.base_model).__name__}) cannot be merged, so "
            "peft_config= cannot put another on top; leave peft_config=None to train it on"
        )
    if has_effect(model):
        warnings.warn(
            "model: its adapter is merged into its base, and the one of peft_config put on top. "
            "What is saved is the new adapter, which stands on the merged model, not on the bare "
            "base: to load it by name later, save model.merge_and_unload() to a folder first and "
            "pass that folder as model=",
            UserWarning,
            stacklevel=3,
        )
    return merge()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the type that parameters of this type are trained in.

    Args:
        dtype: a floating type.

    Source: ours.
    """
    return dtype if dtype == torch.float64 else torch.float32


def load_reference(ref_model: Any, policy: nn.Module) -> nn.Module | None:
    """Make the reference: what was given, else a frozen copy of the policy as it is now.

    Args:
        ref_model: a causal language model, a folder or hub name, or None.
        policy: as `load_policy` returns it.

    Returns:
        the reference; None where it is the policy itself with its adapters off, which is where
        they change nothing yet.

    Raises:
        TypeError: where it is no model.
        ValueError: where its vocabulary is not the policy's, or a weight is not finite.

    Warns:
        UserWarning: where the policy is copied whole, since its adapters were trained before, or
            its base is trained along or has been rewritten by them.

    Source: P1 §3.2: the reference is the SFT model.
    """
    if ref_model is None:
        if is_adapted(policy):
            if (why := _why_copied(policy)) is None:
                return None
            warnings.warn(
                f"ref_model: got None, and {why}",
                UserWarning,
                stacklevel=2,
            )
        ref_model = copy.deepcopy(policy)
    elif isinstance(ref_model, (str, Path)):
        with loading("ref_model", ref_model):
            ref_model = AutoModelForCausalLM.from_pretrained(str(ref_model))
    elif not isinstance(ref_model, nn.Module):
        raise TypeError(
            f"ref_model: got {ref_model!r}, expected a causal language model, the folder or hub "
            "name of one, or None for the policy as it is now"
        )
    elif {*map(id, ref_model.parameters())} & {*map(id, policy.parameters())}:
        ref_model = copy.deepcopy(ref_model)  # what is frozen must not be what is trained
    require_finite(ref_model, "ref_model")
    if vocabulary_size(ref_model) != vocabulary_size(policy):
        raise ValueError(
            f"ref_model: its vocabulary has {vocabulary_size(ref_model)} tokens, the policy's "
            f"{vocabulary_size(policy)}; it must read the policy's tokens. Resize its embeddings, "
            "or leave ref_model=None for the policy as it is now"
        )
    return ref_model.eval().requires_grad_(False)


def _why_copied(policy: Any) -> str | None:
    """Why a policy with its adapters off is not its reference, and what to do; None where it is."""
    costs = "the reference is a copy of the whole policy, which costs the memory of a second base"
    if trained := trained_beneath(policy):
        return (
            f"parameters of the policy's base are trained beneath its adapter "
            f"({', '.join(trained[:3])}), so {costs}. To do without, leave bias='none' in "
            "peft_config"
        )
    if not has_effect(policy):
        return None
    names = map(rewriting_initialization, policy.peft_config.values())
    if name := next(filter(None, names), None):
        return (
            f"init_lora_weights={name!r} has rewritten the base beneath the policy's adapter, so "
            f"{costs}. To do without, leave init_lora_weights as it is"
        )
    return (
        f"the policy's adapter already changes what it says, so {costs}. To do without, pass "
        "peft_config=: the adapter is merged and a new one put on top"
    )


@torch.no_grad()
def has_effect(policy: nn.Module) -> bool:
    """Whether a policy's adapters change what it says; those just put on do not.

    Args:
        policy: an adapted causal language model; asked about a few tokens, with and without.

    Source: ours; asked rather than looked up, since every kind of adapter rests in its own way.
    """
    size = vocabulary_size(policy)
    # The last ones too: added tokens, which alone may have been trained.
    ids = torch.tensor([[*range(min(8, size)), *range(max(0, size - 8), size)]])
    training = policy.training
    policy.eval()
    try:
        ids = ids.to(policy.get_input_embeddings().weight.device)  # type: ignore[operator]
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        adapted = policy(**asked).logits
        with policy.disable_adapter():  # type: ignore[operator]
            bare = policy(**asked).logits
    finally:
        policy.train(training)
    return not torch.equal(adapted, bare)


def is_adapted(policy: nn.Module) -> bool:
    """Whether PEFT adapters sit around the model.

    Args:
        policy: any module.

    Source: ours.
    """
    from peft import PeftModel

    return isinstance(policy, PeftModel)


def save_policy(policy: Any, folder: Path) -> None:
    """Write a policy to a folder, of its adapters the one it speaks by alone.

    Args:
        policy: with or without adapters.
        folder: made where absent.

    Source: ours; PEFT writes an adapter with a name of its own to a folder below, where its
        ``from_pretrained`` does not look.
    """
    if not is_adapted(policy):
        policy.save_pretrained(folder)
        return
    own = list(policy.active_adapters)
    policy.save_pretrained(folder, selected_adapters=own)
    if len(own) == 1 and own != ["default"]:
        below = folder / own[0]
        for file in below.iterdir():
            file.replace(folder / file.name)
        below.rmdir()


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
        trained = [(p, p.requires_grad) for p in policy.parameters()]
        with policy.disable_adapter():  # type: ignore[operator]
            yield policy
        for parameter, flag in trained:
            parameter.requires_grad_(flag)  # PEFT has left those of other roles frozen
