"""LoRA and PEFT's other adapters: added, activated, merged and saved; quantized base models."""

import copy
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mossrlhf.distributed.sharding import entire, shape

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the file of an adapter's weights."""

_PEFT_PREFIX = "base_model.model."
"""PEFT's prefix to the names of a wrapped model."""

_BASE = "base"
"""The entry of the file's metadata with a checksum of the base model."""

_NOT_COMPARED = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version",
    "revision", "task_type",
)  # fmt: skip
"""Fields of an adapter's configuration without effect on its outputs, in a `RewardModel`."""

_REWRITING = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Prefixes of PEFT's initializations that subtract from the base what they put into A and B."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_QUANTIZED = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
"""Layers of bitsandbytes, and the attribute by which transformers marks a model with them."""


def unwrap_peft(model: nn.Module) -> nn.Module:
    """Return the transformers model that PEFT has wrapped, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is a ``PeftModel``, with adapters that can be switched off and merged."""
    return isinstance(model, PeftModel)


def is_adapted(model: nn.Module) -> bool:
    """Return whether any layer of a model, wrapped by PEFT or not, has adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def bare_module(module: Any) -> nn.Module:
    """Return the module that PEFT's layers and wrappers are around, or the module itself."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            module = module.original_module
    found: nn.Module = module
    return found


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens that a transformers model or a `RewardModel` embeds."""
    embeddings: Any = bare_module(getattr(model, "backbone", model).get_input_embeddings())
    return int(embeddings.num_embeddings)


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return PEFT's layers and its wrappers of whole modules and of tokens."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _adapter_parts(layer: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield attribute, adapter and module or parameter of each part of a layer's adapters."""
    for kind in layer.adapter_layer_names:
        for name, part in attrgetter(kind)(layer).items():
            yield kind, name, part


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by names without its own; None for all, by full names."""
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer in adapter_layers(model):
        for kind, name, part in _adapter_parts(layer):
            if adapter not in (None, name):
                continue
            for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                whole = names[id(parameter)]
                short = whole.replace(f"{kind}.{name}", kind)
                found[whole if adapter is None else short] = parameter
    return found


def trained_base_parameters(policy: nn.Module) -> list[str]:
    """Return the names of base parameters that are trained along with a policy's adapters.

    Switching the adapters off leaves these as trained: the biases of ``LoraConfig(bias="all")``.
    """
    model = unwrap_peft(policy)
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


def rewriting_initialization(peft_config: Any) -> str | None:
    """Return the name of an initialization that rewrites the base model; None for any other.

    Source: PEFT's ``LoraConfig(init_lora_weights=)``; PiSSA (arXiv 2404.02948) eq. 5 and others.
    """
    name = getattr(peft_config, "init_lora_weights", None)
    return name if isinstance(name, str) and name.lower().startswith(_REWRITING) else None


@contextmanager
def active_adapter(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Make one of a model's adapters the active one for the block, or none of them.

    No `requires_grad` is changed. PEFT's own switches do, and within an optimizer step other
    adapters would lose their gradients.

    Args:
        model: with adapters.
        adapter: its name; None for the base model alone.
    """
    if adapter is None and isinstance(model, PeftModel):  # learned prompts included
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return
    states = []
    for layer in adapter_layers(model):
        active = layer._active_adapter if adapter is None else [adapter]
        # A wrapper without this adapter is disabled: PEFT would look for weights it has not.
        has_it = any(name == adapter for _, name, _ in _adapter_parts(layer))
        states.append((layer, active, not has_it))
    with _activated(states):
        yield


@contextmanager
def as_reference(reference: nn.Module | None, policy: nn.Module) -> Iterator[nn.Module]:
    """Yield the reference model, or the policy with its adapters off where there is none."""
    if reference is not None:
        yield reference
    else:
        with active_adapter(policy, None):
            yield policy


def _activation(layers: Iterable[Any]) -> list[tuple[Any, Any, bool]]:
    """Return each layer with its active adapters, and whether they are disabled."""
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]


