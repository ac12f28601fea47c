"""The equations, as pure functions: masked means, log-probs and KL, advantages, losses.

Masked entries are replaced by zero (`torch.where`) before anything is computed from them: NaN × 0
is NaN, in a product and in its gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mossrlhf.types import TokenStats

__all__ = [
    "clipped_policy_loss",
    "clipped_value_loss",
    "discounted_returns",
    "entropy_from_logits",
    "exact_kl",
    "gae",
    "group_relative",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "leave_one_out",
    "lm_loss",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "ranking_loss",
    "reinforce_plus_plus",
    "token_logprobs",
    "token_stats",
    "upcast",
    "whiten",
    "widest",
]

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity on one process."""

# -------------------------------------------------------------------------------- masks and means


def upcast(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x` in float32, or in float64 if it is that already.

    Args:
        x: any shape, any floating dtype.

    A bf16 log-softmax is off by up to 0.14 nats, 15 % in the PPO ratio.
    """
    return x if x.dtype == torch.float64 else x.float()


def widest(x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `x` in float64, or float32 on Apple's devices, for sums over many tokens."""
    return x.float() if x.device.type == "mps" else x.double()


def masked_sum(
    x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Σ x over the entries of the mask; entries outside, NaN included, are ignored.

    Args:
        x: values, any shape.
        mask: of the same shape; True for entries to sum.
        dim: dimension to reduce; None for all.
    """
    return torch.where(mask, x, torch.zeros_like(x)).sum(dim)


def masked_mean(
    x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Σ x / count over the entries of the mask; 0 if it is empty.

    Args: those of `masked_sum`.
    """
    return masked_sum(x, mask, dim) / mask.sum(dim).clamp(min=1)


def masked_moments(
    x: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."],
    correction: int = 0,
    reduce: Reduce = lambda tensor: tensor,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean and variance over the entries of the mask, in two passes, over all processes.

    Args:
        x: values, any shape.
        mask: of the same shape; True counts.
        correction: 0 for the population variance, 1 for the unbiased one.
        reduce: sums a tensor over all processes.

    Returns:
        mean and variance, scalars; 0 and 0 if the mask is empty.
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    count = reduce(mask.sum().to(x.dtype))
    mean = reduce(masked_sum(x, mask)) / count.clamp(min=1)
    squares = reduce(masked_sum((x - mean) ** 2, mask))
    return mean, squares / (count - correction).clamp(min=1)


def whiten(
    x: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."],
    shift_mean: bool = True,
    correction: int = 0,
    eps: float = 1e-8,
    reduce: Reduce = lambda tensor: tensor,
) -> Float[Tensor, "..."]:
    """(x − mean) / √(var + ε) over the entries of the mask; zero outside.

    Args:
        x: values, any shape.
        mask: of the same shape; True counts.
        shift_mean: False adds the mean again after the division.
        correction: 0 for the population variance, 1 for the unbiased one.
        eps: added to the variance, in its unit.
        reduce: sums a tensor over all processes.

    Source: P1 §5.3.1 (advantage normalization); the `correction` and `eps` of TRL are 1 and 1e-8.
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    mean, variance = masked_moments(x, mask, correction, reduce)
    scaled = (x - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        scaled = scaled + mean
    return torch.where(mask, scaled, torch.zeros_like(x))


# ------------------------------------------------------------------------- log-probs, entropy, KL


def token_logprobs(
    logits: Float[Tensor, "*shape V"], ids: Int[Tensor, "*shape"], temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Log π(a) = z_a/τ − log Σ_v exp(z_v/τ), in nats.

    Args:
        logits: ``[..., V]`` any floating dtype; computed in float32 at least.
        ids: ``[...]`` the token at each position.
        temperature: τ the tokens were sampled at, for log-probs of the distribution they were
            sampled from.

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
    """Compute log-prob, log-sum-exp and, on request, entropy and exact KL: `TokenStats` ``[...]``.

    The reference for `kernels.token_stats`.

    Args: those of `token_logprobs`, and:
        entropy: False leaves the entropy out.
        ref_logits: ``[..., V]`` of the reference, for its log-prob and the KL divergence.
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
        logprob: ``[...]`` of tokens sampled from π, nats.
        ref_logprob: ``[...]`` under the reference.

    Source: P1 eq. 19; Schulman, "Approximating KL divergence" (2020).
    """
    return logprob - ref_logprob


def kl_k2(
    logprob: Float[Tensor, "*shape"], ref_logprob: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k2 = ½ (log π − log π_ref)²: biased, but its expected gradient is that of KL(π‖π_ref).

    Use it in losses: k1's expected gradient is zero, k3's is that of KL(π_ref‖π).
    Source: Schulman (2020).

    Args: those of `kl_k1`.
    """
    return 0.5 * (logprob - ref_logprob) ** 2


def kl_k3(
    logprob: Float[Tensor, "*shape"], ref_logprob: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k3 = π_ref/π − 1 − log(π_ref/π): unbiased and never negative (Schulman, 2020).

    Args: those of `kl_k1`.
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
    # −∞ − −∞ is replaced before a product or a gradient, which would be NaN.
    log_ratio = torch.where(probability != 0, logp - ref_logp, torch.zeros_like(logp))
    return (probability * log_ratio).sum(-1)


# ------------------------------------------------------------------------------------- advantages


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation: δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1}.

    "t + 1" is the next token *of the mask*: the recursion carries across holes, which get 0.

    Args:
        rewards: ``[B, T]``; entries outside the mask are ignored.
        values: ``[B, T]`` of the state before each token.
        mask: ``[B, T]`` states with a value: response tokens, and in `Trainer` end states.
        gamma: discount γ, per token.
        lam: λ, per token.
        bootstrap: ``[B]`` value of the state after the last token; None for 0.

    Returns:
        ``[B, T]`` advantages, zero outside the mask.

    Source: P1 eqs. 11-13 (Schulman et al., arXiv 1506.02438).
    """
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values)
    carry = torch.zeros_like(next_value)
    columns: list[Tensor] = []
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carry = torch.where(here, delta + gamma * lam * carry, carry)
        next_value = torch.where(here, values[:, t], next_value)
        columns.append(torch.where(here, carry, torch.zeros_like(carry)))
    return torch.stack(columns[::-1], dim=1)


def discounted_returns(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """Rewards-to-go: G_t = r_t + γ G_{t+1} over the tokens of the mask; zero outside.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` response tokens.
        gamma: discount γ, per token.

    Source: P1 §3.2 (the return); `gae` with λ = 1 and values of zero.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)


