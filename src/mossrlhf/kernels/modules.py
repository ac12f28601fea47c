"""Any output head: a linear layer by its weight, whatever else as it is, a chunk at a time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module
from torch.utils.checkpoint import checkpoint

from mossrlhf.kernels.head import capped, chunks
from mossrlhf.kernels.linear import LossFn, linear_token_loss, linear_token_stats
from mossrlhf.kernels.rows import token_stats
from mossrlhf.types import LossOutput, TokenStats


def is_linear(head: nn.Module) -> bool:
    """Whether a head is x Wᵀ + b and nothing else, so that its weight says it all.

    Args:
        head: with adapters around it, quantized, parametrized or hooked, it is not.

    Source: ours.
    """
    weight = getattr(head, "weight", None)
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if not plain or weight is None or weight.is_meta or hasattr(head, "_hf_hook"):
        return False
    if hasattr(weight, "ds_id"):
        return True  # ZeRO-3's hooks gather what its weight, read by name, gathers as well
    # DTensors are what a head is sharded into; other subclasses (quantized ones) multiply anew.
    if type(weight) not in (nn.Parameter, Tensor) and type(weight.data).__name__ != "DTensor":
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    return not any(hooks) and not head._backward_pre_hooks and not _global_hooks()


def head_token_stats(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`linear_token_stats` of any head; one that is more than a weight is run twice for a gradient.

    Args:
        head: maps ``[n, D]`` to logits ``[n, V]``.
        hidden: ``[N, D]``.
        ids: ``[N]``.
        temperature: τ the tokens were drawn at, one for all or ``[N]``.
        entropy: False leaves the entropy out.
        scale: s, a factor on the logits.
        softcap: c, or None for no cap.

    Returns:
        `TokenStats` of ``[N]``, nats.

    Source: ours; recomputed chunks: Chen et al. (arXiv 1604.06174).
    """
    if is_linear(head):
        options: dict[str, Any] = dict(temperature=temperature, entropy=entropy)
        options |= dict(bias=head.bias, scale=scale, softcap=softcap)
        return linear_token_stats(hidden, head.weight, ids, **options)

    def score(x: Tensor, tokens: Tensor, tau: Any) -> tuple[Tensor | None, ...]:
        logits = capped(head(x), scale, softcap)
        stats = token_stats(logits, tokens, tau, entropy)
        return stats.logprob, stats.entropy, stats.logsumexp

    parts = []
    for rows in chunks(len(ids), _width(head), hidden.is_cuda):
        tau = temperature
        if isinstance(tau, Tensor) and tau.ndim:
            tau = tau[rows]
        given = hidden[rows], ids[rows], tau
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, *given, use_reentrant=False))
        else:
            parts.append(score(*given))
    logprob, entropies, logsumexp = (
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )
    assert logprob is not None
    return TokenStats(logprob, entropies, logsumexp)


def head_token_loss(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    ids: Int[Tensor, " N"],
    loss_fn: LossFn,
    **options: Any,
) -> LossOutput:
    """`linear_token_loss` of any head; one that is more than a weight costs a fourth matrix unit.

    Args:
        head: maps ``[n, D]`` to logits ``[n, V]``.
        hidden: ``[N, D]``.
        ids: ``[N]``.
        loss_fn: takes `TokenStats` of some tokens and the slice of N they are.
        options: of `head_token_stats`.

    Source: ours.
    """
    if is_linear(head):
        return linear_token_loss(
            hidden,
            head.weight,
            ids,
            loss_fn,
            bias=head.bias,
            **options,
        )
    return loss_fn(head_token_stats(head, hidden, ids, **options), slice(0, len(ids)))


def _global_hooks() -> bool:
    """Whether a hook on all modules is there to be called."""
    known = (module._global_forward_hooks, module._global_forward_pre_hooks)
    return any(known) or bool(module._global_backward_hooks)


def _width(head: nn.Module) -> int:
    """The number of logits a head gives; where it does not say, a common one will do."""
    return int(getattr(head, "out_features", 2**16))