@contextmanager
def _activated(states: list[tuple[Any, Any, bool]]) -> Iterator[None]:
    before = _activation(layer for layer, _, _ in states)
    _activate(states)
    try:
        yield
    finally:
        _activate(before)


def _activate(states: list[tuple[Any, Any, bool]]) -> None:
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled


def checkpoint_contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a forward pass and its recomputation with the same active adapter.

    For ``context_fn`` of `torch.utils.checkpoint.checkpoint`, which recomputes in the backward
    pass, when another adapter may be active.
    """
    return nullcontext(), _activated(_activation(adapter_layers(model)))


def add_adapters(model: Any, peft_config: Any) -> None:
    """Add adapters to a reward model's backbone, in place, and freeze the rest of it.

    The head is trained too.

    Args:
        model: a `RewardModel`.
        peft_config: a ``peft.PeftConfig`` of a kind that acts within layers, such as LoRA; it is
            copied.

    Raises:
        ValueError: where the model has adapters, the configuration names modules or tokens to be
            saved besides, or its adapters cannot be merged.

    Source: LoRA (arXiv 2106.09685).
    """
    if is_adapted(model):
        raise ValueError(
            "peft_config: the reward model has adapters inside already; train those on "
            "(peft_config=None), or save it, which merges them, and load it again"
        )
    if getattr(peft_config, "trainable_token_indices", None):
        raise ValueError(
            f"peft_config: got trainable_token_indices={peft_config.trainable_token_indices}, "
            "which are kept apart from adapters; leave them out"
        )
    if getattr(peft_config, "modules_to_save", None):
        raise ValueError(
            f"peft_config: got modules_to_save={peft_config.modules_to_save}; the head is trained "
            "anyway, and other modules would have to be trained whole. Leave it out"
        )
    backbone = model.backbone.requires_grad_(False)
    for module in filter(is_quantized, backbone.modules()):
        # PEFT looks for the mark of transformers, which is on the whole model.
        setattr(backbone, _QUANTIZED[type(module).__name__], True)
    keep_differentiable(backbone)
    inject_adapter_in_model(copy.deepcopy(peft_config), backbone)
    kinds = {}
    for layer in backbone.modules():
        if isinstance(layer, BaseTunerLayer):  # one of each kind: copies take time
            kinds[type(layer), getattr(layer.get_base_layer(), "bias", None) is None] = layer
    for layer in kinds.values():
        try:
            _merged_layer(layer)
        except Exception as error:  # whatever a kind of adapter raises
            raise ValueError(
                f"peft_config: these adapters cannot be merged, as saving does ({error})"
            ) from error


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights with adapters merged, by the names of the model without adapters.

    The model is not changed; one layer at a time is copied.

    Source: LoRA §4.1: W + (α/r) B A.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in merged_modules(model).items():
        state = {key: w for key, w in state.items() if not key.startswith(f"{name}.")}
        for key, weight in layer.state_dict().items():
            state[f"{name}.{key}"] = weight
    return state


def merged_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a plain module, by name, for each adapted or quantized one; the model is unchanged."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if any(".".join(parts[:i]) in found for i in range(1, len(parts))):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or is_quantized(module):
            found[name] = _merged_layer(module)
    return found


def _merged_layer(layer: Any) -> nn.Module:
    """Return a plain layer that computes what PEFT's or a quantized one does now."""
    if isinstance(layer, ModulesToSaveWrapper):
        own = [name for name in layer.active_adapters if name in layer.modules_to_save]
        active = own and not layer.disable_adapters
        return _merged_layer(layer.modules_to_save[own[0]] if active else layer.original_module)
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return _merged_layer(layer.token_adapter)
    base = bare_module(layer)
    if is_quantized(base):
        return plain_layer(layer)  # merged into four bits, adapters would be rounded away
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
        return base
    copied: Any = copy.deepcopy(layer)
    copied.merge()
    merged: nn.Module = copied.get_base_layer()
    return merged


