"""What is logged of the clipped surrogate."""

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.functional.logprobs import kl_k3
from mossrlhf.loss.rows import TokenRows, weighted


def surrogate_statistics(
    logprob: Float[Tensor, " N"], rows: TokenRows, clip_range: tuple[float, float] | None
) -> dict[str, Tensor]:
    """Sum ratio, approximate KL and clipped tokens, weighted; divided by nothing yet.

    Args:
        logprob: ``[N]`` under the policy being trained, nats, detached.
        rows: of the same tokens.
        clip_range: (ε_low, ε_high); None leaves the clip fraction out.

    Returns:
        scalars by the metric's name.

    Source: P1 §5.2.
    """
    old_logprob, advantage, weights = rows.old_logprob, rows.advantage, rows.weights
    ratio = torch.exp(logprob - old_logprob)
    stats = {
        "policy/ratio": weighted(ratio, weights),
        "policy/approx_kl_per_token": weighted(kl_k3(old_logprob, logprob), weights),
    }
    if clip_range is not None:
        low, high = clip_range
        up, down = (advantage > 0) & (ratio > 1 + high), (advantage < 0) & (ratio < 1 - low)
        stats["policy/clip_fraction"] = weighted((up | down).to(weights), weights)
    return stats
