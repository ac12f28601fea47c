"""The base class of samplers that follow a `GenerationConfig`."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.options import inside
from mossrlhf.sampling.distribution import (
    FREE,
    NEUTRAL,
    departures,
    require_distribution,
    require_plain,
)

S = TypeVar("S", bound="ConfiguredSampler")


@dataclass(frozen=True, kw_only=True)
class ConfiguredSampler:
    """What all samplers share that follow a `GenerationConfig`; see `HFSampler`."""

    generation_config: GenerationConfig
    eos_token_id: int | Sequence[int]
    pad_token_id: int
    effective: GenerationConfig = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = effective_config(self.generation_config, self.eos_token_id, self.pad_token_id)
        object.__setattr__(self, "effective", config)

    @classmethod
    def _for_tokenizer(
        cls: type[S], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, **options: Any
    ) -> S:
        eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "processing_class: has no eos token, so no response can end; set "
                "tokenizer.eos_token or GenerationConfig(eos_token_id=)"
            )
        pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        if pad is None:
            pad = eos if isinstance(eos, int) else eos[0]
        return cls(generation_config=config, eos_token_id=eos, pad_token_id=pad, **options)

    @property
    def temperature(self) -> float:
        """Temperature τ of the sampled distribution; 1 for greedy decoding."""
        return float(self.effective.temperature) if self.effective.do_sample else 1.0

    @property
    def max_new_tokens(self) -> int:
        """Longest possible response, in tokens."""
        return int(self.effective.max_new_tokens)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        eos = self.effective.eos_token_id
        return (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def departures(self) -> list[str]:
        """What makes the sampled distribution differ from the policy's, temperature apart."""
        given = departures(self.effective).items()
        return [f"{name}={value}" for name, value in given if name != "temperature"]


def effective_config(
    given: GenerationConfig, eos_token_id: int | Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """Return a copy of a config in which every field is set that shapes the distribution."""
    config = copy.deepcopy(given)
    if config.max_new_tokens is None:
        raise ValueError(
            "generation_config: max_new_tokens is None; say how long a response may become, "
            "e.g. GenerationConfig(max_new_tokens=512)"
        )
    require_plain(config)
    greedy = config.do_sample is False  # transformers warns of unused sampling fields
    for name, value in FREE.items():
        if getattr(config, name) is None and not (greedy and name != "repetition_penalty"):
            setattr(config, name, value)
    require_distribution(config)
    if not isinstance(eos_token_id, int) and len(eos_token_id) == 0:
        raise ValueError(
            "eos_token_id: got none, expected at least one token that ends a response; to let "
            "all run to the limit, name one that the policy never generates"
        )
    config.eos_token_id = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    config.pad_token_id = pad_token_id
    config.return_dict_in_generate = False
    return config


def require_supported(config: GenerationConfig, supported: Collection[str], backend: str) -> None:
    """Raise ValueError for a field that changes the distribution and that a backend ignores."""
    for name, value in departures(config).items():
        if name not in supported:
            raise ValueError(
                f"generation_config: {name} = {value!r}, expected {NEUTRAL[name]!r}: {backend} "
                "would pass over it; leave it out, or use HFSampler"
            )


def unwrap_layer_adapters(model: nn.Module, backend: str) -> nn.Module:
    """Return the base model, whose layers hold the adapters.

    Raises:
        ValueError: for adapters that act outside of layers, which a backend would ignore.
    """
    base = inside(model)
    for config in getattr(model, "peft_config", {}).values() if base is not model else ():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"model: its adapter ({kind}) acts outside of layers, which {backend} would not "
                "see; use HFSampler"
            )
    return base
