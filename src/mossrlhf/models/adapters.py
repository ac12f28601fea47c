"""Adapters inside of a reward model's backbone: put there, saved alone, merged for everyone."""

import copy
import hashlib
import re
import warnings
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mossrlhf.distributed.sharding import entire, shape
from mossrlhf.models.beneath import merged_layer, merged_modules, only_tokens_of
from mossrlhf.models.quantized import keep_differentiable, note_quantization
from mossrlhf.options import inside

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for them."""

_OUTSIDE = "base_model.model."
"""What PEFT puts before the names of a model that it is wrapped around."""

_BASE = "base"
"""The entry of the file's metadata that tells the weights beneath the adapters."""

_WRITTEN = ("task_type", "modules_to_save", "inference_mode", "base_model_name_or_path")
"""What `save_adapters` puts into the configuration for those who read it, and no more."""


def add_adapters(model: Any, peft_config: Any) -> None:
    """Put adapters into a reward model's backbone, in place, and freeze the rest of it.

    The head stays trained, as it has to be learned anew.

    Args:
        model: a `RewardModel`.
        peft_config: a ``peft.PeftConfig`` of a kind that acts inside of layers, such as LoRA; it
            is copied.

    Raises:
        ValueError: where there are adapters already, modules or tokens to be saved beside them,
            or these cannot be merged.

    Source: LoRA (arXiv 2106.09685); put in by PEFT.
    """
    from peft import inject_adapter_in_model

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
    model.backbone.requires_grad_(False)
    note_quantization(model.backbone)
    keep_differentiable(model.backbone)
    inject_adapter_in_model(copy.deepcopy(peft_config), model.backbone)
    kinds = {}
    for layer in _adapted_layers(model).values():  # one of each kind: copies take time
        kinds[type(layer), getattr(layer.get_base_layer(), "bias", None) is None] = layer
    for layer in kinds.values():
        try:
            merged_layer(layer)
        except Exception as error:  # whatever a kind of adapter raises: said before training
            raise ValueError(
                f"peft_config: these adapters cannot be merged, as saving does ({error})"
            ) from error


