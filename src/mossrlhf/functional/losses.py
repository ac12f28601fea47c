"""Losses, per token or per pair; reduction is the caller's, with one denominator for all."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mossrlhf.functional.reduce import upcast


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
        old_logprob: ``[...]`` under the policy that drew the tokens.
        advantage: ``[...]``.
        clip: (ε_low, ε_high); None for the plain surrogate −ρ A.
        dual_clip: c > 1; where A < 0 the loss is at most −c A. None for no such bound.

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
        chosen: ``[P]`` scores of the preferred responses.
        rejected: ``[P]`` scores of the others.
        margin: m, ``[P]`` or a number, in units of score.
        label_smoothing: α, the share of labels believed to be flipped, in [0, 0.5), ``[P]`` or a
            number.

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
    """−Σ log p(x_t | x_<t) over the labeled tokens, and how many they are.

    Args:
        logits: ``[B, L, V]``; position t predicts token t + 1.
        labels: ``[B, L]`` the tokens themselves, unshifted; `ignore_index` where not counted.
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
