"""Statistics of rows of logits, differentiable: one read forward; one read, one write backward."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mossrlhf.kernels.dispatch import backend_of
from mossrlhf.types import TokenStats

IGNORED_ID = -100
"""The id of a row that does not count: all of its numbers are zero, and so is its gradient."""


@torch.library.custom_op("mossrlhf::row_stats", mutates_args=())
def row_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the statistics of N rows.

    Args:
        logits: ``[N, V]`` any floating type, any strides.
        ids: ``[N]``; negative where a row does not count.
        temperature: ``[N]``, float32 at least; may be one number, expanded.
        ref_logits: ``[N, V]`` of the reference; None leaves its numbers out.
        entropy: whether to compute it.
        in_place: whether the gradient may overwrite the logits.

    Returns:
        log-probability, log Σ exp x, entropy, the reference's log-probability, KL(π‖π_ref): ``[N]``
        each, nats, or ``[0]`` where left out; last ``[4, N]``: max z and d of policy and reference.

    Source: the online softmax, arXiv 1805.02867; entropy and KL accumulated alike are ours.
    """
    return backend_of(logits).stats(logits, ids, temperature, ref_logits, entropy)


@row_stats.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    entropy: bool,
    in_place: bool,
) -> tuple[Tensor, ...]:
    rows = logits.shape[0]
    left_out = 0 if ref_logits is None else rows
    sizes = [(rows,), (rows,), (rows if entropy else 0,), (left_out,), (left_out,), (4, rows)]
    return tuple(temperature.new_empty(size) for size in sizes)


@torch.library.custom_op("mossrlhf::row_gradient", mutates_args={"out"})
def row_gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    norms: Tensor,
    coefs: Tensor,
    softcap: float | None,
) -> None:
    """Write the gradient for N rows of logits into `out`.

    Rows that do not count, or whose coefficients are all zero, become zeros, whatever is in them.

    Args:
        out: ``[N, V]`` any floating type; may be `logits` itself.
        logits: ``[N, V]``.
        ids: ``[N]``.
        temperature: ``[N]``.
        ref_logits: ``[N, V]`` or None.
        norms: ``[4, N]`` of `row_stats`.
        coefs: ``[4, N]``: g, α, β, γ (see above).
        softcap: c, where the logits are c·tanh(y/c) and the gradient for y is wanted; else None.

    Source: ours.
    """
    backend_of(logits).gradient(out, logits, ids, temperature, ref_logits, norms, coefs, softcap)


def coefficients(
    norms: Float[Tensor, "4 N"],
    g_logprob: Float[Tensor, " N"],
    *,
    entropy: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    kl: tuple[Float[Tensor, " N"], Float[Tensor, " N"]] | None = None,
    g_logsumexp: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "4 N"]:
    """Fold the gradients of all statistics into g, α, β, γ of the formula above.

    Args:
        norms: of `row_stats`.
        g_logprob: gradient of each log-probability.
        entropy: each entropy and its gradient; None where it takes no part.
        kl: each KL divergence and its gradient; None likewise.
        g_logsumexp: gradient of each log Σ exp x; None likewise.

    Source: ∂log p(a) = 1_a − p, ∂H = −p (log p + H), ∂KL = p (log p − log q − KL).
    """
    log_d = norms[1].log()
    alpha = -g_logprob if g_logsumexp is None else g_logsumexp - g_logprob
    beta = gamma = torch.zeros_like(alpha)
    if entropy is not None:
        value, g = entropy
        alpha = alpha - _times(g, value - log_d)
        beta = -g
    if kl is not None:
        value, g = kl
        alpha = alpha + _times(g, norms[3].log() - log_d - value)
        beta, gamma = beta + g, -g
    return torch.stack([g_logprob, alpha, beta, gamma])


