"""Pure equations on tensors: the reference every fast path is held to."""

from mossrlhf.functional.advantages import (
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
)
from mossrlhf.functional.logprobs import (
    entropy_from_logits,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    token_logprobs,
    token_stats,
)
from mossrlhf.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    lm_loss,
    ranking_loss,
)
from mossrlhf.functional.reduce import (
    masked_mean,
    masked_moments,
    masked_sum,
    upcast,
    whiten,
    widest,
)

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
