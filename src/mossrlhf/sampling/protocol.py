"""The protocol of samplers."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from mossrlhf.types import Rollout


@runtime_checkable
class Sampler(Protocol):
    """Generates one response for each prompt; log-probs are computed at its `temperature`."""

    @property
    def temperature(self) -> float:
        """Temperature τ of the sampled distribution."""

    @property
    def max_new_tokens(self) -> int:
        """Longest possible response, in tokens."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each of B prompts (token ids)."""
