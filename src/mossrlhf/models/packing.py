"""Sequences of different lengths end to end, so that nothing is computed for padding."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mossrlhf.distributed.sharding import is_sharded
from mossrlhf.models.padding import needed_mask

APART = "mossrlhf_apart"
"""What transformers calls `attend_apart`, while it is in force."""

WORTH_IT = 0.05
"""Share of padding from which on it pays to leave it out."""


def states(
    backbone: Any,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Shaped[Tensor, "B L"],
    right_padded: bool | None = None,
) -> Float[Tensor, "B L D"]:
    """Return a bare transformer's last hidden states; on padding they mean nothing.

    Args:
        backbone: a bare transformer.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.
        right_padded: whether it is known that all padding is on the right.

    Source: ours.
    """
    mask = needed_mask(backbone, attention_mask, right_padded)
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return _asked(backbone, input_ids, attention_mask=mask, position_ids=positions)
    tokens = attention_mask.bool()
    if _padded(tokens) and packs(backbone):
        return _packed(backbone, input_ids, tokens)
    return _asked(backbone, input_ids)


def _padded(tokens: Tensor) -> bool:
    """Whether there is padding worth leaving out; on CUDA the host does not wait to see."""
    return tokens.device.type == "cpu" and float(tokens.float().mean()) < 1 - WORTH_IT


def _asked(backbone: Any, input_ids: Tensor, **given: Any) -> Tensor:
    kind: Any = type(backbone)
    names = _names(kind)
    given = {n: v for n, v in {"use_cache": False, **given}.items() if not names or n in names}
    found: Tensor = backbone(input_ids=input_ids, **given).last_hidden_state
    return found


@cache
def _names(kind: type[nn.Module]) -> frozenset[str]:
    """What a backbone's forward takes; nothing where it takes anything."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return frozenset()
    return frozenset(p.name for p in parameters)


def _packed(backbone: Any, input_ids: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states ``[B, L, D]`` of tokens that are read end to end, zero on padding."""
    lengths = tokens.sum(1)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[tokens]
    with _apart(_text(backbone.config)):
        flat = _asked(
            backbone,
            input_ids[tokens][None],
            position_ids=positions[None],
            lengths=tuple(length for length in lengths.tolist() if length),
        )[0]
    return flat.new_zeros(*tokens.shape, flat.shape[-1]).masked_scatter(tokens[..., None], flat)


_switch = RLock()
"""A model's configuration is everybody's: two threads would put back what the other has set."""


@contextmanager
def _apart(config: Any) -> Iterator[None]:
    with _switch:
        own = config._attn_implementation
        config._attn_implementation = APART
        try:
            yield
        finally:
            config._attn_implementation = own


def _text(config: Any) -> Any:
    """What a model that reads texts among others is told of them; the others keep their own."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attend_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of sequences that stand end to end, each within itself.

    Args:
        module: the attention layer.
        query: ``[1, H, N, d]``.
        key: ``[1, H', N, d]``.
        value: ``[1, H', N, d]``.
        attention_mask: None.
        lengths: of the sequences, N together.
        kwargs: of transformers' ``sdpa_attention_forward``.

    Returns:
        ``[1, N, H, d]``, and None for the weights.

    Raises:
        ValueError: where the layer asks for more than causal attention.

    Source: ours; signature of transformers' attention functions.
    """
    if not lengths:  # another thread's, which shares the configuration
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    beyond = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")
    asked = [name for name in beyond if kwargs.get(name) is not None]
    if asked or attention_mask is not None or sum(lengths) != query.shape[2]:
        raise ValueError(f"attend_apart: cannot do {asked or 'masks'}, or was not told the lengths")
    # Split once: slices would each have a gradient as large as the whole.
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]
    return torch.cat(found, dim=1), None


AttentionInterface.register(APART, attend_apart)

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def packs(backbone: Any) -> bool:
    """Whether a transformer says the same of sequences end to end: asked, and remembered.

    Not of one that recomputes activations in the backward pass, when `attend_apart` is no longer
    in force, nor of one that is sharded and was not asked before. Nor where some layer looks back
    only so far: several families say so by their masks alone, which are not made here, and a few
    tokens are within any window.

    Args:
        backbone: a bare transformer.

    Source: ours.
    """
    if any(map(_recomputes, backbone.modules())) or not _attends_plainly(backbone.config):
        return False
    known = _known.get(backbone)
    if known is None:
        if is_sharded(backbone):
            return False
        known = _known[backbone] = _probed(backbone)
    return known


def _recomputes(module: nn.Module) -> bool:
    wrapped = isinstance(module, CheckpointWrapper)  # by accelerate's plugin for FSDP
    return wrapped or bool(getattr(module, "gradient_checkpointing", False))


def _attends_plainly(config: Any) -> bool:
    """Whether all layers attend by sdpa, and to everything before a token."""
    text = _text(config)
    if getattr(text, "_attn_implementation", None) not in ("sdpa", APART):  # another thread's
        return False
    if kinds := getattr(text, "layer_types", None):
        return set(kinds) == {"full_attention"}
    windows = ("sliding_window", "attention_chunk_size")
    return all(getattr(text, name, None) is None for name in windows)


@torch.no_grad()
def _probed(backbone: Any) -> bool:
    weight: Tensor = backbone.get_input_embeddings().weight
    ids = torch.arange(15, device=weight.device).view(3, 5) * 7 % len(weight)
    tokens = torch.arange(5, device=weight.device) < torch.tensor([[2], [5], [3]]).to(weight.device)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with _switch, torch.autocast(weight.device.type, enabled=False):
            plain, packed = _asked(backbone, ids), _packed(backbone, ids, tokens)
    except Exception:  # whatever it is that such a model cannot do
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    plain, packed = plain[tokens].float(), packed[tokens].float()
    tolerance = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 0.02
    return bool((plain - packed).abs().max() <= tolerance * plain.abs().max())
