"""Log-probabilities of tokens under a causal language model, and losses made of them.

The output head is applied to the hidden states that are needed, a chunk at a time
(`kernels.chunked_head`). A loss that is a sum over tokens gets its gradient in the forward pass
(`policy_loss`); one that couples tokens, or that `optimization` may not fuse, is computed from
`policy_stats`, whose chunks are computed again in the backward pass. Full logits are made only
of models whose logits cannot be computed from hidden states and head (`token_path`).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mossrlhf import functional, kernels
from mossrlhf.functional import lm_loss
from mossrlhf.kernels.chunked_head import applied, capped, is_linear
from mossrlhf.models.backbone import accepts, evaluation_mode, last_hidden_states, text_config
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.types import LossOutput, Rollout, TokenStats

IGNORED_LABEL = -100
"""The label of tokens that a language-model loss skips."""

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of scaled or capped logits, relative to the largest; in other types 0.02."""

_WITHIN_LAYERS = {
    "ADALORA", "BOFT", "FOURIERFT", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "OFT",
    "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VERA",
}  # fmt: skip
"""Adapters that act within layers alone: the unwrapped model computes all that they do."""

_by_full_logits: ContextVar[bool] = ContextVar("full_logits", default=False)
_known: WeakKeyDictionary[nn.Module, "TokenPath"] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenPath:
    """How a model's tokens are scored: from hidden states, or from full logits.

    Args:
        by_hidden: whether the logits are c·tanh(s·head(x) / c) of the backbone's hidden states x,
            so that the head need not be applied to all of them at once.
        reason: why, or why not; a clause.
        scale: s.
        softcap: c; None for no cap.
    """

    by_hidden: bool
    reason: str
    scale: float = 1.0
    softcap: float | None = None


def policy_stats(
    policy: nn.Module, batch: Rollout, temperature: float = 1.0, entropy: bool = False
) -> TokenStats:
    """Compute the log-probability (and entropy) of every response token in the mask.

    Logits come from the position before the token. The output head is applied to those hidden
    states alone, a chunk at a time, where the model allows it (`token_path`).

    Args:
        policy: a causal language model: the policy or the reference model.
        batch: B sequences with N tokens in their mask.
        temperature: τ the tokens were sampled at.
        entropy: whether to compute the entropy too.

    Returns:
        `TokenStats` of ``[N]``, nats, in the order of ``batch.mask``.
    """
    path = token_path(policy)
    if not path.by_hidden:
        return _stats_from_full_logits(policy, batch, temperature, entropy)
    hidden, ids = _before_tokens(policy, batch)
    options = _options(path, temperature=temperature, entropy=entropy)
    return kernels.head_token_stats(output_head(policy), hidden, ids, **options)


def policy_loss(
    policy: nn.Module,
    batch: Rollout,
    loss_fn: Callable[..., LossOutput],
    temperature: float = 1.0,
    entropy: bool = False,
) -> LossOutput:
    """Compute a loss that is a sum over response tokens, and in the same pass its gradient.

    A linear head then takes three matrix products; ``loss_fn(policy_stats(...))`` takes four.

    Args:
        policy: a causal language model.
        batch: B sequences with N tokens in their mask.
        loss_fn: takes `TokenStats` of some of the N tokens, and their slice.
        temperature: τ the tokens were sampled at.
        entropy: whether the loss needs entropies.

    Returns:
        the sum of what `loss_fn` returns.
    """
    path = token_path(policy)
    if not path.by_hidden:
        stats = _stats_from_full_logits(policy, batch, temperature, entropy)
        return loss_fn(stats, slice(0, len(stats.logprob)))
    hidden, ids = _before_tokens(policy, batch)
    options = _options(path, temperature=temperature, entropy=entropy)
    return kernels.head_token_loss(output_head(policy), hidden, ids, loss_fn, **options)


def language_model_loss(
    policy: nn.Module, batch: Mapping[str, Tensor], fused: bool = False
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Compute the summed next-token loss of labeled tokens, in nats, and their number.

    Args:
        policy: a causal language model.
        batch: input_ids, attention_mask and labels, ``[B, L]`` each.
        fused: whether to compute the gradient along with the loss, as in `policy_loss`.

    Source: P1 eq. 17.
    """
    path = token_path(policy)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    if not path.by_hidden:
        output = policy(input_ids=ids, attention_mask=mask, use_cache=False)
        return lm_loss(output.logits, labels, IGNORED_LABEL)
    counted = labels[:, 1:] != IGNORED_LABEL
    given = hidden_states(policy, ids, mask)[:, :-1][counted], labels[:, 1:][counted]
    head, options = output_head(policy), _options(path, entropy=False)
    if fused:
        return kernels.head_token_loss(head, *given, _negative_sum, **options).loss, counted.sum()
    return -kernels.head_token_stats(head, *given, **options).logprob.sum(), counted.sum()


def _negative_sum(stats: TokenStats, rows: slice) -> LossOutput:
    return LossOutput(-stats.logprob.sum())


def _options(path: TokenPath, **options: Any) -> dict[str, Any]:
    return dict(scale=path.scale, softcap=path.softcap, **options)


def _before_tokens(policy: nn.Module, batch: Rollout) -> tuple[Tensor, Tensor]:
    """Return the hidden states ``[N, D]`` before the tokens in the mask, and those tokens."""
    hidden = hidden_states(policy, batch.input_ids, batch.attention_mask.long())
    rows, columns = batch.mask.nonzero(as_tuple=True)
    return hidden[rows, batch.state_index[rows, columns]], batch.response_ids[rows, columns]


def _stats_from_full_logits(
    policy: nn.Module, batch: Rollout, temperature: float, entropy: bool
) -> TokenStats:
    extra: dict[str, Any] = {}
    if accepts(policy, "logits_to_keep"):
        extra["logits_to_keep"] = batch.input_ids.shape[1] - int(batch.prompt_lengths.min()) + 1
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        use_cache=False,
        **extra,
    ).logits
    skipped = batch.input_ids.shape[1] - logits.shape[1]
    rows, columns = batch.mask.nonzero(as_tuple=True)
    picked = logits[rows, batch.state_index[rows, columns] - skipped]
    score = functional.token_stats if _by_full_logits.get() else kernels.token_stats
    return score(picked, batch.response_ids[rows, columns], temperature, entropy)


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that maps hidden states to logits."""
    head: nn.Module = unwrap_peft(model).get_output_embeddings()  # type: ignore[operator]
    return head


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor
) -> Float[Tensor, "B L D"]:
    """Return the hidden states that the output head is applied to; padding is on the right."""
    backbone = unwrap_peft(model).base_model
    return last_hidden_states(backbone, input_ids, attention_mask, right_padded=True)


