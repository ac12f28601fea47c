"""`generate` of transformers behind the sampler protocol."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from mossrlhf.models.backbone import group_by_length
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.sampling.configured import Configured, effective_config, special_tokens
from mossrlhf.sampling.draws import undrawn
from mossrlhf.sampling.segments import drawn, learns_prompt
from mossrlhf.strict import check_range, strict
from mossrlhf.types import Rollout


@strict
@dataclass(frozen=True, kw_only=True)
class HFSampler(Configured):
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
        segment: tokens after which responses that have ended are let go; None to wait for the
            last. Like `batch_size` it changes speed and memory alone.

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
    segment: int | None = 16
    effective: GenerationConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_range("HFSampler", "batch_size", self.batch_size, 1)
        check_range("HFSampler", "segment", self.segment, 1)
        config = effective_config(self.generation_config, self.eos_token_id, self.pad_token_id)
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
        eos, pad = special_tokens(tokenizer, generation_config)
        return cls(
            generation_config=generation_config,
            eos_token_id=eos,
            pad_token_id=pad,
            batch_size=batch_size,
        )

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
        # All that is random, so that no way to split the work changes an answer.
        uniform = torch.rand(len(prompts), self.max_new_tokens, dtype=torch.float64)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        groups = group_by_length(lengths, self.batch_size)  # for little padding
        asked = undrawn(self.effective) if self.effective.do_sample else self.effective
        with _only(model, asked):
            parts = [
                self._draw(model, [prompts[row] for row in rows], uniform[rows]) for rows in groups
            ]
        rollout = Rollout.concat(parts).select(torch.cat(groups).argsort())
        _require_numbers(rollout)
        return rollout

    def _draw(self, model: nn.Module, prompts: Sequence[Sequence[int]], uniform: Tensor) -> Rollout:
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        # Padding on the left lives in this method alone: `generate` continues the last column.
        ids = torch.tensor(
            [[self.pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device
        )
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        attended = torch.arange(width, device=device) >= (width - lengths)[:, None]
        config, uniform = self.effective, uniform.to(device)
        found = drawn(model, ids, attended, config, uniform, self.segment)
        rollout = self._assemble(ids, lengths, found.tokens)
        if found.logprobs is None or found.entropies is None:
            return rollout
        mask = rollout.mask
        logprobs, entropies = (
            torch.where(mask, noted[:, : mask.shape[1]], 0.0)
            for noted in (found.logprobs, found.entropies)
        )
        if self.departures or not _says_the_same_twice(model):
            return replace(rollout, sampler_logprobs=logprobs)
        return replace(rollout, logprobs=logprobs, entropies=entropies)

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


def _require_numbers(rollout: Rollout) -> None:
    """Refuse what a policy of broken weights draws: nobody else would notice."""
    noted = (rollout.logprobs, rollout.sampler_logprobs)
    logprobs = next((given for given in noted if given is not None), torch.zeros(1, 1))
    broken = (~torch.isfinite(logprobs)).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise FloatingPointError(
            f"model: its logits are not finite in responses to {len(broken)} of {len(logprobs)} "
            f"prompts, the first of them number {broken[0]}; its weights are broken, or too large "
            "for their type"
        )


def _says_the_same_twice(model: nn.Module) -> bool:
    """Whether a token's log-probability is the same by a cache and by a whole sequence.

    To rounding that is; in half precision the two are a hundredth of a nat apart, and float64
    logits become float32 in `generate`. A learned prompt stands before the padding on the left;
    some positions are turned by angles that depend on the length; and a `generate` of the user's
    may draw from anything.
    """
    inner = unwrap_peft(model)
    own = getattr(type(inner), "generate", None) is not GenerationMixin.generate
    if own or learns_prompt(model) or _turns_by_length(inner):
        return False
    devices = {parameter.device.type for parameter in model.parameters()}
    rough = "cuda" in devices and torch.get_float32_matmul_precision() != "highest"
    cast = any(torch.is_autocast_enabled(device) for device in devices)
    return not rough and not cast and {p.dtype for p in model.parameters()} == {torch.float32}


def _turns_by_length(model: nn.Module) -> bool:
    """Whether the angles of rotary positions depend on how long a sequence is."""
    given: Any = getattr(model, "config", None)
    text = given.get_text_config() if hasattr(given, "get_text_config") else given
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in ("dynamic", "longrope") for part in parts)


@contextmanager
def _only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` fill what a config leaves open from that config, not from the checkpoint."""
    # An adapted model may hold one of its own, which PEFT hands on to the unwrapped one.
    held = [
        (holder, holder.generation_config)
        for holder in (model, unwrap_peft(model))
        if "generation_config" in vars(holder)
    ]
    for holder, _ in held:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in held:
            holder.generation_config = own
