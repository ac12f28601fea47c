"""What lies beneath adapters: that they leave it as it is, and what it is with them merged in."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mossrlhf.models.quantized import is_quantized, plain_layer
from mossrlhf.options import inside

_REWRITING = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""How the names of PEFT's initializations begin that take from the base what they give to A, B."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rewriting_initialization(peft_config: Any) -> str | None:
    """Return the name of an initialization that rewrites the base; None of any other.

    Args:
        peft_config: of an adapter.

    Source: PEFT's `LoraConfig(init_lora_weights=)`; PiSSA (arXiv 2404.02948) eq. 5 and its like.
    """
    name = getattr(peft_config, "init_lora_weights", None)
    return name if isinstance(name, str) and name.lower().startswith(_REWRITING) else None


def require_resting(peft_config: Any, name: str) -> None:
    """Refuse an adapter that rewrites a base which others speak by.

    Args:
        peft_config: of the adapter.
        name: what the error calls it.

    Raises:
        ValueError: with the initialization.

    Source: ours.
    """
    if (found := rewriting_initialization(peft_config)) is not None:
        raise ValueError(
            f"{name}: got init_lora_weights={found!r}, which rewrites the base beneath the "
            "adapter, and with it what policy and reference say; leave init_lora_weights as it is"
        )


@torch.no_grad()
def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of each weight's bits, which tells any change in place.

    Args:
        parameters: by name, of any type; those without numbers are left out.

    Source: ours.
    """
    return {
        name: int(p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64))
        for name, p in parameters.items()
        if not p.is_meta and p.dim() and p.element_size() in _INTEGERS
    }


def trained_beneath(policy: nn.Module) -> list[str]:
    """Return the names of trained parameters that adapters switched off leave as trained.

    Args:
        policy: with or without adapters; without, there are none.

    Source: ours; such are the biases of ``LoraConfig(bias="all")``.
    """
    from mossrlhf.models.adapters import adapter_parameters

    model = inside(policy)
    if model is policy:
        return []
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    return [
        f"{name}.{short}" if name else short
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("peft.")
        for short, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in adapters
    ]


def bare_module(module: Any) -> nn.Module:
    """Return what PEFT's layers and wrappers are around, or the module itself.

    Args:
        module: of an adapted model.

    Source: ours.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    bare: Any = module
    while isinstance(bare, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        tuner = isinstance(bare, BaseTunerLayer)
        bare = bare.get_base_layer() if tuner else bare.original_module  # type: ignore[union-attr]
    found: nn.Module = bare
    return found


@contextmanager
def only_tokens_of(model: nn.Module, adapter: str) -> Iterator[None]:
    """Have PEFT read and write an adapter without looking for it among other roles' tokens.

    Args:
        model: with adapters inside.
        adapter: that may have no tokens of its own.

    Source: ours; of wrapped modules PEFT passes over those of others, of wrapped tokens it does
        not.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    asked = ("adapter_state_dict", "adapter_state_dict_load_map")
    others = [
        module
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        and adapter not in module._get_available_adapters()
    ]
    for module in others:
        vars(module).update(dict.fromkeys(asked, _nothing))
    try:
        yield
    finally:
        for module in others:
            for name in asked:
                vars(module).pop(name)


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def merged_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, what each module with adapters computes, as one without them.

    The model is left as it is; a layer at a time is copied.

    Args:
        model: with adapters inside, PEFT's copies of whole modules and tokens included, or with
            layers of few bits.

    Source: LoRA §4.1: W + (α/r) B A.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(".".join(parts[:i]) in found for i in range(1, len(parts))):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or is_quantized(module):
            found[name] = merged_layer(module)
    return found


def merged_layer(layer: Any) -> nn.Module:
    """Return a layer of its own with the adapters of another merged in, those that speak.

    Args:
        layer: PEFT's, around one of the model's; or one of few bits.

    Source: ours.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        own = [name for name in layer.active_adapters if name in layer.modules_to_save]
        speaks = own and not layer.disable_adapters
        return merged_layer(layer.modules_to_save[own[0]] if speaks else layer.original_module)
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return merged_layer(layer.token_adapter)
    base = bare_module(layer)
    if is_quantized(base):
        return plain_layer(layer)  # merged into four bits, adapters would be rounded away
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
        return base
    copied: Any = copy.deepcopy(layer)
    copied.merge()
    merged: nn.Module = copied.get_base_layer()
    return merged
