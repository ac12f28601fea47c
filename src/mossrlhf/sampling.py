"""Drawing responses: the sampler protocol, and `generate` of transformers behind it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.strict import strict
from mossrlhf.types import Rollout

FREE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Sampling from the policy's own distribution; what a config leaves unset becomes this."""


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


@strict
@dataclass(frozen=True, kw_only=True)
class HFSampler:
    """Draws responses with transformers' ``generate``.

    Every field that shapes the distribution is set here: ``generate`` would fill unset ones from
    the checkpoint (a top-k of 50, its own temperature or penalty), which the log-probabilities
    of training know nothing of. `effective` shows what is in force.

    Args:
        generation_config: ``max_new_tokens`` must be set; unset temperature, top-k, top-p and
            penalty mean the policy's own distribution.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        batch_size: prompts at a time; None for all at once.

    Raises:
        ValueError: where ``max_new_tokens`` is missing, or the config asks for beams or for
            several sequences per prompt (that is `TrainerConfig.samples_per_prompt`).

    Source: ours; C: temperature 0.8, top-p 0.9, repetition penalty 1.1, at most 512 tokens.
    """

    generation_config: GenerationConfig
    eos_token_id: int | Sequence[int]
    pad_token_id: int
    batch_size: int | None = None
    effective: GenerationConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = copy.deepcopy(self.generation_config)
        if config.max_new_tokens is None:
            raise ValueError(
                "generation_config: max_new_tokens is None; say how long a response may become, "
                "e.g. GenerationConfig(max_new_tokens=512)"
            )
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(config, name) or 1) != 1:
                raise ValueError(
                    f"generation_config: {name} = {getattr(config, name)}, expected 1; for "
                    "several responses to a prompt set TrainerConfig.samples_per_prompt"
                )
        for name, value in FREE.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
        eos = self.eos_token_id
        config.eos_token_id = eos if isinstance(eos, int) else list(eos)
        config.pad_token_id = self.pad_token_id
        config.return_dict_in_generate = False
        object.__setattr__(self, "effective", config)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batch_size: int | None = None,
    ) -> "HFSampler":
        """Take end and padding tokens from a tokenizer, where the config does not name them.

        Args:
            tokenizer: needs an eos token; without a padding token, eos pads.
            generation_config: as above; its own ``eos_token_id`` goes first.
            batch_size: prompts at a time.

        Raises:
            ValueError: where neither names an end token.
        """
        eos = generation_config.eos_token_id
        if eos is None:
            eos = tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "processing_class: has no eos token, so no response can end; set "
                "tokenizer.eos_token or GenerationConfig(eos_token_id=)"
            )
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = eos if isinstance(eos, int) else eos[0]
        return cls(
            generation_config=generation_config,
            eos_token_id=eos,
            pad_token_id=pad,
            batch_size=batch_size,
        )

    @property
    def temperature(self) -> float:
        """Temperature τ of the distribution the responses come from; 1 where greedy."""
        return float(self.effective.temperature) if self.effective.do_sample else 1.0

    @property
    def max_new_tokens(self) -> int:
        """Longest response possible, in tokens."""
        return int(self.effective.max_new_tokens)

    @property
    def departures(self) -> list[str]:
        """What makes the drawn distribution differ from the scored one, temperature apart."""
        config = self.effective
        names = ["top_k", "top_p", "repetition_penalty", "min_p", "typical_p", "do_sample"]
        neutral = {**FREE, "min_p": None, "typical_p": None}
        neutrals = {name: {neutral[name], None} for name in names}
        neutrals["typical_p"].add(1.0)
        return [
            f"{name}={getattr(config, name)}"
            for name in names
            if getattr(config, name) not in neutrals[name]
        ]

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Draw one response for each prompt.

        Args:
            model: a transformers model with ``generate``.
            prompts: B lists of token ids, none empty.

        Returns:
            a `Rollout` of B sequences on the model's device, nothing scored yet.

        Raises:
            ValueError: where a prompt is empty.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("prompts: one of them is empty, expected at least one token each")
        size = self.batch_size or len(prompts)
        parts = [
            self._draw(model, prompts[start : start + size])
            for start in range(0, len(prompts), size)
        ]
        return Rollout.concat(parts)

    def _draw(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        # Padding on the left lives in this function alone: `generate` continues the last column.
        ids = torch.tensor(
            [[self.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device
        )
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        attended = torch.arange(width, device=device) >= (width - lengths)[:, None]
        with _only(model, self.effective):
            drawn: Tensor = model.generate(  # type: ignore[operator]
                ids, attention_mask=attended.long(), generation_config=self.effective
            )
        return self._assemble(ids, lengths, drawn[:, width:])

    def _assemble(self, ids: Tensor, prompt_lengths: Tensor, responses: Tensor) -> Rollout:
        """Turn left-padded prompts and their continuations into ``[prompt][response][pad]``."""
        eos = torch.tensor(self.effective.eos_token_id, device=ids.device).view(-1)
        is_end = torch.isin(responses, eos)
        ended = is_end.any(dim=1)
        limit = responses.shape[1]
        first_end = is_end.to(torch.int8).argmax(dim=1) + 1
        response_lengths = torch.where(ended, first_end, limit)
        rows = torch.cat([ids, responses], dim=1)
        offset = ids.shape[1] - prompt_lengths
        positions = torch.arange(rows.shape[1], device=ids.device)
        total = prompt_lengths + response_lengths
        shifted = rows.gather(1, (positions + offset[:, None]).clamp(max=rows.shape[1] - 1))
        shifted = torch.where(positions < total[:, None], shifted, self.pad_token_id)
        length = int(response_lengths.max())
        mask = torch.arange(length, device=ids.device) < response_lengths[:, None]
        return Rollout(
            input_ids=shifted[:, : int(total.max())],
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            truncated=~ended,
            mask=mask,
        )


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` fill what a config leaves open from that config, not from the checkpoint."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
