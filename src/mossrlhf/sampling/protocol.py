"""What draws responses."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from mossrlhf.types import Rollout


@runtime_checkable
class Sampler(Protocol):
    """Draws one response for each prompt. `temperature` is the one they are scored at.

    Source: ours.
    """

    @property
    def temperature(self) -> float:
        """Temperature τ of the distribution the responses come from."""

    @property
    def max_new_tokens(self) -> int:
        """Longest response possible, in tokens."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Draw one response for each of B prompts (token ids)."""
