"""Log-probability, entropy and KL divergence of tokens, in float32 at least."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mossrlhf.functional.reduce import upcast
from mossrlhf.types import TokenStats


def token_logprobs(
    logits: Float[Tensor, "*shape V"], ids: Int[Tensor, "*shape"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Log π(a) = z_a/τ − log Σ_v exp(z_v/τ), in nats.

    Args:
        logits: ``[..., V]`` any floating type; scored in float32 at least.
        ids: ``[...]`` the token at each place.
        temperature: τ the tokens were drawn at, so that they are scored under the distribution
            they came from.

    Source: P1 §3.2 (the policy π).
    """
    scaled = upcast(logits) / temperature
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy_from_logits(
    logits: Float[Tensor, "*shape V"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """H = −Σ_v p_v log p_v, in nats, with p = softmax(z/τ).

    Tokens of probability zero (logit −∞) add nothing, neither to the entropy nor to its gradient.

    Args:
        logits: ``[..., V]``.
        temperature: τ.

    Source: P1 §5.3.1 (entropy bonus).
    """
    logp = (upcast(logits) / temperature).log_softmax(-1)
    # At zero e^x x is zero too; a NaN stays one.
    safe = torch.where(logp != -torch.inf, logp, torch.zeros_like(logp))
    return -(safe.exp() * safe).sum(-1)


def token_stats(
    logits: Float[Tensor, "*shape V"],
    ids: Int[Tensor, "*shape"],
    temperature: float = 1.0,
    entropy: bool = True,
    ref_logits: Float[Tensor, "*shape V"] | None = None,
) -> TokenStats:
    """Log-probability, log-sum-exp and, where asked for, entropy and exact KL of every token.

    The reference that `kernels.token_stats` is held to.

    Args:
        logits: ``[..., V]``.
        ids: ``[...]``.
        temperature: τ the tokens were drawn at.
        entropy: False leaves the entropy out.
        ref_logits: ``[..., V]`` of the reference, for its log-probability and the KL divergence.

    Returns:
        `TokenStats` with ``[...]`` tensors, nats.

    Source: `token_logprobs`, `entropy_from_logits` and `exact_kl`.
    """
    return TokenStats(
        logprob=token_logprobs(logits, ids, temperature),
        entropy=entropy_from_logits(logits, temperature) if entropy else None,
        logsumexp=(upcast(logits) / temperature).logsumexp(-1),
        ref_logprob=None if ref_logits is None else token_logprobs(ref_logits, ids, temperature),
        kl=None if ref_logits is None else exact_kl(logits, ref_logits, temperature),
    )


def kl_k1(
    logprob: Float[Tensor, "*shape"], ref_logprob: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k1 = log π − log π_ref: unbiased, signed; the penalty of P1 eq. 19.

    Args:
        logprob: ``[...]`` of tokens drawn from π, nats.
        ref_logprob: ``[...]`` under the reference.

    Source: P1 eq. 19; Schulman, "Approximating KL divergence" (2020).
    """
    return logprob - ref_logprob


def kl_k2(
    logprob: Float[Tensor, "*shape"], ref_logprob: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k2 = ½ (log π − log π_ref)²: biased, but its gradient is the KL divergence's.

    Args:
        logprob: ``[...]`` of tokens drawn from π, nats.
        ref_logprob: ``[...]`` under the reference.

    Source: Schulman (2020). The one to differentiate: k1's expected gradient is zero, k3's is
        that of the reverse divergence.
    """
    return 0.5 * (logprob - ref_logprob) ** 2


def kl_k3(
    logprob: Float[Tensor, "*shape"], ref_logprob: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k3 = π_ref/π − 1 − log(π_ref/π): unbiased and never negative.

    Args:
        logprob: ``[...]`` of tokens drawn from π, nats.
        ref_logprob: ``[...]`` under the reference.

    Source: Schulman (2020).
    """
    log_ratio = ref_logprob - logprob
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(
    logits: Float[Tensor, "*shape V"],
    ref_logits: Float[Tensor, "*shape V"],
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """KL(π‖π_ref) = Σ_v π_v (log π_v − log π_ref,v), in nats, over the whole vocabulary.

    Args:
        logits: ``[..., V]`` of π.
        ref_logits: ``[..., V]`` of π_ref.
        temperature: τ of both.

    Source: P1 §5.2 (KL divergence between policy and SFT model).
    """
    logp = (upcast(logits) / temperature).log_softmax(-1)
    ref_logp = (upcast(ref_logits) / temperature).log_softmax(-1)
    probability = logp.exp()
    # Two `where`s' worth of care: −∞ − −∞ must be gone before it meets a product or a gradient.
    log_ratio = torch.where(probability != 0, logp - ref_logp, torch.zeros_like(logp))
    return (probability * log_ratio).sum(-1)
