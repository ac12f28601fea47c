"""Sampling inside `generate`, with the log-prob of each sampled token."""

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

from mossrlhf.sampling.distribution import require_no_watermark

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
"""Fields that `generate` applies after every custom processor, in its order (transformers 5.23):
the value at which each does nothing, and the processor it applies otherwise."""


class SamplingProcessor(LogitsProcessor):
    """Warps and samples in place of `generate`, and records the log-prob of each token.

    Use it with `greedy_config`, under which `generate` takes the only token left above −∞.
    Penalties are applied before it, nothing after it. A row's tokens depend on its own logits and
    numbers alone, not on the other rows.

    Args:
        config: the effective one.
        uniform: ``[B, T]`` numbers in [0, 1), one for each token to sample.
    """

    def __init__(self, config: GenerationConfig, uniform: Float[Tensor, "B T"]) -> None:
        require_no_watermark(config)
        self.warpers = LogitsProcessorList()
        for name, (_, warper) in WARPERS.items():
            if warps(config, name):
                # Of all warpers this one alone holds a tensor.
                placed = {"device": uniform.device} if name == "eta_cutoff" else {}
                self.warpers.append(warper(getattr(config, name), **placed))
        self._uniform = uniform
        self._logprobs: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Sample the next token of each row; return 0 at that token and −∞ elsewhere."""
        scores = self.warpers(input_ids, scores.float())
        logprobs = scores.sub_(scores.logsumexp(-1, keepdim=True))
        tokens = inverse_cdf(logprobs.exp(), self._uniform[:, len(self._logprobs)])[:, None]
        self._logprobs.append(logprobs.gather(1, tokens).squeeze(1))
        return logprobs.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """``[B, T]`` log-probs of the sampled tokens, nats."""
        if not self._logprobs:
            raise ValueError(
                "model: its generate has passed over logits_processor=, which samples the tokens; "
                "hand it on, or pass Trainer(sampler=) a sampler of your own"
            )
        return torch.stack(self._logprobs, dim=1)


BLOCK = 256
"""Probabilities that `inverse_cdf` sums as one block: a vocabulary is then some hundred numbers."""


def inverse_cdf(p: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the first token whose cumulative probability exceeds a number.

    Blocks are summed in float32 and everything else in float64, so that a token of 1e-8 keeps its
    share; the rounding of a block's sum, about 1e-7 of it, goes to its last token.

    Args:
        p: ``[B, V]`` probabilities; they need not sum to 1.
        uniform: ``[B]`` in [0, 1).

    Returns:
        ``[B]`` tokens, of probability above 0.

    Source: inverse transform sampling (Devroye, 1986, ch. II.2).
    """
    rows, size = p.shape
    if short := -size % BLOCK:
        p = torch.nn.functional.pad(p, (0, short))
    blocks = p.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    total = sums.cumsum(-1)
    wanted = uniform.double()[:, None] * total[:, -1:]
    block = _first_beyond(total, wanted)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(-1)
    wanted = wanted - (total.gather(1, block) - sums.gather(1, block))
    return (block * BLOCK + _first_beyond(inner, wanted)).squeeze(1)


def _first_beyond(total: Tensor, wanted: Tensor) -> Tensor:
    """Return where a cumulative sum first exceeds a number, at most where it last rises."""
    last_rise = (total < total[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(total, wanted, right=True).minimum(last_rise)


def warps(config: GenerationConfig, name: str) -> bool:
    """Whether `generate` acts on a field of `WARPERS`; it ignores values out of range."""
    value, neutral = getattr(config, name), WARPERS[name][0]
    if value is None:
        return False
    match name:
        case "top_p" | "typical_p":
            return bool(value < 1)
        case "epsilon_cutoff" | "eta_cutoff":
            return bool(0 < value < 1)
    return bool(value != neutral)


def greedy_config(config: GenerationConfig) -> GenerationConfig:
    """Return a copy that leaves warping and sampling to a `SamplingProcessor`."""
    greedy = copy.deepcopy(config)
    for name in WARPERS:
        setattr(greedy, name, None)  # `generate` warns of any other value that it goes unused
    greedy.do_sample = False
    return greedy
