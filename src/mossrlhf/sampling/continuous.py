"""Continuous batching of transformers behind the sampler protocol."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.models.backbone import evaluation_mode
from mossrlhf.sampling.assembling import assemble, require_prompts
from mossrlhf.sampling.configured import (
    Configured,
    effective_config,
    require_known,
    special_tokens,
    within_layers,
)
from mossrlhf.strict import strict
from mossrlhf.types import Rollout

_WHO = "continuous batching"

_FIELDS = {spec.name for spec in fields(ContinuousBatchingConfig)}
_PAGE = "page_size" if "page_size" in _FIELDS else "block_size"  # in transformers 5.17

KNOWN = ("do_sample", "temperature", "top_k", "top_p")
"""Fields that continuous batching heeds; transformers drops its other processors by itself."""


@strict
@dataclass(frozen=True, kw_only=True)
class ContinuousSampler(Configured):
    """Draws responses with transformers' continuous batching, weights shared with the policy.

    A response that ends makes room for the next prompt at once, and nothing is padded: worth it
    where lengths differ much, on a GPU, with flash attention, which wants half-precision weights.
    On a CPU it works, slowly. The forward passes run in a thread of transformers', in the weights'
    own type: an autocast around the call does not reach them.

    The model's attention, modes and random numbers are left as they were; draws follow from
    torch's generator. Log-probabilities come with every sampled response, by the distribution it
    was drawn from; none where greedy.

    Args:
        generation_config: as of `HFSampler`; of what changes the distribution, temperature, top-k
            and top-p alone.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        batching: pages, blocks and tokens of a batch; None for what transformers chooses by the
            device's free memory, and on a CPU for as much as the prompts can need.

    Raises:
        ValueError: as `HFSampler`, and where continuous batching would pass over a field, or
            `batching` fixes a seed, by which all calls would draw the same.

    Source: ours; ``generate_batch`` of transformers 5.23.
    """

    generation_config: GenerationConfig
    eos_token_id: int | Sequence[int]
    pad_token_id: int
    batching: ContinuousBatchingConfig | None = None
    effective: GenerationConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = effective_config(self.generation_config, self.eos_token_id, self.pad_token_id)
        require_known(config, KNOWN, _WHO)
        if self.batching is not None and self.batching.seed is not None:
            raise ValueError(
                f"batching: seed = {self.batching.seed}, expected None: every call would draw the "
                "same; call torch.manual_seed, or set TrainerConfig(seed=)"
            )
        object.__setattr__(self, "effective", config)

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig,
        batching: ContinuousBatchingConfig | None = None,
    ) -> "ContinuousSampler":
        """Take end and padding tokens from a tokenizer, where the config does not name them.

        Args:
            tokenizer: needs an eos token; without a padding token, eos pads.
            generation_config: as above; its own ``eos_token_id`` and ``pad_token_id`` go first.
            batching: as above.

        Raises:
            ValueError: where neither names an end token.
        """
        eos, pad = special_tokens(tokenizer, generation_config)
        return cls(
            generation_config=generation_config,
            eos_token_id=eos,
            pad_token_id=pad,
            batching=batching,
        )

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Draw one response for each prompt.

        Args:
            model: a transformers model with ``generate_batch``, adapters inside of layers included.
            prompts: B lists of token ids, none empty.

        Returns:
            a `Rollout` of B sequences on the model's device, nothing scored yet.

        Raises:
            ValueError: where there is no prompt, or an empty one, or the model cannot be asked so.
            RuntimeError: where transformers did not bring every response to its end.
        """
        require_prompts(prompts)
        bare: Any = _drawable(model)
        seed = int(torch.randint(2**31, ()))
        device: torch.device = next(bare.parameters()).device
        cuda = range(torch.cuda.device_count())  # it seeds the generators of all
        with _as_found(bare), torch.random.fork_rng(devices=cuda):
            given = bare.generate_batch(
                [list(prompt) for prompt in prompts],
                generation_config=copy.deepcopy(self.effective),
                continuous_batching_config=self._batching(bare, prompts, seed),
            )
        outputs = _whole(list(given.values()), len(prompts))
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
            changed["auto_switch_to_flash"] = False  # flash attention knows no other types
        if model.device.type == "cpu" and batching.num_blocks is None:
            # Left to itself it fills most of the machine's memory, whatever is asked.
            size = getattr(batching, _PAGE) if self.batching else 32
            longest = [len(prompt) + self.max_new_tokens for prompt in prompts]
            changed[_PAGE] = size
            changed["num_blocks"] = sum(math.ceil(length / size) + 1 for length in longest)
            changed["max_batch_tokens"] = batching.max_batch_tokens or max(256, len(prompts))
        return replace(batching, **{name: changed[name] for name in changed if name in _FIELDS})


def _drawable(model: nn.Module) -> nn.Module:
    found = within_layers(model, _WHO)
    if not hasattr(found, "generate_batch"):
        raise ValueError(
            f"model: {type(found).__name__} has no generate_batch, so transformers does not batch "
            "it continuously; draw with HFSampler"
        )
    if getattr(found, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            "model: keeps a manager of continuous batching, whose cache is of earlier weights; "
            "call model.destroy_cached_continuous_batching_manager() first"
        )
    return found


@contextmanager
def _as_found(model: Any) -> Iterator[None]:
    """Put back what drawing changes, which transformers does where all goes well, modes apart."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    attention = [
        (config, config._attn_implementation)
        for config in configs.values()
        if hasattr(config, "_attn_implementation")
    ]
    generation_config = model.generation_config
    try:
        with evaluation_mode(model):
            yield
    finally:
        for config, own in attention:  # the outermost first: it sets those within along
            if config._attn_implementation != own:
                config._attn_implementation = own
        model.generation_config = generation_config


def _whole(outputs: list[Any], count: int) -> list[Any]:
    """Refuse what is missing or broken off: `generate_batch` logs errors, and returns the rest."""
    broken = [o.error for o in outputs if o.error is not None or not o.is_finished()]
    missing = count - len(outputs)
    if broken or missing:
        raise RuntimeError(
            f"ContinuousSampler: {len(broken) + missing} of {count} responses were not brought to "
            f"their end ({broken[0] if broken else 'they are missing'}); transformers has logged "
            "why. Give it fewer tokens at a time (batching=ContinuousBatchingConfig("
            "max_batch_tokens=, num_blocks=)), or draw with HFSampler"
        )
    return outputs
