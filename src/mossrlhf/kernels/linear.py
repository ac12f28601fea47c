"""From hidden states to statistics and losses of tokens; logits live one chunk at a time.

A matrix unit is 2·N·V·D floating-point operations. `linear_token_stats` spends one to score, and
three more where a gradient is wanted: logits again, and the gradients of hidden states and weight.
`linear_token_loss` spends three in all: what a loss per token makes of log-probability and entropy
is known in the forward pass, so the logits of a chunk serve both ways before they are let go.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossrlhf.kernels.dispatch import backend_of
from mossrlhf.kernels.head import Head, rounded
from mossrlhf.kernels.rows import coefficients, temperatures
from mossrlhf.types import LossOutput, TokenStats

LossFn = Callable[[TokenStats, slice], LossOutput]
"""Statistics of some tokens, and which of the N they are → their share of the loss."""


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tau: Tensor,
        settings: tuple[float, float | None],
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(hidden, weight, bias, *settings)
        found: list[tuple[Tensor, ...]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                found.append(backend_of(z).stats(z, ids[rows], tau[rows], None, entropy))
                del z  # before the next is made
        logprob, logsumexp, entropies, _, _, norms = (
            torch.cat(parts, -1) for parts in zip(*found, strict=True)
        )
        ctx.save_for_backward(hidden, weight, bias, ids, tau, norms, entropies)
        ctx.settings, ctx.entropy, ctx.dtype = settings, entropy, head.dtype
        return logprob, logsumexp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, tau, norms, entropies = ctx.saved_tensors
        g_logprob, g_logsumexp, g_entropy = grads
        coefs = coefficients(
            norms,
            g_logprob,
            entropy=(entropies, g_entropy) if ctx.entropy else None,
            g_logsumexp=g_logsumexp,
        )
        scale, softcap = ctx.settings
        head = Head(hidden, weight, bias, scale, softcap, ctx.dtype)
        head.want(*ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                head.add_gradient(rows, z, ids, tau, norms[:, rows], coefs[:, rows])
                del z
        return *(rounded(g) for g in head.gradients), None, None, None, None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        tau: Tensor,
        settings: tuple[float, float | None],
        entropy: bool,
        loss_fn: LossFn,
        stats: dict[str, Tensor],
    ) -> Tensor:
        head = Head(hidden, weight, bias, *settings)
        needed = ctx.needs_input_grad[:3]
        head.want(*needed)
        total = tau.new_zeros(())
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z = head.logits(rows)
                logprob, logsumexp, entropies, _, _, norms = backend_of(z).stats(
                    z, ids[rows], tau[rows], None, entropy
                )
                given = TokenStats(logprob, entropies if entropy else None, logsumexp)
                share, grads = _differentiated(loss_fn, given, rows, any(needed))
                total = total + share.loss.detach()
                for name, value in share.stats.items():
                    value = value.detach()
                    stats[name] = stats[name] + value if name in stats else value
                if grads is not None:
                    coefs = coefficients(
                        norms,
                        grads[0],
                        entropy=(entropies, grads[2]) if entropy else None,
                        g_logsumexp=grads[1],
                    )
                    head.add_gradient(rows, z, ids, tau, norms, coefs)
                del z  # before the next is made
        ctx.gradients = head.gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: its gradient was computed once and has been handed on; for a "
                "second backward pass call it again, or use linear_token_stats"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (rounded(g, upstream) for g in gradients)
        return *scaled, None, None, None, None, None, None


def _differentiated(
    loss_fn: LossFn, given: TokenStats, rows: slice, wanted: bool
) -> tuple[LossOutput, list[Tensor] | None]:
    """Return a chunk's loss, and its gradients for log-probability, log-sum-exp and entropy."""
    leaves = [x for x in (given.logprob, given.logsumexp, given.entropy) if x is not None]
    with torch.set_grad_enabled(wanted):
        for leaf in leaves:
            leaf.requires_grad_(wanted)
        share = loss_fn(given, rows)
        if share.loss.shape != ():
            raise ValueError(
                f"loss_fn: returned {tuple(share.loss.shape)}, expected the sum over the tokens it "
                "was given, a scalar"
            )
        if not wanted:
            return share, None
        found: Any = [None] * len(leaves)
        if share.loss.requires_grad:
            found = torch.autograd.grad(share.loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return share, [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


@torch.compiler.disable
def linear_token_stats(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, " N"],
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """`token_stats` of z = c·tanh(s (x Wᵀ + b) / c), from the hidden states x.

    One matrix unit to score; with a gradient four, since logits are made again.

    Args:
        hidden: ``[N, D]`` hidden states at the positions before each token.
        weight: ``[V, D]`` of the output head; its gradient is summed in float32.
        ids: ``[N]``; `IGNORED_ID` (any negative id) where a row does not count.
        temperature: τ the tokens were drawn at, one for all or ``[N]``.
        entropy: False leaves the entropy out.
        bias: ``[V]`` b, or None.
        scale: s, a factor on the logits.
        softcap: c, or None for no cap.

    Returns:
        `TokenStats` of ``[N]``, nats.

    Raises:
        ValueError: where shapes do not fit.

    Source: P1 §3.2; softcap: Gemma 2 (arXiv 2408.00118 §2).
    """
    _require_shapes(hidden, weight, ids)
    logprob, logsumexp, entropies = _LinearStats.apply(
        hidden,
        weight,
        bias,
        ids,
        temperatures(temperature, hidden, len(ids)),
        (scale, softcap),
        entropy,
    )
    return TokenStats(logprob, entropies if entropy else None, logsumexp)


@torch.compiler.disable
def linear_token_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, " N"],
    loss_fn: LossFn,
    *,
    temperature: float | Float[Tensor, " N"] = 1.0,
    entropy: bool = True,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> LossOutput:
    """A loss that is a sum over tokens, with its gradient in three matrix units instead of four.

    `loss_fn` is called once for each chunk of tokens; autograd runs through it alone, on ``[n]``
    numbers. Losses that couple tokens (a mean over a sequence's ratios) need
    `linear_token_stats`. Whatever else `loss_fn` reads is a constant: parameters of its own get
    no gradient. Not for losses scaled in float16: the gradient is rounded before the scale comes.

    Args:
        hidden: ``[N, D]`` hidden states at the positions before each token.
        weight: ``[V, D]`` of the output head; its gradient is summed in float32.
        ids: ``[N]``; `IGNORED_ID` (any negative id) where a row does not count.
        loss_fn: takes `TokenStats` of n tokens and the slice of N they are, and returns their
            share of the loss and of its statistics, which are added up.
        temperature: τ the tokens were drawn at, one for all or ``[N]``.
        entropy: False leaves the entropy out.
        bias: ``[V]`` b, or None.
        scale: s, a factor on the logits.
        softcap: c, or None for no cap.

    Returns:
        the sum of the shares; a second backward pass through it raises.

    Raises:
        ValueError: where shapes do not fit, or `loss_fn` returns no scalar.

    Source: ours.
    """
    _require_shapes(hidden, weight, ids)
    if not torch.is_grad_enabled():  # an autograd function is not told
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    stats: dict[str, Tensor] = {}
    loss = _LinearLoss.apply(
        hidden,
        weight,
        bias,
        ids,
        temperatures(temperature, hidden, len(ids)),
        (scale, softcap),
        entropy,
        loss_fn,
        stats,
    )
    return LossOutput(loss, stats)


def _require_shapes(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
    if hidden.ndim != 2 or ids.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden, weight, ids: got {tuple(hidden.shape)}, {tuple(weight.shape)} and "
            f"{tuple(ids.shape)}, expected [N, D], [V, D] and [N]; gather the rows that count first"
        )