def _grouped(returns: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(returns) % group_size:
        raise ValueError(
            f"group_size: got {group_size} for {len(returns)} responses, expected a divisor of "
            "that number that is at least 2; set samples_per_prompt to the same value"
        )
    return rearrange(returns, "(prompt sample) -> prompt sample", sample=group_size)


def group_relative(
    returns: Float[Tensor, " B"], group_size: int, eps: float | None = 1e-4
) -> Float[Tensor, " B"]:
    """Compute A = (R − mean(R)) / (std(R) + ε) within the responses to one prompt.

    Args:
        returns: ``[B]`` the return of each response; groups are consecutive.
        group_size: responses per prompt.
        eps: added to the standard deviation (unbiased), in its unit; None leaves the division
            out (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: if `group_size` is below 2 or does not divide B.

    Source: GRPO (arXiv 2402.03300) eq. 3.
    """
    groups = _grouped(returns, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    if eps is not None:
        centered = centered / (groups.std(dim=1, keepdim=True) + eps)
    return rearrange(centered, "prompt sample -> (prompt sample)")


def leave_one_out(returns: Float[Tensor, " B"], group_size: int) -> Float[Tensor, " B"]:
    """Compute A_i = R_i − mean of the *other* responses to the prompt (RLOO).

    Args:
        returns: ``[B]`` the return of each response; groups are consecutive.
        group_size: k, responses per prompt.

    Raises:
        ValueError: if `group_size` is below 2 or does not divide B.

    Source: Ahmadian et al., arXiv 2402.14740 (Kool et al., 2019).
    """
    groups = _grouped(returns, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return rearrange(groups - others, "prompt sample -> (prompt sample)")


def reinforce_plus_plus(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    reduce: Reduce = lambda tensor: tensor,
) -> Float[Tensor, "B T"]:
    """Rewards-to-go, whitened over all tokens of the batch.

    Args:
        rewards: ``[B, T]``, KL penalty included.
        mask: ``[B, T]`` response tokens.
        gamma: discount γ, per token.
        reduce: sums a tensor over all processes.

    Source: REINFORCE++ (arXiv 2501.03262).
    """
    return whiten(discounted_returns(rewards, mask, gamma), mask, reduce=reduce)


def sequence_returns(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Σ_t r_t over the tokens of the mask: the undiscounted return of each response (P1 §3.2)."""
    return masked_sum(rewards, mask, dim=1)


# ----------------------------------------------------------------------------------------- losses


def clipped_policy_loss(
    logprob: Float[Tensor, "*shape"],
    old_logprob: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    clip: tuple[float, float] | None = (0.2, 0.2),
    dual_clip: float | None = None,
) -> Float[Tensor, "*shape"]:
    """−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A), with ρ = exp(log π − log π_old).

    Args:
        logprob: ``[...]`` under the policy being trained, nats.
        old_logprob: ``[...]`` under the policy that sampled the tokens.
        advantage: ``[...]``.
        clip: (ε_low, ε_high); None for the plain surrogate −ρ A.
        dual_clip: c > 1; if A < 0 the loss is at most −c A. None for no such bound.

    Returns:
        ``[...]`` loss per token.

    Source: P1 eq. 15 (PPO, arXiv 1707.06347, eq. 7); dual clip: arXiv 1912.09729 eq. 5.
    """
    ratio = torch.exp(logprob - old_logprob)
    loss = -ratio * advantage
    if clip is not None:
        low, high = clip
        loss = torch.maximum(loss, -ratio.clamp(1 - low, 1 + high) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss


def clipped_value_loss(
    value: Float[Tensor, "*shape"],
    old_value: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip: float | None = 0.2,
) -> Float[Tensor, "*shape"]:
    """½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²).

    Args:
        value: ``[...]`` of the critic being trained, in units of reward.
        old_value: ``[...]`` when the rollout was annotated.
        returns: ``[...]`` the targets R.
        clip: ε, in units of reward; None for the plain ½ (V − R)².

    Returns:
        ``[...]`` loss per token.

    Source: P1 eq. 16 and §5.3.1 (value function loss clipping), as in C.
    """
    loss = (value - returns) ** 2
    if clip is not None:
        clipped = torch.clamp(value, old_value - clip, old_value + clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


def ranking_loss(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    margin: Float[Tensor, " P"] | float = 0.0,
    label_smoothing: Float[Tensor, " P"] | float = 0.0,
) -> Float[Tensor, " P"]:
    """−(1 − α) log σ(r_w − r_l − m) − α log σ(r_l − r_w + m), per pair.

    Args:
        chosen: ``[P]`` rewards of the preferred responses.
        rejected: ``[P]`` rewards of the others.
        margin: m, ``[P]`` or a number, in units of reward.
        label_smoothing: α, the assumed share of flipped labels, in [0, 0.5), ``[P]`` or a number.

    Returns:
        ``[P]`` loss per pair, nats.

    Source: P1 eq. 2 (ranking term); P2 §3 (label smoothing, adaptive margin). Written with
        `logsigmoid`: C's log(σ + 1e-5) has no gradient left at large negative margins.
    """
    difference = upcast(chosen) - upcast(rejected) - margin
    loss = -F.logsigmoid(difference)
    if isinstance(label_smoothing, Tensor) or label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-difference)
    return loss


def lm_loss(
    logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"], ignore_index: int = -100
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """−Σ log p(x_t | x_<t) over the labeled tokens, and their number.

    Args:
        logits: ``[B, L, V]``; position t predicts token t + 1.
        labels: ``[B, L]`` the tokens, unshifted, or `ignore_index`.
        ignore_index: the label that is skipped.

    Returns:
        the summed loss, nats, and the number of tokens in it, scalars.

    Source: P1 eq. 2 (LM term) and eq. 17 (PTX).
    """
    targets = labels[:, 1:]
    loss = F.cross_entropy(
        upcast(logits[:, :-1]).flatten(0, 1),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
    )
    return loss, (targets != ignore_index).sum()
