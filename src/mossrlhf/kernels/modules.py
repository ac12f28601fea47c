"""Any output head: a linear layer by its weight, whatever else as it is, a chunk at a time."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
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
    weight = head._parameters.get("weight")  # not by name, which under ZeRO-3 fetches it
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if not plain or weight is None or weight.is_meta or hasattr(head, "_hf_hook"):
        return False
    if _is_lent(weight):
        return True  # its hooks are ZeRO-3's
    # DTensors are what a head is sharded into; other subclasses (quantized ones) multiply anew.
    if type(weight) not in (nn.Parameter, Tensor) and type(weight.data).__name__ != "DTensor":
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks)
    return not any(hooks) and not head._backward_pre_hooks and not _global_hooks()


def applied(head: nn.Module, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape V"]:
    """Apply a head as it will be when tokens are scored: by its weight, if that says it all.

    Args:
        head: any.
        hidden: ``[..., D]``.

    Source: ours.
    """
    if not is_linear(head):
        return head(hidden)
    return _within(head, lambda x: nn.Linear.forward(head, x), hidden)  # type: ignore[arg-type]


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

    One that is more than a weight, and is sharded by itself, is run once, on all N tokens.

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
        options |= dict(scale=scale, softcap=softcap)

        def by_weight(x: Tensor) -> tuple[Tensor | None, ...]:
            stats = linear_token_stats(x, head.weight, ids, bias=head.bias, **options)
            return stats.logprob, stats.entropy, stats.logsumexp

        return TokenStats(*_within(head, by_weight, hidden))

    def score(x: Tensor, tokens: Tensor, tau: Any) -> tuple[Any, ...]:
        logits = capped(head(x), scale, softcap)
        stats = token_stats(logits, tokens, tau, entropy)
        return stats.logprob, stats.entropy, stats.logsumexp

    if any(map(_is_lent, head.parameters())) or isinstance(head, FSDPModule):
        # Each call is an exchange between processes, which must be as many on all of them.
        return TokenStats(*score(hidden, ids, temperature))
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
        found: dict[str, Tensor] = {}

        def by_weight(x: Tensor) -> Tensor:
            output = linear_token_loss(x, head.weight, ids, loss_fn, bias=head.bias, **options)
            found.update(output.stats)
            return output.loss

        return LossOutput(_within(head, by_weight, hidden), found)
    return loss_fn(head_token_stats(head, hidden, ids, **options), slice(0, len(ids)))


def _is_lent(weight: Tensor | None) -> bool:
    """Whether a weight is ZeRO-3's, which is there only while its module is called."""
    return hasattr(weight, "ds_id")


def _within(head: Any, work: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Do some work with a head's weight, inside of a call of the head where its weight is lent.

    The hooks that fetch and drop it, forward and backward, then see one call like any other.
    """
    if not _is_lent(head._parameters["weight"]):
        return work(hidden)
    head.forward = work
    try:
        return head(hidden)
    finally:
        del head.forward


def _global_hooks() -> bool:
    """Whether a hook on all modules is there to be called."""
    known = (module._global_forward_hooks, module._global_forward_pre_hooks)
    return any(known) or bool(module._global_backward_hooks)


def _width(head: nn.Module) -> int:
    """The number of logits a head gives; where it does not say, a common one will do."""
    return int(getattr(head, "out_features", 2**16))
