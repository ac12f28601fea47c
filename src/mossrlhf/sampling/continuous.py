"""Continuous batching of transformers as a sampler."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.options import strict
from mossrlhf.sampling.base import (
    ConfiguredSampler,
    assemble,
    require_prompts,
    require_supported,
    unwrap_layer_adapters,
)
from mossrlhf.types import Rollout

_BACKEND = "continuous batching"
_FIELDS = {spec.name for spec in fields(ContinuousBatchingConfig)}
_PAGE = "page_size" if "page_size" in _FIELDS else "block_size"  # in transformers 5.17

SUPPORTED = ("do_sample", "temperature", "top_k", "top_p")
"""Fields that continuous batching follows; transformers drops its other processors."""


@strict
@dataclass(frozen=True, kw_only=True)
class ContinuousSampler(ConfiguredSampler):
    """Generates responses with transformers' continuous batching, in the policy's own weights.

    A finished response makes room for the next prompt at once, and nothing is padded. That pays
    where lengths differ much, on a GPU, with flash attention, which needs half-precision weights.
    It works on a CPU, slowly. The forward passes run in a thread of transformers, in the weights'
    own dtype: an autocast around the call does not reach them.

    The model's attention, modes and random state are left as they were; samples follow from
    torch's generator. Every sampled response has the log-probs of the distribution it was sampled
    from; greedy ones have none.

    Args:
        generation_config: as for `HFSampler`; of the fields that change the distribution only
            temperature, top-k and top-p.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        batching: pages, blocks and tokens of a batch; None for what transformers chooses by the
            device's free memory, and on a CPU for as much as the prompts can need.

    Raises:
        ValueError: as `HFSampler`, and if continuous batching would ignore a field, or `batching`
            fixes a seed, with which all calls would sample the same.

    Source: ``generate_batch`` of transformers 5.23.
    """

    batching: ContinuousBatchingConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_supported(self.effective, SUPPORTED, _BACKEND)
        if self.batching is not None and self.batching.seed is not None:
            raise ValueError(
                f"batching: seed = {self.batching.seed}, expected None: every call would sample "
                "the same; call torch.manual_seed, or set TrainerConfig(seed=)"
            )

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig | None = None,
    ) -> "ContinuousSampler":
        """Take the end and padding tokens that the config leaves open from a tokenizer.

        Args: those of `ContinuousSampler`; a tokenizer without a padding token pads with eos.
        """
        return cls._for_tokenizer(tokenizer, generation_config, batching=batching)

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each prompt; Args: those of `Sampler`.

        Raises:
            ValueError: if there is no prompt, or an empty one, or the model is not supported.
            RuntimeError: if transformers did not finish every response.
        """
        require_prompts(prompts)
        base: Any = _require_supported_model(model)
        seed = int(torch.randint(2**31, ()))
        device: torch.device = next(base.parameters()).device
        cuda = range(torch.cuda.device_count())  # transformers seeds the generators of all
        with _restored(base), torch.random.fork_rng(devices=cuda):
            given = base.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=copy.deepcopy(self.effective),
                continuous_batching_config=self._batching(base, prompts, seed),
            )
        outputs = _require_finished(list(given.values()), len(prompts))
        completions = [output.generated_tokens for output in outputs]
        return assemble(
            prompts,
            completions,
            [response[-1] in self.ends for response in completions],
            pad_token_id=self.pad_token_id,
            device=device,
            logprobs=[o.logprobs for o in outputs] if self.effective.do_sample else None,
        )

    def _batching(
        self, model: Any, prompts: Sequence[Sequence[int]], seed: int
    ) -> ContinuousBatchingConfig:
        batching = self.batching or ContinuousBatchingConfig()
        changed = {"return_logprobs": bool(self.effective.do_sample), "seed": seed}
        if model.dtype not in (torch.float16, torch.bfloat16):
            changed["auto_switch_to_flash"] = False  # flash attention supports no other dtype
        if model.device.type == "cpu" and batching.num_blocks is None:
            # By default it fills most of the machine's memory, whatever the prompts.
            size = getattr(batching, _PAGE) if self.batching else 32
            longest = [len(prompt) + self.max_new_tokens for prompt in prompts]
            changed[_PAGE] = size
            changed["num_blocks"] = sum(math.ceil(length / size) + 1 for length in longest)
            changed["max_batch_tokens"] = batching.max_batch_tokens or max(256, len(prompts))
        return replace(batching, **{name: changed[name] for name in changed if name in _FIELDS})


def _require_supported_model(model: nn.Module) -> nn.Module:
    """Return the base model, where transformers can batch it with its current weights."""
    base = unwrap_layer_adapters(model, _BACKEND)
    if not hasattr(base, "generate_batch"):
        raise ValueError(
            f"model: {type(base).__name__} has no generate_batch, so transformers does not batch "
            "it continuously; use HFSampler"
        )
    if getattr(base, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            "model: keeps a manager of continuous batching, whose cache is of earlier weights; "
            "call model.destroy_cached_continuous_batching_manager() first"
        )
    return base


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restore modes, attention and config; transformers restores some, and not after an error."""
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    attention = [
        (config, config._attn_implementation)
        for config in configs.values()
        if hasattr(config, "_attn_implementation")
    ]
    generation_config = model.generation_config
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config, own in attention:  # the outermost first: setting it sets those within
            if config._attn_implementation != own:
                config._attn_implementation = own
        model.generation_config = generation_config


def _require_finished(outputs: list[Any], count: int) -> list[Any]:
    """Raise RuntimeError for missing responses: `generate_batch` logs errors, returns the rest."""
    broken = [o.error for o in outputs if o.error is not None or not o.is_finished()]
    missing = count - len(outputs)
    if broken or missing:
        raise RuntimeError(
            f"ContinuousSampler: {len(broken) + missing} of {count} responses were not brought to "
            f"their end ({broken[0] if broken else 'they are missing'}); transformers has logged "
            "why. Give it fewer tokens at a time (batching=ContinuousBatchingConfig("
            "max_batch_tokens=, num_blocks=)), or use HFSampler"
        )
    return outputs
