"""Bases of four or eight bits (bitsandbytes): told to PEFT, and written out in full."""

from typing import Any

import torch
from torch import Tensor, nn

FLAGS = {"Linear4bit": "is_loaded_in_4bit", "Linear8bitLt": "is_loaded_in_8bit"}
"""Kinds of layers, and by which attribute of a model transformers says that it has them."""


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is held in fewer bits than its numbers have.

    Args:
        module: a layer.

    Source: ours; told by name, since bitsandbytes need not be installed.
    """
    return type(module).__name__ in FLAGS


def note_quantization(backbone: nn.Module) -> None:
    """Tell PEFT what transformers told it of the whole model, and not of the backbone inside.

    Args:
        backbone: a bare transformer.

    Source: ours.
    """
    for module in backbone.modules():
        if is_quantized(module):
            setattr(backbone, FLAGS[type(module).__name__], True)


def keep_differentiable(model: nn.Module) -> None:
    """Let a quantized base compute in evaluation mode as it does in training mode.

    PPO trains in evaluation mode, where dropout is off. bitsandbytes takes that for inference: on
    some CPUs it would pack the weights anew, for a kernel that passes no gradient on and rounds to
    bfloat16.

    Args:
        model: with or without quantized layers.

    Source: ours.
    """
    for module in model.modules():
        if is_quantized(module) and _as_in_training not in module._forward_pre_hooks.values():
            module.state_dict()  # weights that were packed for inference are unpacked for it
            module.register_forward_pre_hook(_as_in_training)


def _as_in_training(module: nn.Module, args: Any) -> None:
    module.training = True


@torch.no_grad()
def full_weight(layer: Any) -> Tensor:
    """Return a quantized layer's weight in full, with what the active adapters add to it.

    Args:
        layer: a linear layer of bitsandbytes, or PEFT's around one.

    Raises:
        ValueError: where the adapters are of a kind that adds no matrix.

    Source: LoRA §4.1: W + (α/r) B A; QLoRA (arXiv 2305.14314) eq. 5 for W.
    """
    from peft.utils.integrations import dequantize_module_weight

    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = dequantize_module_weight(base).detach().clone()
    for adapter in getattr(layer, "active_adapters", ()):
        if not hasattr(layer, "get_delta_weight"):
            raise ValueError(f"{type(layer).__name__} adds no matrix to a weight of few bits")
        weight += layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def plain_layer(layer: Any) -> nn.Linear:
    """Return what a quantized layer computes, adapters included, as an ordinary linear layer.

    Args:
        layer: as `full_weight` takes it.

    Source: ours.
    """
    weight = full_weight(layer)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None)
    made.weight = nn.Parameter(weight)
    if base.bias is not None:
        made.bias = nn.Parameter(base.bias.detach().to(weight.dtype).clone())
    return made


def forget_quantization(model: Any) -> None:
    """Let a model whose layers are ordinary ones again no longer call itself quantized.

    Args:
        model: of transformers, or a config.

    Source: ours.
    """
    config = getattr(model, "config", model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for flag in (*FLAGS.values(), "is_quantized", "hf_quantizer", "quantization_method"):
        vars(model).pop(flag, None)