@contextmanager
def full_logits() -> Iterator[None]:
    """Score by full logits and `functional` alone for the block, to compare the fast path with."""
    before = _by_full_logits.set(True)
    try:
        yield
    finally:
        _by_full_logits.reset(before)


def token_path(model: nn.Module) -> TokenPath:
    """Find out how a causal language model's tokens are scored, by probing it on a few tokens.

    The result is remembered until `announce`, or until the configuration scales or caps logits
    differently. It is probed rather than looked up, since models scale, cap or bias their logits.
    """
    if _by_full_logits.get():
        return TokenPath(False, "by full_logits()")
    known = _known.get(model)
    if known is None or (known.scale, known.softcap) != logit_scaling(unwrap_peft(model)):
        known = _known[model] = _probe(model)
    return known


def announce(model: nn.Module | None, name: str) -> None:
    """Probe a model again, and warn under its name where its tokens are scored by full logits.

    Warns:
        UserWarning: with the reason.
    """
    if model is None:
        return
    _known.pop(model, None)
    path = token_path(model)
    if not path.by_hidden and not _by_full_logits.get():
        warnings.warn(
            f"{name}: its tokens are scored by full logits, whose memory grows with the "
            f"vocabulary, since {path.reason}",
            UserWarning,
            stacklevel=2,
        )


def _probe(model: nn.Module) -> TokenPath:
    bare = unwrap_peft(model)
    scale, softcap = logit_scaling(bare)
    if not hasattr(bare, "get_output_embeddings") or not hasattr(bare, "base_model"):
        why = f"a {type(bare).__name__} does not say what its output head is"
        return TokenPath(False, why, scale, softcap)
    if adapter := _adapter_beyond_layers(model):
        why = f"adapters of kind {adapter} act outside of its layers, too"
        return TokenPath(False, why, scale, softcap)
    try:
        with evaluation_mode(model), torch.no_grad():
            gap, largest, tolerance = _compare(model, scale, softcap)
    except Exception as error:  # whatever a model raises that cannot be probed
        raised = f"{type(error).__name__}: {error!s:.100}"
        return TokenPath(
            False, f"computing its hidden states alone raises {raised}", scale, softcap
        )
    if not 0 < largest < torch.inf or not gap <= tolerance * largest:
        why = f"its logits are not its head's: the two differ by up to {gap:.2g} of {largest:.2g}"
        return TokenPath(False, why, scale, softcap)
    how = "by its weight" if is_linear(output_head(model)) else "as a module"
    return TokenPath(True, f"its logits are its head's, which is applied {how}", scale, softcap)


def _compare(model: nn.Module, scale: float, softcap: float | None) -> tuple[float, float, float]:
    """Return the largest difference between head's and model's logits, their size, a tolerance."""
    embedded: Tensor = unwrap_peft(model).get_input_embeddings().weight  # type: ignore[operator]
    size = getattr(embedded, "ds_shape", embedded.shape)[0]  # ZeRO-3 has partitioned it
    ids = torch.arange(8, device=embedded.device)[None] * 7 % size
    mask = torch.ones_like(ids)
    with torch.autocast(embedded.device.type, enabled=False):
        own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        head, hidden = output_head(model), hidden_states(model, ids, mask)
        ours = capped(applied(head, hidden), scale, softcap).to(own.device)
    tolerance = _TOLERANCE.get(own.dtype, 0.02)
    if scale == 1.0 and softcap is None:
        tolerance = min(tolerance, 1e-4)  # the same product in the same type
    if own.shape != ours.shape:
        return torch.inf, own.abs().max().item(), tolerance
    return (own - ours).abs().max().item(), own.abs().max().item(), tolerance


def _adapter_beyond_layers(model: nn.Module) -> str | None:
    """Return the kind of an adapter that acts, or may act, outside of layers too."""
    wrapped = unwrap_peft(model) is not model
    for config in getattr(model, "peft_config", {}).values() if wrapped else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in _WITHIN_LAYERS:
            return kind
        if getattr(config, "alora_invocation_tokens", None):
            return "aLoRA"
    return None


def logit_scaling(model: nn.Module) -> tuple[float, float | None]:
    """Return the factor on a model's logits and their cap, by the names that families use."""
    text = text_config(getattr(model, "config", None))
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= getattr(text, name, None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0  # Granite
    # Gemma; RecurrentGemma; xLSTM.
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((c for name in caps if (c := getattr(text, name, None))), None)
