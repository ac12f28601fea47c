"""Advantages: generalized advantage estimation, and baselines that need no critic."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mossrlhf.functional.reduce import Reduce, masked_sum, whiten


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
        rewards: ``[B, T]``; what stands outside the mask is ignored.
        values: ``[B, T]`` of the state before each token.
        mask: ``[B, T]`` tokens that count.
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
    """Rewards to go: G_t = r_t + γ G_{t+1} over the tokens of the mask; zero outside.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` tokens that count.
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
        ValueError: where `group_size` is below 2 or does not divide B.

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
        ValueError: where `group_size` is below 2 or does not divide B.

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
    """Rewards to go, whitened over all tokens of the batch.

    Args:
        rewards: ``[B, T]``, KL penalty included.
        mask: ``[B, T]`` tokens that count.
        gamma: discount γ, per token.
        reduce: sums a tensor over all processes.

    Source: REINFORCE++ (arXiv 2501.03262).
    """
    return whiten(discounted_returns(rewards, mask, gamma), mask, reduce=reduce)


def sequence_returns(
    rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Σ_t r_t over the tokens of the mask: the undiscounted return of each response.

    Args:
        rewards: ``[B, T]``.
        mask: ``[B, T]`` tokens that count.

    Source: P1 §3.2.
    """
    return masked_sum(rewards, mask, dim=1)
