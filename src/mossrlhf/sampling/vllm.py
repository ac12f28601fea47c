"""An engine with weights of its own behind the sampler protocol; vLLM is one."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.models.lora import vocabulary_size
from mossrlhf.sampling.assembling import assemble, require_prompts
from mossrlhf.sampling.configured import (
    Configured,
    effective_config,
    require_known,
    special_tokens,
    within_layers,
)
from mossrlhf.sampling.distribution import departures
from mossrlhf.sampling.engines import Asked, Drawn, Engine, Synchronizer
from mossrlhf.sampling.vllm_engine import VLLMEngine
from mossrlhf.strict import strict
from mossrlhf.types import Rollout

_WHO = "the engine"

KNOWN = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields that are handed on to the engine."""


@strict
@dataclass(frozen=True, kw_only=True)
class VLLMSampler(Configured):
    """Draws responses with a vLLM engine, whose weights follow the policy's.

    **Tested against a stand-in engine only, never against vLLM itself.**

    Before drawing, the engine is given the weights of the model at hand wherever they are not
    those it has, adapters merged in, and forgets its prefix cache. Log-probabilities come with
    every sampled response: by how much they differ from those scored here is logged
    (``sampler/…``), and `PPOMaxLoss.sampler_ratio_cap` weights for it. Every process of a trainer
    needs an engine of its own. Draws follow from torch's generator, by a seed for each prompt.

    Args:
        engine: a `VLLMEngine`, or any `Engine`.
        generation_config: as of `HFSampler`; of what changes the distribution, temperature, top-k,
            top-p, min-p and repetition penalty alone.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.

    Raises:
        TypeError: where the engine lacks what is asked of one.
        ValueError: as `HFSampler`, and where the engine would pass over a field.

    Source: ours; the engine: Kwon et al. (arXiv 2309.06180).
    """

    engine: Engine
    generation_config: GenerationConfig
    eos_token_id: int | Sequence[int]
    pad_token_id: int
    effective: GenerationConfig = field(init=False, repr=False)
    synchronizer: Synchronizer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(
                f"engine: got {self.engine!r:.60}, expected VLLMEngine(llm) around a vllm.LLM, or "
                "an object with load_weights, reset_prefix_cache, generate, vocabulary and "
                "processed_logprobs"
            )
        config = effective_config(self.generation_config, self.eos_token_id, self.pad_token_id)
        require_known(config, KNOWN, _WHO)
        if config.do_sample and config.top_p == 0:
            raise ValueError(
                "generation_config: top_p = 0, expected a number in (0, 1]; for the likeliest "
                "token each time set do_sample=False"
            )
        object.__setattr__(self, "effective", config)
        object.__setattr__(self, "synchronizer", Synchronizer(self.engine))

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, engine: Engine
    ) -> "VLLMSampler":
        """Take end and padding tokens from a tokenizer, where the config does not name them.

        Args:
            tokenizer: needs an eos token; without a padding token, eos pads.
            generation_config: as above; its own ``eos_token_id`` and ``pad_token_id`` go first.
            engine: as above.

        Raises:
            ValueError: where neither names an end token.
        """
        eos, pad = special_tokens(tokenizer, generation_config)
        return cls(
            engine=engine, generation_config=generation_config, eos_token_id=eos, pad_token_id=pad
        )

    @classmethod
    def load(
        cls,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> "VLLMSampler":
        """Build a vLLM engine along with the sampler.

        Args:
            model: folder or hub name of the checkpoint the policy starts from.
            tokenizer: as of `for_tokenizer`.
            generation_config: as of `for_tokenizer`.
            options: of ``vllm.LLM``: ``gpu_memory_utilization``, ``max_model_len`` …

        Raises:
            ImportError: where vLLM is not installed.
        """
        return cls.for_tokenizer(tokenizer, generation_config, VLLMEngine.load(model, **options))

    @property
    def asked(self) -> Asked:
        """What the engine is asked for, with nothing left to its defaults."""
        config = self.effective
        return Asked(
            temperature=float(config.temperature) if config.do_sample else 0.0,
            top_p=float(config.top_p) if config.do_sample else 1.0,
            top_k=int(config.top_k) if config.do_sample else 0,
            min_p=float(config.min_p or 0.0) if config.do_sample else 0.0,
            repetition_penalty=float(config.repetition_penalty),
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
        )

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Draw one response for each prompt, with the model's weights as they are now.

        Args:
            model: a transformers model, adapters inside of layers included.
            prompts: B lists of token ids, none empty.

        Returns:
            a `Rollout` of B sequences on the model's device, nothing scored yet.

        Raises:
            ValueError: where there is no prompt, or an empty one, or the engine is of another
                vocabulary, or returns something else than one response to each prompt, with its
                log-probabilities.
            RuntimeError: where the engine breaks a response off, or does not take the weights.
        """
        require_prompts(prompts)
        self._require_fitting(model)
        self.synchronizer(model)
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        drawn = self.engine.generate(prompts, self.asked, seeds)
        ended = self._require_whole(drawn, prompts)
        return assemble(
            prompts,
            [one.token_ids for one in drawn],
            ended,
            pad_token_id=self.pad_token_id,
            device=next(model.parameters()).device,
            logprobs=self._logprobs(drawn),
        )

    def _require_fitting(self, model: nn.Module) -> None:
        known, own = self.engine.vocabulary, vocabulary_size(within_layers(model, _WHO))
        if known is not None and known != own:
            raise ValueError(
                f"engine: it chooses among {known} tokens, the model among {own}, so its tokens "
                "are others; build it of the checkpoint the policy starts from"
            )

    def _require_whole(
        self, drawn: Sequence[Drawn], prompts: Sequence[Sequence[int]]
    ) -> list[bool]:
        """Return whether each response ended, where all are responses."""
        if len(drawn) != len(prompts):
            raise ValueError(
                f"engine: returned {len(drawn)} responses to {len(prompts)} prompts, expected one "
                "to each, in their order"
            )
        for index, one in enumerate(drawn):
            if one.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"engine: broke response {index} off (finish_reason={one.finish_reason!r}); "
                    "its log says why"
                )
            tokens = one.token_ids
            stopped = one.finish_reason == "stop"
            if len(tokens) > self.max_new_tokens or (
                stopped and (not tokens or tokens[-1] not in self.ends)
            ):
                raise ValueError(
                    f"engine: response {index} ({len(tokens)} tokens, finish_reason="
                    f"{one.finish_reason!r}) ends with {tokens[-1:]}, expected one of "
                    f"{list(self.ends)} as its last token, or {self.max_new_tokens} tokens"
                )
        # At the limit the last token may be an end all the same.
        return [bool(one.token_ids) and one.token_ids[-1] in self.ends for one in drawn]

    def _logprobs(self, drawn: Sequence[Drawn]) -> list[list[float]] | None:
        if not self.effective.do_sample:
            return None
        found = [one.logprobs for one in drawn if one.logprobs is not None]
        if len(found) < len(drawn):
            raise ValueError(
                f"engine: returned no log-probabilities for {len(drawn) - len(found)} of "
                f"{len(drawn)} responses, expected one for each token; without them its mismatch "
                "with the policy could not be seen"
            )
        given = departures(self.effective).items()
        changed = [f"{n}={value}" for n, value in given if n != "do_sample"]
        if not changed or self.engine.processed_logprobs:
            return found
        self._warn_raw(changed, [value for values in found for value in values])
        return None

    def _warn_raw(self, changed: list[str], values: list[float]) -> None:
        if vars(self).get("_warned"):
            return
        vars(self)["_warned"] = True
        warnings.warn(
            f"engine: its log-probabilities (mean {sum(values) / len(values):.3f} nats over "
            f"{len(values)} tokens) are of the raw logits, but responses are drawn with "
            f"{', '.join(changed)}, so they are not those of what was drawn and are left out: "
            "sampler/logprob_gap_nats is not logged, and PPOMaxLoss(sampler_ratio_cap=) weights "
            'nothing. Build the engine with logprobs_mode="processed_logprobs", as VLLMEngine.load '
            "does",
            UserWarning,
            stacklevel=4,
        )
