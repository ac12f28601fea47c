"""`generate` of transformers behind the sampler protocol."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.sampling.distribution import FREE, NEUTRAL, require_distribution, require_plain
from mossrlhf.sampling.recording import Recorder, unwarped
from mossrlhf.signature import inside
from mossrlhf.strict import check_range, strict
from mossrlhf.types import Rollout


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
        ValueError: where ``max_new_tokens`` is missing or a number makes no distribution (a
            temperature of 0), or the config asks for beams, for several sequences per prompt
            (that is `TrainerConfig.samples_per_prompt`), for anything in `REFUSED`, or, sampling,
            for a watermark.

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
        require_plain(config)
        check_range("HFSampler", "batch_size", self.batch_size, 1)
        greedy = config.do_sample is False  # then transformers warns of what concerns sampling
        for name, value in FREE.items():
            if getattr(config, name) is None and not (greedy and name != "repetition_penalty"):
                setattr(config, name, value)
        require_distribution(config)
        eos = self.eos_token_id
        if not isinstance(eos, int) and len(eos) == 0:
            raise ValueError(
                "eos_token_id: got none, expected at least one token that ends a response; to let "
                "all run to the limit, name one the policy never says"
            )
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
            generation_config: as above; its own ``eos_token_id`` and ``pad_token_id`` go first.
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
        pad = generation_config.pad_token_id
        if pad is None:
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
        given = {name: getattr(self.effective, name, None) for name in NEUTRAL}
        return [
            f"{name}={value}"
            for name, value in given.items()
            if name != "temperature" and value is not None and value != NEUTRAL[name]
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
            ValueError: where there is no prompt, or an empty one.
        """
        empty = [index for index, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty or not prompts:
            raise ValueError(
                f"prompts: got {len(prompts)}, of which {empty} are empty; expected at least one, "
                "and at least one token in each"
            )
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
        config, extra, recorder = self.effective, {}, None
        if self.departures and config.do_sample:
            # What is drawn differs from what is scored: by how much is seen in the metrics.
            recorder = Recorder(config, device)
            config, extra = unwarped(config), {"logits_processor": [recorder]}
        with _only(model, config):
            drawn: Tensor = model.generate(  # type: ignore[operator]
                ids, attention_mask=attended.long(), generation_config=config, **extra
            )
        rollout = self._assemble(ids, lengths, drawn[:, width:])
        if recorder is None:
            return rollout
        logprobs = recorder.logprobs(drawn)[:, : rollout.mask.shape[1]]
        return replace(rollout, sampler_logprobs=torch.where(rollout.mask, logprobs, 0.0))

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
    # An adapted model may hold one of its own, which PEFT hands on to the model inside.
    held = [
        (holder, holder.generation_config)
        for holder in (model, inside(model))
        if "generation_config" in vars(holder)
    ]
    for holder, _ in held:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in held:
            holder.generation_config = own