def is_adapted(model: nn.Module) -> bool:
    """Whether there are adapters inside of a model.

    Args:
        model: any.

    Source: ours.
    """
    return bool(_adapted_layers(model))


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a model that have adapters, and those that PEFT keeps copies of.

    Args:
        model: any.

    Source: ours.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def adapter_parameters(model: nn.Module, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter, by their names without the adapter's.

    Args:
        model: with adapters inside.
        adapter: which; None for those of all, by their whole names.

    Source: ours.
    """
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer in adapter_layers(model):
        for kind in layer.adapter_layer_names:
            for name, part in attrgetter(kind)(layer).items():
                if adapter not in (None, name):
                    continue
                parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
                for parameter in parameters:
                    whole = names[id(parameter)]
                    short = whole.replace(f"{kind}.{name}", kind)
                    found[whole if adapter is None else short] = parameter
    return found


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by the names they had before adapters, with those merged in.

    The model is left as it is; a layer at a time is copied, so that its memory is all it takes.

    Args:
        model: with or without adapters.

    Source: LoRA §4.1: W + (α/r) B A.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, layer in merged_modules(model).items():
        state = {key: w for key, w in state.items() if not key.startswith(f"{name}.")}
        for key, weight in layer.state_dict().items():
            state[f"{name}.{key}"] = weight
    return state


def save_adapters(model: Any, folder: Path, adapter: str = "default") -> None:
    """Write adapters and head as PEFT does for a sequence classifier, and the base not at all.

    Args:
        model: a `RewardModel` with adapters inside.
        folder: made where absent.
        adapter: which of them.

    Source: PEFT's layout: ``PeftModel.from_pretrained(classifier, folder)`` reads it.
    """
    from peft import PeftConfig, TaskType
    from peft.utils import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    with only_tokens_of(model.backbone, adapter):
        inside = get_peft_model_state_dict(model.backbone, adapter_name=adapter)
    before = f"{_OUTSIDE}{model.backbone.base_model_prefix}."
    state = {f"{before}{name}": weight for name, weight in inside.items()}
    for name, weight in model.score.state_dict().items():
        state[f"{_OUTSIDE}score.{name}"] = weight
    weights = {name: w.detach().cpu().contiguous() for name, w in state.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt", _BASE: _digest(model.backbone)})
    config: PeftConfig = copy.deepcopy(model.backbone.peft_config[adapter])
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    config.inference_mode = True
    config.base_model_name_or_path = model.config.name_or_path or None
    config.save_pretrained(str(folder))


def load_adapters(model: Any, folder: Path, adapter: str = "default") -> None:
    """Put back what `save_adapters` wrote.

    Args:
        model: a `RewardModel` with adapters of the same kind inside.
        folder: where they are.
        adapter: which of the model's they become.

    Raises:
        ValueError: where a weight is missing there or not known here, the adapters were made
            otherwise (another α, another rank), or the base is another.
        SafetensorError: where the file is damaged.

    Source: ours.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        base = (file.metadata() or {}).get(_BASE)
    before = f"{_OUTSIDE}{model.backbone.base_model_prefix}."
    head = {k.removeprefix(f"{_OUTSIDE}score."): v for k, v in state.items() if ".score." in k}
    inside = {k.removeprefix(before): v for k, v in state.items() if k.startswith(before)}
    with only_tokens_of(model.backbone, adapter):
        own = get_peft_model_state_dict(model.backbone, adapter_name=adapter)
    different = sorted(own.keys() ^ inside.keys()) + sorted(head.keys() ^ {*_names(model.score)})
    if different:
        raise ValueError(
            f"{folder / WEIGHTS}: it and the model's adapters differ in {different[:3]}; train on "
            "with the peft_config it was trained with"
        )
    _require_alike(model.backbone.peft_config[adapter], folder)
    if base not in (None, _digest(model.backbone)):
        raise ValueError(
            f"{folder / WEIGHTS}: these adapters were trained on other weights than the model has "
            "beneath them; begin with the model that training began with"
        )
    with torch.no_grad(), only_tokens_of(model.backbone, adapter):
        set_peft_model_state_dict(model.backbone, inside, adapter_name=adapter)
    model.score.load_state_dict(head)


def adapter_folder(name: str | Path) -> Path | None:
    """Return the folder of adapters alone that a name stands for; None where it is none.

    Args:
        name: a folder, or anything else.

    Source: the layout of PEFT.
    """
    folder = Path(name)
    alone = not (folder / "config.json").is_file()
    return folder if alone and (folder / "adapter_config.json").is_file() else None


def is_over(model: Any, folder: Path) -> bool:
    """Whether the adapters in a folder were trained over what a model has beneath its own.

    Args:
        model: the policy.
        folder: of a sequence classifier's adapters.

    Warns:
        UserWarning: where the model is adapted, but they were trained over something else.

    Source: ours; by the digest that `save_adapters` writes.
    """
    if not is_adapted(model):
        return False
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        trained_over = (file.metadata() or {}).get(_BASE)
    if trained_over == _digest(inside(model).base_model):
        return True
    found = "does not say over what" if trained_over is None else "was trained over other weights"
    warnings.warn(
        f"{folder}: this adapter {found} than the policy has beneath its own, so it gets a base to "
        "itself, which costs the memory of one; train it over the model the policy starts from, "
        "with RewardTrainer(peft_config=)",
        UserWarning,
        stacklevel=4,
    )
    return False


def _require_alike(own: Any, folder: Path) -> None:
    from peft import PeftConfig

    saved = PeftConfig.from_pretrained(str(folder)).to_dict()
    given = own.to_dict()
    passed = (*_WRITTEN, "auto_mapping", "revision", "peft_version")
    differing = [
        f"{name} {saved[name]} there, {value} here"
        for name, value in given.items()
        if name not in passed and name in saved and saved[name] != value
    ]
    if differing:
        raise ValueError(
            f"{folder}: its adapters are made otherwise: {'; '.join(differing)}; train on with the "
            "peft_config it was trained with"
        )


def _digest(backbone: Any) -> str:
    """Tell the weights beneath adapters, whatever the names that adapters give them."""
    adapters = {id(parameter) for parameter in adapter_parameters(backbone).values()}
    bare = {
        re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name): weight
        for name, weight in backbone.named_parameters()
        if id(weight) not in adapters
    }
    return weights_digest(bare)


@torch.no_grad()
def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Tell weights from others by a few numbers of each, in a precision that all types have.

    Args:
        weights: by name, in any order.

    Source: ours.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        numbers = entire(weight).detach().flatten()
        some = numbers[:: max(1, len(numbers) // 64)].to(torch.bfloat16).float().tolist()
        digest.update(repr((name, tuple(shape(weight)), some)).encode())
    return digest.hexdigest()


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[name] = module
    return found
