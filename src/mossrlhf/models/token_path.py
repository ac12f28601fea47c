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

from mossrlhf.kernels.head import capped
from mossrlhf.kernels.modules import is_linear
from mossrlhf.signature import inside

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of logits made from hidden states, relative to the largest of the model's own; else 0.02."""

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
    backbone = inside(model).base_model
    hidden: Tensor = backbone(  # type: ignore[operator]
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    return hidden


_known: WeakKeyDictionary[nn.Module, TokenPath] = WeakKeyDictionary()


def token_path(model: nn.Module) -> TokenPath:
    """Find out how a model's tokens are scored: asked once, on a few tokens, and remembered.

    Args:
        model: a causal language model.

    Source: ours; asked rather than looked up, since models scale, cap or bias their logits.
    """
    if is_whole():
        return TokenPath(False, "whole_logits() says so")
    if model not in _known:
        _known[model] = _probed(model)
    return _known[model]


def _probed(model: nn.Module) -> TokenPath:
    inner = inside(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        return TokenPath(False, f"a {type(inner).__name__} does not say what its output head is")
    scale, softcap = _from_config(inner)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(_device(model).type, enabled=False):
            own, ours = _both(model, scale, softcap)
    except Exception as error:  # whatever it is that such a model cannot do
        raised = f"{type(error).__name__}: {error!s:.100}"
        return TokenPath(False, f"its backbone alone raises {raised}")
    finally:
        model.train(training)
    tolerance = TOLERANCE.get(own.dtype, 0.02) * own.abs().max()
    gap = (own - ours).abs().max() if own.shape == ours.shape else own.new_tensor(torch.inf)
    if not bool(gap <= tolerance):
        return TokenPath(
            False, f"its logits are not its head's: the two differ by up to {gap.item():.2g}"
        )
    how = "by its weight" if is_linear(output_head(model)) else "as a module"
    return TokenPath(True, f"its logits are its head's, which is applied {how}", scale, softcap)


def _both(model: nn.Module, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The logits of a few tokens, by the model itself and from its hidden states."""
    size = int(inside(model).get_input_embeddings().num_embeddings)  # type: ignore[operator]
    ids = torch.arange(8, device=_device(model))[None] * 7 % size
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    ours = capped(output_head(model)(hidden_states(model, ids, mask)), scale, softcap)
    return own, ours


def _device(model: nn.Module) -> torch.device:
    weight: Tensor = inside(model).get_input_embeddings().weight  # type: ignore[operator]
    return weight.device


def _from_config(model: nn.Module) -> tuple[float, float | None]:
    """The factor on a model's logits, and their cap, by the names that families use."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    return scale, getattr(text, "final_logit_softcapping", None)  # Gemma


def announce(model: nn.Module, name: str) -> None:
    """Find a model's path, and say so where it is the long one.

    Args:
        model: a causal language model.
        name: what to call it.

    Warns:
        UserWarning: where whole logits are made; with the reason.

    Source: ours.
    """
    path = token_path(model)
    if not path.by_hidden and not is_whole():
        warnings.warn(
            f"{name}: its tokens are scored by whole logits, whose memory grows with the "
            f"vocabulary, since {path.reason}",
            UserWarning,
            stacklevel=2,
        )
