"""A sampler around an engine with weights of its own, such as vLLM."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.models.beneath import bare_module
from mossrlhf.options import strict
from mossrlhf.sampling.assembling import assemble, require_prompts
from mossrlhf.sampling.configured import (
    ConfiguredSampler,
    require_supported,
    unwrap_layer_adapters,
)
from mossrlhf.sampling.distribution import departures
from mossrlhf.sampling.engines import Completion, Engine, SamplingSettings, Synchronizer
from mossrlhf.sampling.vllm_engine import VLLMEngine
from mossrlhf.types import Rollout

_BACKEND = "the engine"

SUPPORTED = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields that engines follow."""


@strict
@dataclass(frozen=True, kw_only=True)
class VLLMSampler(ConfiguredSampler):
    """Generates responses with a vLLM engine, whose weights follow the policy's.

    **Tested against a stand-in engine only, never against vLLM itself.**

    Before generating, the engine receives the model's weights if they differ from those it has,
    adapters merged in, and drops its prefix cache. Every sampled response has log-probs; their
    difference from those of the policy is logged (``sampler/…``), and
    `PPOMaxLoss.sampler_ratio_cap` weights for it. Every process of a trainer needs an engine of
    its own. Samples follow from torch's generator, by a seed for each prompt.

    Args:
        engine: a `VLLMEngine`, or any `Engine`.
        generation_config: as for `HFSampler`; of the fields that change the distribution only
            temperature, top-k, top-p, min-p and repetition penalty.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.

    Raises:
        TypeError: if the engine lacks a member of `Engine`.
        ValueError: as `HFSampler`, and if the engine would ignore a field.

    Source: the engine: Kwon et al. (arXiv 2309.06180).
    """

    engine: Engine
    synchronizer: Synchronizer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise TypeError(
                f"engine: got {self.engine!r:.60}, expected VLLMEngine(llm) around a vllm.LLM, or "
                "an object with load_weights, reset_prefix_cache, generate, vocabulary and "
                "processed_logprobs"
            )
        super().__post_init__()
        config = self.effective
        require_supported(config, SUPPORTED, _BACKEND)
        if config.do_sample and config.top_p == 0:
            raise ValueError(
                "generation_config: top_p = 0, expected a number in (0, 1]; for the likeliest "
                "token each time set do_sample=False"
            )
        object.__setattr__(self, "synchronizer", Synchronizer(self.engine))

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig, engine: Engine
    ) -> "VLLMSampler":
        """Take the end and padding tokens that the config leaves open from a tokenizer.

        Args: those of `VLLMSampler`; a tokenizer without a padding token pads with eos.
        """
        return cls._for_tokenizer(tokenizer, generation_config, engine=engine)

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
            tokenizer: as for `for_tokenizer`.
            generation_config: as for `for_tokenizer`.
            options: of ``vllm.LLM``: ``gpu_memory_utilization``, ``max_model_len`` …

        Raises:
            ImportError: if vLLM is not installed.
        """
        return cls.for_tokenizer(tokenizer, generation_config, VLLMEngine.load(model, **options))

    @property
    def settings(self) -> SamplingSettings:
        """How the engine samples."""
        config = self.effective
        return SamplingSettings(
            temperature=float(config.temperature) if config.do_sample else 0.0,
            top_p=float(config.top_p) if config.do_sample else 1.0,
            top_k=int(config.top_k) if config.do_sample else 0,
            min_p=float(config.min_p or 0.0) if config.do_sample else 0.0,
            repetition_penalty=float(config.repetition_penalty),
            max_new_tokens=self.max_new_tokens,
            ends=self.ends,
        )

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each prompt, with the model's current weights.

        Args:
            model: a transformers model; adapters inside of its layers.
            prompts: B lists of token ids, none empty.

        Returns:
            a `Rollout` of B sequences on the model's device.

        Raises:
            ValueError: if there is no prompt, or an empty one, or the engine has another
                vocabulary, or returns anything but one response to each prompt, with its
                log-probs.
            RuntimeError: if the engine aborts a response, or does not load the weights.
        """
        require_prompts(prompts)
        self._require_same_vocabulary(model)
        self.synchronizer(model)
        seeds = torch.randint(2**31 - 1, (len(prompts),)).tolist()
        completions = self.engine.generate(prompts, self.settings, seeds)
        self._require_complete(completions, len(prompts))
        return assemble(
            prompts,
            [one.token_ids for one in completions],
            # At the limit the last token may be an end token too.
            [bool(one.token_ids) and one.token_ids[-1] in self.ends for one in completions],
            pad_token_id=self.pad_token_id,
            device=next(model.parameters()).device,
            logprobs=self._logprobs(completions) if self.effective.do_sample else None,
        )

    def _require_same_vocabulary(self, model: nn.Module) -> None:
        base: Any = unwrap_layer_adapters(model, _BACKEND)
        embedding: Any = bare_module(base.get_input_embeddings())
        known, own = self.engine.vocabulary, embedding.num_embeddings
        if known is not None and known != own:
            raise ValueError(
                f"engine: it chooses among {known} tokens, the model among {own}, so its tokens "
                "are others; build it of the checkpoint the policy starts from"
            )

    def _require_complete(self, completions: Sequence[Completion], count: int) -> None:
        if len(completions) != count:
            raise ValueError(
                f"engine: returned {len(completions)} responses to {count} prompts, expected one "
                "to each, in their order"
            )
        for index, one in enumerate(completions):
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

    def _logprobs(self, completions: Sequence[Completion]) -> list[list[float]] | None:
        """Return log-probs of the sampled distribution; None, with a warning, if of another."""
        found = [one.logprobs for one in completions if one.logprobs is not None]
        if len(found) < len(completions):
            raise ValueError(
                f"engine: returned no log-probabilities for {len(completions) - len(found)} of "
                f"{len(completions)} responses, expected one for each token; without them its "
                "mismatch with the policy could not be seen"
            )
        given = departures(self.effective).items()
        changed = [f"{n}={value}" for n, value in given if n != "do_sample"]
        if not changed or self.engine.processed_logprobs:
            return found
        if not vars(self).get("_warned"):
            vars(self)["_warned"] = True
            values = [value for known in found for value in known]
            warnings.warn(
                f"engine: its log-probabilities (mean {sum(values) / len(values):.3f} nats over "
                f"{len(values)} tokens) are of the raw logits, but responses are sampled with "
                f"{', '.join(changed)}, so they are not those of the sampled distribution and are "
                "left out: sampler/logprob_gap_nats is not logged, and "
                "PPOMaxLoss(sampler_ratio_cap=) weights nothing. Build the engine with "
                'logprobs_mode="processed_logprobs", as VLLMEngine.load does',
                UserWarning,
                stacklevel=3,
            )
        return None