def _times(g: Tensor, x: Tensor) -> Tensor:
    """g·x, and zero where g is, even of a row without a distribution or of an infinite KL."""
    return torch.where(g == 0, 0.0, g * x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, temperature, ref_logits, ctx.entropy, ctx.in_place = inputs
    _, _, entropies, _, kl, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(logits, ids, temperature, ref_logits, norms, entropies, kl)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    logits, ids, temperature, ref_logits, norms, entropies, kl = ctx.saved_tensors
    g_logprob, g_logsumexp, g_entropy, _, g_kl, _ = grads
    coefs = coefficients(
        norms,
        g_logprob,
        entropy=(entropies, g_entropy) if ctx.entropy else None,
        kl=None if ref_logits is None else (kl, g_kl),
        g_logsumexp=g_logsumexp,
    )
    out = logits.detach() if ctx.in_place else torch.empty_like(logits)
    row_gradient(out, logits, ids, temperature, ref_logits, norms, coefs, None)
    return out, None, None, None, None, None


row_stats.register_autograd(_backward, setup_context=_setup_context)


def temperatures(
    temperature: float | Float[Tensor, " N"], logits: Tensor, rows: int
) -> Float[Tensor, " N"]:
    """Return ``[N]`` temperatures in the type statistics are computed in.

    Args:
        temperature: τ of all rows, or of each.
        logits: whatever their type and device are to be taken from.
        rows: N.

    Raises:
        ValueError: where there is neither one nor N of them, one wants a gradient, or is not
            positive (of a tensor on another device than the CPU that is not asked).

    Source: ours.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        if temperature.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "temperature: it requires a gradient, which it does not get; detach it"
            )
        asked = temperature.device.type == "cpu" and not torch.compiler.is_compiling()
        if asked and not bool((temperature > 0).all()):
            raise ValueError(
                f"temperature: got {temperature.min().item()}, expected numbers above 0"
            )
        if temperature.shape not in ((), (rows,)):
            raise ValueError(
                f"temperature: got {tuple(temperature.shape)}, expected a number or one for each "
                f"of {rows} tokens"
            )
        return temperature.to(logits.device, dtype).expand(rows)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    return torch.full((1,), temperature, dtype=dtype, device=logits.device).expand(rows)


def token_stats(
    logits: Float[Tensor, "*shape V"],
    ids: Int[Tensor, "*shape"],
    temperature: float | Float[Tensor, "*shape"] = 1.0,
    entropy: bool = True,
    ref_logits: Float[Tensor, "*shape V"] | None = None,
    *,
    in_place: bool = False,
) -> TokenStats:
    """Log-probability, log-sum-exp and, where asked for, entropy and exact KL of every token.

    The same numbers as `functional.token_stats`, without its copies of the logits: on CUDA by one
    triton kernel each way, elsewhere by torch a few rows at a time.
    Computed in float32 (float64 logits in float64). Differentiable in the logits; the reference is
    a constant.

    Args:
        logits: ``[..., V]`` any floating type; copied once where rows are not evenly apart, as in
            ``logits[:, :-1]`` of several sequences.
        ids: ``[...]``; `IGNORED_ID` (any negative id) where a row does not count.
        temperature: τ the tokens were drawn at, one for all or ``[...]``.
        entropy: False leaves the entropy out.
        ref_logits: ``[..., V]`` of the reference, for its log-probability and the exact KL
            divergence from it; at the same τ.
        in_place: whether the gradient overwrites the logits, which saves their memory once more;
            a second backward pass then raises.

    Returns:
        `TokenStats` of ``[...]``, nats.

    Raises:
        ValueError: where shapes do not fit, a temperature is not positive, or the reference
            wants a gradient.

    Source: P1 §3.2, §5.2 (KL), §5.3.1 (entropy).
    """
    if ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"ids: got {tuple(ids.shape)}, expected {tuple(logits.shape[:-1])}, one for each row "
            "of logits"
        )
    rows = ids.numel()
    flat, flat_ref = logits.reshape(rows, logits.shape[-1]), None
    if ref_logits is not None:
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits: got {tuple(ref_logits.shape)}, expected {tuple(logits.shape)}"
            )
        if ref_logits.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "ref_logits: they require a gradient, which the reference does not get; detach "
                "them, or use functional.exact_kl"
            )
        flat_ref = ref_logits.reshape(flat.shape)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(ids.shape).reshape(rows)
    taus = temperatures(temperature, logits, rows)
    logprob, logsumexp, entropies, ref_logprob, kl, _ = row_stats(
        flat, ids.reshape(rows), taus, flat_ref, entropy, in_place
    )
    return TokenStats(
        logprob=logprob.view(ids.shape),
        entropy=entropies.view(ids.shape) if entropy else None,
        logsumexp=logsumexp.view(ids.shape),
        ref_logprob=None if flat_ref is None else ref_logprob.view(ids.shape),
        kl=None if flat_ref is None else kl.view(ids.shape),
    )