def save_adapters(model: Any, folder: Path, adapter: str = "default") -> None:
    """Write a reward model's adapter and head to a folder, without the base model.

    It is PEFT's layout: ``PeftModel.from_pretrained(classifier, folder)`` reads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = f"{_PEFT_PREFIX}{model.backbone.base_model_prefix}."
    state = {f"{before}{k}": w for k, w in _adapter_state(model.backbone, adapter).items()}
    for name, weight in model.score.state_dict().items():
        state[f"{_PEFT_PREFIX}score.{name}"] = weight
    weights = {name: w.detach().cpu().contiguous() for name, w in state.items()}
    metadata = {"format": "pt", _BASE: _base_checksum(model.backbone)}
    save_file(weights, folder / WEIGHTS, metadata=metadata)
    config: PeftConfig = copy.deepcopy(model.backbone.peft_config[adapter])
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    config.inference_mode = True
    config.base_model_name_or_path = model.config.name_or_path or None
    config.save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path, adapter: str = "default") -> None:
    """Load what `save_adapters` has written into an adapter of the same configuration.

    Raises:
        ValueError: where names of weights, the configuration (α, rank …) or the base model differ.
        SafetensorError: where the file is damaged.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        base = (file.metadata() or {}).get(_BASE)
    backbone = model.backbone
    before = f"{_PEFT_PREFIX}{backbone.base_model_prefix}."
    head = {k.removeprefix(f"{_PEFT_PREFIX}score."): v for k, v in state.items() if ".score." in k}
    weights = {k.removeprefix(before): v for k, v in state.items() if k.startswith(before)}
    different = sorted(_adapter_state(backbone, adapter).keys() ^ weights.keys())
    different += sorted(head.keys() ^ dict(model.score.named_parameters()).keys())
    if different:
        raise ValueError(
            f"{folder / WEIGHTS}: it and the model's adapters differ in {different[:3]}; train on "
            "with the peft_config it was trained with"
        )
    _require_same_config(backbone.peft_config[adapter], folder)
    if base not in (None, _base_checksum(backbone)):
        raise ValueError(
            f"{folder / WEIGHTS}: these adapters were trained on another base than the model's; "
            "load the model that they were trained on"
        )
    absent = {name: torch.empty(0) for name in _tokens_of_others(backbone, adapter)}
    with torch.no_grad():
        set_peft_model_state_dict(backbone, weights | absent, adapter_name=adapter)
    model.score.load_state_dict(head)


def _adapter_state(backbone: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's weights, by the names PEFT saves them under."""
    absent = _tokens_of_others(backbone, adapter)
    given = {f"{name}.{adapter}": torch.empty(0) for name in absent}
    state = backbone.state_dict() | given if given else None
    found = get_peft_model_state_dict(backbone, state, adapter_name=adapter)
    return {name: weight for name, weight in found.items() if name not in absent}


def _tokens_of_others(backbone: nn.Module, adapter: str) -> list[str]:
    """Return the weights that PEFT would look for in token wrappers that the adapter is not in."""
    return [
        f"{name}.token_adapter.trainable_tokens_delta"
        for name, module in backbone.named_modules()
        if isinstance(module, TrainableTokensWrapper)
        and adapter not in module.token_adapter.trainable_tokens_delta
        and not module.token_adapter.tied_adapter
    ]


def _require_same_config(own: Any, folder: Path) -> None:
    saved = PeftConfig.from_pretrained(str(folder)).to_dict()
    differing = [
        f"{name} {saved[name]} there, {value} here"
        for name, value in own.to_dict().items()
        if name not in _NOT_COMPARED and name in saved and saved[name] != value
    ]
    if differing:
        raise ValueError(
            f"{folder}: its adapters are made otherwise: {'; '.join(differing)}; train on with the "
            "peft_config it was trained with"
        )


def adapter_folder(name: str | Path) -> Path | None:
    """Return the folder of an adapter without its base model; None for any other, or a hub name."""
    folder = Path(name)
    alone = not (folder / "config.json").is_file()
    return folder if alone and (folder / "adapter_config.json").is_file() else None


def shares_base(policy: Any, folder: Path) -> bool:
    """Return whether the adapter in a folder was trained on the base model of the policy's.

    Warns:
        UserWarning: where the policy has adapters, but this one was trained on another base.
    """
    if not is_adapted(policy):
        return False
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        base = (file.metadata() or {}).get(_BASE)
    if base == _base_checksum(unwrap_peft(policy).base_model):
        return True
    found = "may have another base" if base is None else "was trained on another base"
    warnings.warn(
        f"{folder}: this adapter {found} than the policy's, so it gets a separate one, which costs "
        "its memory; train the adapter on the model the policy starts from, with "
        "RewardTrainer(peft_config=)",
        UserWarning,
        stacklevel=4,
    )
    return False


def _base_checksum(backbone: Any) -> str:
    """Return a checksum of the base weights, whatever names the adapters give them."""
    adapters = {id(parameter) for parameter in adapter_parameters(backbone).values()}
    bare = {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name): weight
        for name, weight in backbone.named_parameters()
        if id(weight) not in adapters
    }
    return weights_digest(bare)


