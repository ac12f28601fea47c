"""The default sampler: `generate` of transformers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.options import check_range, inside, strict
from mossrlhf.sampling.assembling import assemble, require_prompts
from mossrlhf.sampling.configured import ConfiguredSampler
from mossrlhf.sampling.draws import greedy_config
from mossrlhf.sampling.segments import generate_in_segments
from mossrlhf.types import Rollout


@strict
@dataclass(frozen=True, kw_only=True)
class HFSampler(ConfiguredSampler):
    """Generates responses with transformers' ``generate``.

    Every field that shapes the distribution is set here. ``generate`` would fill unset ones from
    the checkpoint (a top-k of 50, its own temperature or penalty), which training would not know
    of. `effective` is the resulting config.

    Args:
        generation_config: ``max_new_tokens`` must be set; unset temperature, top-k, top-p and
            penalty mean the policy's own distribution.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        batch_size: prompts at a time; None for all at once.
        segment: tokens after which finished responses leave the batch; None to wait for the last.
            Like `batch_size` it changes speed and memory alone.

    Raises:
        ValueError: if ``max_new_tokens`` is missing, a number defines no distribution (a
            temperature of 0), or the config asks for beams, for several sequences per prompt
            (that is `TrainerConfig.samples_per_prompt`), for a field in `REFUSED`, or, while
            sampling, for a watermark.

    Source: C: temperature 0.8, top-p 0.9, repetition penalty 1.1, at most 512 tokens.
    """

    batch_size: int | None = None
    segment: int | None = 16

    def __post_init__(self) -> None:
        check_range("HFSampler", "batch_size", self.batch_size, 1)
        check_range("HFSampler", "segment", self.segment, 1)
        super().__post_init__()

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batch_size: int | None = None,
    ) -> "HFSampler":
        """Take the end and padding tokens that the config leaves open from a tokenizer.

        Args:
            tokenizer: needs an eos token; without a padding token, eos pads.
            generation_config: its own ``eos_token_id`` and ``pad_token_id`` take precedence.
            batch_size: prompts at a time.

        Raises:
            ValueError: if neither names an end token.
        """
        return cls._for_tokenizer(tokenizer, generation_config, batch_size=batch_size)

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each prompt.

        Args:
            model: a transformers model with ``generate``.
            prompts: B lists of token ids, none empty.

        Returns:
            a `Rollout` of B sequences on the model's device, with `sampler_logprobs` of the
            sampled distribution; without them for greedy decoding.

        Raises:
            ValueError: if there is no prompt, or an empty one.
            FloatingPointError: if the model's logits are not finite.
        """
        require_prompts(prompts)
        # All random numbers at once, so that no way to split the work changes a response.
        uniform = torch.rand(len(prompts), self.max_new_tokens, dtype=torch.float64)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        order = lengths.argsort(stable=True)  # prompts of similar length together: little padding
        sampling = bool(self.effective.do_sample)
        defaults = greedy_config(self.effective) if sampling else self.effective
        generated: dict[int, tuple[list[int], list[float]]] = {}
        with _generation_config(model, defaults):
            for rows in order.split(self.batch_size or len(prompts)):
                batch = [prompts[row] for row in rows]
                responses = self._generate(model, batch, uniform[rows])
                generated.update(zip(rows.tolist(), responses, strict=True))
        completions, logprobs = zip(*(generated[row] for row in range(len(prompts))), strict=True)
        _require_finite(logprobs)
        return assemble(
            prompts,
            completions,
            [response[-1] in self.ends for response in completions],
            pad_token_id=self.pad_token_id,
            device=next(model.parameters()).device,
            logprobs=logprobs if sampling else None,
        )

    def _generate(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], uniform: Tensor
    ) -> list[tuple[list[int], list[float]]]:
        """Return the tokens of each response, up to its end token, and their log-probs."""
        device = next(model.parameters()).device
        width = max(len(prompt) for prompt in prompts)
        # `generate` continues the last column, so here alone padding is on the left.
        ids = [[self.pad_token_id] * (width - len(prompt)) + [*prompt] for prompt in prompts]
        mask = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        tokens, logprobs = generate_in_segments(
            model,
            torch.tensor(ids, device=device),
            torch.tensor(mask, device=device),
            self.effective,
            uniform.to(device),
            self.segment,
        )
        is_end = torch.isin(tokens, torch.tensor(self.ends, device=device))
        first_end = is_end.int().argmax(dim=1) + 1
        lengths = torch.where(is_end.any(dim=1), first_end, tokens.shape[1]).tolist()
        rows = zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)
        return [(response[:length], known[:length]) for response, known, length in rows]


def _require_finite(logprobs: Sequence[Sequence[float]]) -> None:
    """Raise FloatingPointError where a policy's logits were not finite."""
    broken = [row for row, known in enumerate(logprobs) if not math.isfinite(sum(known))]
    if broken:
        raise FloatingPointError(
            f"model: its logits are not finite in responses to {len(broken)} of {len(logprobs)} "
            f"prompts, the first of them number {broken[0]}; its weights are broken, or too large "
            "for their type"
        )


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Have `generate` take unset fields from a config, not from the checkpoint's."""
    # An adapted model may hold one of its own, which PEFT hands on to the base model.
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
