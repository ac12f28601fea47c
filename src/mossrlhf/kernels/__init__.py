"""Log-probability, entropy and KL of tokens over the vocabulary, without copies of the logits."""

from mossrlhf.kernels.chunked_head import (
    head_token_loss,
    head_token_stats,
    linear_token_loss,
    linear_token_stats,
)
from mossrlhf.kernels.row_stats import IGNORED_ID, Backend, backend, token_stats, use_backend

__all__ = [
    "IGNORED_ID",
    "Backend",
    "backend",
    "head_token_loss",
    "head_token_stats",
    "linear_token_loss",
    "linear_token_stats",
    "token_stats",
    "use_backend",
]