@torch.no_grad()
def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of some numbers of each weight, the same for every floating type."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        numbers = entire(weight).detach().flatten()
        some = numbers[:: max(1, len(numbers) // 64)].to(torch.bfloat16).float().tolist()
        digest.update(repr((name, tuple(shape(weight)), some)).encode())
    return digest.hexdigest()


@torch.no_grad()
def checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of each weight's bits, by which any change in place is seen."""
    return {
        name: int(p.detach().view(_INTEGERS[p.element_size()]).sum(dtype=torch.int64))
        for name, p in parameters.items()
        if not p.is_meta and p.dim() and p.element_size() in _INTEGERS
    }


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer's weight is quantized to four or eight bits."""
    return type(module).__name__ in _QUANTIZED


def keep_differentiable(model: nn.Module) -> None:
    """Let a quantized base model compute in evaluation mode as in training mode.

    PPO trains in evaluation mode, where dropout is off. bitsandbytes takes that for inference: on
    some CPUs it would pack the weights for a kernel without gradients that rounds to bfloat16.
    """
    for module in model.modules():
        if is_quantized(module) and _set_training not in module._forward_pre_hooks.values():
            module.state_dict()  # unpacks weights that were packed for inference
            module.register_forward_pre_hook(_set_training)


def _set_training(module: nn.Module, args: Any) -> None:
    module.training = True


@torch.no_grad()
def plain_layer(layer: Any) -> nn.Linear:
    """Return a linear layer that computes what a quantized one does, active adapters included."""
    base = bare_module(layer)
    weight = dequantize_module_weight(base).detach().clone()
    for adapter in () if getattr(layer, "disable_adapters", True) else layer.active_adapters:
        if not any(adapter in getattr(layer, parts) for parts in layer.adapter_layer_names):
            continue  # the active adapter has no part in this layer
        kinds = (getattr(layer, name, {}) for name in ("use_dora", "lora_bias"))
        more = any(kind.get(adapter) for kind in kinds)  # than the difference of a weight
        if more or not hasattr(layer, "get_delta_weight"):
            raise ValueError(f"{type(layer).__name__} adds more than a matrix to quantized weights")
        weight += layer.get_delta_weight(adapter).to(weight.dtype)
    bias: Any = base.bias
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype).clone())
    return made


def forget_quantization(model: Any) -> None:
    """Remove the marks of quantization from a model or configuration with plain layers again."""
    config = getattr(model, "config", model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for flag in (*_QUANTIZED.values(), "is_quantized", "hf_quantizer", "quantization_method"):
        vars(model).pop(flag, None)
