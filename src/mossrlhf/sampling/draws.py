"""Tokens drawn inside `generate`, with what is known of each as it is drawn."""

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


class Draws(LogitsProcessor):
    """Warps and draws in place of `generate`, so as to see what tokens come from and how likely.

    Pass it as a logits processor beside `undrawn`, which has `generate` take the likeliest token:
    all but the one drawn here are at −∞ then. Penalties have been applied before it, and nothing
    comes after it. What a row draws depends on its own scores and numbers alone, whichever rows
    stand beside it; and it takes no exponential noise of V numbers a token, as `generate` does.

    Args:
        config: with the fields of `WARPERS` to apply.
        uniform: ``[B, T]`` numbers in [0, 1), one for each token to be drawn.

    Raises:
        ValueError: where the config has a watermark, which `generate` puts on after everything.

    Source: ours; order and conditions as in ``generate`` of transformers 5.23.
    """

    def __init__(self, config: GenerationConfig, uniform: Float[Tensor, "B T"]) -> None:
        require_recordable(config)
        self.warpers = LogitsProcessorList()
        for name, (_, warper) in WARPERS.items():
            if warps(config, name):
                # Of all warpers this one alone holds a tensor.
                placed = {"device": uniform.device} if name == "eta_cutoff" else {}
                self.warpers.append(warper(getattr(config, name), **placed))
        self._uniform = uniform
        self._noted: list[Tensor] = []

    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Draw the next token of each row.

        Args:
            input_ids: ``[B, L]`` prompt and what has been drawn so far.
            scores: ``[B, V]``.

        Returns:
            ``[B, V]``: 0 at the token, −∞ elsewhere.
        """
        scores = self.warpers(input_ids, scores.float())
        logprobs = scores.sub_(scores.logsumexp(-1, keepdim=True))
        tokens = inverse(logprobs.exp(), self._uniform[:, len(self._noted)])[:, None]
        self._noted.append(logprobs.gather(1, tokens).squeeze(1))
        return logprobs.fill_(-torch.inf).scatter_(1, tokens, 0.0)

    @property
    def logprobs(self) -> Float[Tensor, "B T"]:
        """``[B, T]``: the log-probability of each token drawn, nats."""
        if not self._noted:
            raise ValueError(
                "model: its generate has passed over logits_processor=, by which tokens are drawn; "
                "hand it on, or pass Trainer(sampler=) a sampler of your own"
            )
        return torch.stack(self._noted, dim=1)


BLOCK = 256
"""Probabilities added up together by `inverse`: a vocabulary is then some hundred numbers."""


def inverse(p: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Return the first token up to which the probabilities add up to more than a number.

    Blocks are summed in float32 and all else in float64, so that tokens of 1e-8 get their share;
    what a block's sum misses, a ten-millionth of it, its last token goes without or has beside.

    Args:
        p: ``[B, V]`` probabilities; they need not add up to 1.
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
    """Where a rising sum first exceeds a number; where rounding keeps it below, its last rise."""
    last_rise = (total < total[:, -1:]).sum(-1, keepdim=True)
    return torch.searchsorted(total, wanted, right=True).minimum(last_rise)


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
    """Refuse what changes the distribution where `Draws` cannot see it.

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


def undrawn(config: GenerationConfig) -> GenerationConfig:
    """Return a config that leaves warping and drawing to `Draws`.

    Args:
        config: the one in force.

    Source: ours.
    """
    bare = copy.deepcopy(config)
    for name in WARPERS:
        setattr(bare, name, None)  # of anything else `generate` says that it goes unused
    bare.do_sample = False
    return bare
