"""How the tokens of a causal language model are scored: by hidden states, or by whole logits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mossrlhf.kernels.chunked_head import applied, capped, is_linear
from mossrlhf.models.packing import states
from mossrlhf.options import inside

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of logits made from hidden states, scaled or capped, by the largest of the model's; else 0.02."""

_whole: ContextVar[bool] = ContextVar("whole", default=False)


@dataclass(frozen=True)
class TokenPath:
    """What is known about a model's way from hidden states to logits.

    Args:
        by_hidden: whether its logits are c·tanh(s·head(x) / c) of its backbone's hidden states x,
            so that the head need not be applied to all of them at once.
        reason: why so, or why not; a clause.
        scale: s.
        softcap: c; None for no cap.

    Source: ours.
    """

    by_hidden: bool
    reason: str
    scale: float = 1.0
    softcap: float | None = None


@contextmanager
def whole_logits() -> Iterator[None]:
    """Score by whole logits and `functional` alone, whatever the model: what the rest is held to.

    Source: ours.
    """
    before = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(before)


def is_whole() -> bool:
    """Whether `whole_logits` is in force. Source: ours."""
    return _whole.get()


def output_head(model: nn.Module) -> nn.Module:
    """Return what maps a model's hidden states to logits.

    Args:
        model: a causal language model of transformers, with or without adapters.

    Source: ours.
    """
    head: nn.Module = inside(model).get_output_embeddings()  # type: ignore[operator]
    return head


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> Float[Tensor, "B L D"]:
    """Return the last hidden states ``[B, L, D]``, those the output head is applied to.

    Args:
        model: a causal language model of transformers, with or without adapters.
        input_ids: ``[B, L]``, padded on the right.
        attention_mask: ``[B, L]``.

    Source: ours.
    """
    return states(inside(model).base_model, input_ids, attention_mask, right_padded=True)


_known: WeakKeyDictionary[nn.Module, TokenPath] = WeakKeyDictionary()


def token_path(model: nn.Module) -> TokenPath:
    """Find out how a model's tokens are scored: asked once, on a few tokens, and remembered.

    It is asked again where its configuration has come to scale or cap logits otherwise, and by
    `announce`.

    Args:
        model: a causal language model.

    Source: ours; asked rather than looked up, since models scale, cap or bias their logits.
    """
    if is_whole():
        return TokenPath(False, "whole_logits() says so")
    known = _known.get(model)
    if known is None or (known.scale, known.softcap) != logit_scaling(inside(model)):
        known = _known[model] = _probed(model)
    return known


def _probed(model: nn.Module) -> TokenPath:
    inner = inside(model)
    scale, softcap = logit_scaling(inner)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        why = f"a {type(inner).__name__} does not say what its output head is"
        return TokenPath(False, why, scale, softcap)
    if adapter := _acting_beside(model):
        why = f"adapters of kind {adapter} do more than its layers tell"
        return TokenPath(False, why, scale, softcap)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(_device(model).type, enabled=False):
            gap, largest, tolerance = _compared(model, scale, softcap)
    except Exception as error:  # whatever it is that such a model cannot do
        raised = f"{type(error).__name__}: {error!s:.100}"
        return TokenPath(False, f"asked by its hidden states, it raises {raised}", scale, softcap)
    finally:
        for module, mode in modes:
            module.training = mode
    if not 0 < largest < torch.inf or not gap <= tolerance * largest:
        why = f"its logits are not its head's: the two differ by up to {gap:.2g} of {largest:.2g}"
        return TokenPath(False, why, scale, softcap)
    how = "by its weight" if is_linear(output_head(model)) else "as a module"
    return TokenPath(True, f"its logits are its head's, which is applied {how}", scale, softcap)


def _compared(model: nn.Module, scale: float, softcap: float | None) -> tuple[float, float, float]:
    """How far the logits of a few tokens are from the model's own, their size, what is allowed."""
    embedded: Tensor = inside(model).get_input_embeddings().weight  # type: ignore[operator]
    size = getattr(embedded, "ds_shape", embedded.shape)[0]  # under ZeRO-3 it is away
    ids = torch.arange(8, device=_device(model))[None] * 7 % size
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    head, hidden = output_head(model), hidden_states(model, ids, mask)
    ours = capped(applied(head, hidden), scale, softcap).to(own.device)
    tolerance = TOLERANCE.get(own.dtype, 0.02)
    if scale == 1.0 and softcap is None:
        tolerance = min(tolerance, 1e-4)  # the same product in the same type
    if own.shape != ours.shape:
        return torch.inf, own.abs().max().item(), tolerance
    return (own - ours).abs().max().item(), own.abs().max().item(), tolerance


# What acts inside of layers alone: the model within says all that the adapted one says.
_IN_LAYERS = {
    "ADALORA", "BOFT", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT",
    "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VERA",
}  # fmt: skip


def _acting_beside(model: nn.Module) -> str | None:
    """The kind of an adapter that acts in the adapted model's own forward as well, or may."""
    for config in getattr(model, "peft_config", {}).values() if inside(model) is not model else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in _IN_LAYERS:
            return kind
        if getattr(config, "alora_invocation_tokens", None):
            return "aLoRA"
    return None


def _device(model: nn.Module) -> torch.device:
    weight: Tensor = inside(model).get_input_embeddings().weight  # type: ignore[operator]
    return weight.device


def logit_scaling(model: nn.Module) -> tuple[float, float | None]:
    """The factor on a model's logits, and their cap, by the names that families use.

    Args:
        model: with a ``config`` of transformers.

    Source: the models of transformers.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    # Gemma; RecurrentGemma; xLSTM.
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((c for name in caps if (c := getattr(text, name, None))), None)


def announce(model: nn.Module | None, name: str) -> None:
    """Find a model's path anew, and say so where it is the long one.

    Args:
        model: a causal language model; None says nothing.
        name: what to call it.

    Warns:
        UserWarning: where whole logits are made; with the reason.

    Source: ours.
    """
    if model is None:
        return
    _known.pop(model, None)
    path = token_path(model)
    if not path.by_hidden and not is_whole():
        warnings.warn(
            f"{name}: its tokens are scored by whole logits, whose memory grows with the "
            f"vocabulary, since {path.reason}",
            UserWarning,
            stacklevel=2,
        )
