"""Log-probabilities of the distribution that was truly sampled, noted while `generate` runs."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Fields of a config that `generate` applies after every custom processor, in this order."""


class Recorder(LogitsProcessor):
    """Does the warping of `generate` itself, so as to see the distribution tokens come from.

    Pass it as a logits processor beside `unwarped`: penalties have been applied before it, and
    nothing comes after it. One ``[B, V]`` of scores is kept, however long the responses.

    Args:
        config: with the temperature, top-k, top-p, min-p and typical-p to apply.

    Source: ours.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.warpers = LogitsProcessorList()
        if config.temperature not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        if config.min_p:
            self.warpers.append(MinPLogitsWarper(config.min_p))
        if config.typical_p is not None and config.typical_p < 1:
            self.warpers.append(TypicalLogitsWarper(config.typical_p))
        self._noted: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Warp the scores of the next token, and note how likely the last one was.

        Args:
            input_ids: ``[B, L]`` prompt and what has been drawn so far.
            scores: ``[B, V]``.
        """
        self._note(input_ids)
        warped: Tensor = self.warpers(input_ids, scores.float())
        self._last = warped.log_softmax(-1)
        return warped

    def _note(self, input_ids: Tensor) -> None:
        if self._last is not None:
            self._noted.append(self._last.gather(1, input_ids[:, -1:]))

    def logprobs(self, sequences: Int[Tensor, "B L"]) -> Float[Tensor, "B T"]:
        """Return the log-probability of every drawn token, nats.

        Args:
            sequences: ``[B, L]`` what `generate` returned.
        """
        self._note(sequences)
        self._last = None
        return torch.cat(self._noted, dim=1)


def unwarped(config: GenerationConfig) -> GenerationConfig:
    """Return a config that leaves to a `Recorder` what it applies.

    Args:
        config: the one in force.

    Source: ours.
    """
    neutral: dict[str, Any] = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=None, typical_p=1.0)
    bare = copy.deepcopy(config)
    for name, value in neutral.items():
        setattr(bare, name, value)
    return bare
