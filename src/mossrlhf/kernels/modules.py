"""Any output head: a linear layer by its weight, whatever else as it is, a chunk at a time."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
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
    if type(head) is not nn.Linear:
        return False
    if hasattr(head.weight, "ds_id"):
        return True  # ZeRO-3's hooks gather what its weight, read by name, gathers as well
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks
    return not hooked and not hasattr(head, "_hf_hook") and not head.weight.is_meta


def head_token_stats(
    head: nn.Module,
    hidden: Float[Tensor, "N D"],
    ids: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`linear_token_stats` of any head; one that is more than a weight is run twice for a gradient.

    Args:
        head: maps ``[n, D]`` to logits ``[n, V]``.
        hidden: ``[N, D]``.
        ids: ``[N]``.
        temperature: τ the tokens were drawn at.
        entropy: False leaves the entropy out.
        scale: s, a factor on the logits.
        softcap: c, or None for no cap.

    Returns:
        `TokenStats` of ``[N]``, nats.

    Source: ours; recomputed chunks: Chen et al. (arXiv 1604.06174).
    """
    options: dict[str, Any] = dict(temperature=temperature, entropy=entropy)
    if is_linear(head):
        options |= dict(bias=head.bias, scale=scale, softcap=softcap)
        return linear_token_stats(hidden, head.weight, ids, **options)  # type: ignore[arg-type]

    def score(x: Tensor, tokens: Tensor) -> tuple[Tensor | None, ...]:
        stats = token_stats(capped(head(x), scale, softcap), tokens, **options)
        return stats.logprob, stats.entropy, stats.logsumexp

    parts = []
    for rows in chunks(len(ids), _width(head), hidden.is_cuda):
        given = hidden[rows], ids[rows]
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


def _width(head: nn.Module) -> int:
    """The number of logits a head gives; where it does not say, a common one will do."""
    return int(getattr(head, "out_features", 2**16))
