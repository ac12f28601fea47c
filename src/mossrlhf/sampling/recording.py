"""Log-probabilities of the distribution that was truly sampled, noted while `generate` runs."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

WARPERS: dict[str, tuple[Any, Callable[[Any], LogitsProcessor]]] = {
    "temperature": (1.0, TemperatureLogitsWarper),
    "top_h": (None, TopHLogitsWarper),
    "top_k": (0, TopKLogitsWarper),
    "top_p": (1.0, TopPLogitsWarper),
    "min_p": (None, MinPLogitsWarper),
    "typical_p": (1.0, TypicalLogitsWarper),
    "epsilon_cutoff": (0.0, EpsilonLogitsWarper),
    "eta_cutoff": (0.0, EtaLogitsWarper),
}
"""Fields of a config that `generate` applies after every custom processor, in its order: the value
at which each does nothing, and what it applies otherwise."""


class Recorder(LogitsProcessor):
    """Does the warping of `generate` itself, so as to see the distribution tokens come from.

    Pass it as a logits processor beside `unwarped`: penalties have been applied before it, and
    nothing comes after it. One ``[B, V]`` of scores is kept, however long the responses.

    Args:
        config: with the fields of `WARPERS` to apply.
        device: of the scores.

    Raises:
        ValueError: where the config has a watermark, which `generate` puts on after everything.

    Source: ours; order and conditions as in ``generate`` of transformers 5.23.
    """

    def __init__(self, config: GenerationConfig, device: torch.device | str = "cpu") -> None:
        require_recordable(config)
        self.warpers = LogitsProcessorList()
        for name, (_, warper) in WARPERS.items():
            if warps(config, name):
                # Of all warpers this one alone holds a tensor.
                placed = {"device": device} if name == "eta_cutoff" else {}
                self.warpers.append(warper(getattr(config, name), **placed))
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


def warps(config: GenerationConfig, name: str) -> bool:
    """Whether a field of `WARPERS` changes the distribution; out of its range it does nothing.

    Args:
        config: the one in force.
        name: the field.

    Source: ours, after ``generate`` of transformers.
    """
    value, neutral = getattr(config, name), WARPERS[name][0]
    if value is None:
        return False
    match name:
        case "top_p" | "typical_p":
            return bool(value < 1)
        case "epsilon_cutoff" | "eta_cutoff":
            return bool(0 < value < 1)
    return bool(value != neutral)


def require_recordable(config: GenerationConfig) -> None:
    """Refuse what changes the distribution where a `Recorder` cannot see it.

    Args:
        config: the one in force.

    Raises:
        ValueError: where the config has a watermark.

    Source: ours.
    """
    if config.do_sample is not False and config.watermarking_config is not None:
        raise ValueError(
            f"generation_config: watermarking_config = {config.watermarking_config}, expected "
            "None: a watermark is put on after everything else, so the log-probabilities of what "
            "was sampled could not be recorded; watermark the trained policy's responses instead"
        )


def unwarped(config: GenerationConfig) -> GenerationConfig:
    """Return a config that leaves to a `Recorder` what it applies.

    Args:
        config: the one in force.

    Source: ours.
    """
    bare = copy.deepcopy(config)
    for name, (neutral, _) in WARPERS.items():
        setattr(bare, name, neutral)
    return bare
