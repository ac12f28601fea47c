"""The config in force of a sampler: every field set here, none taken from the checkpoint."""

import copy
from collections.abc import Collection, Sequence

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.models.lora import unwrap_peft
from mossrlhf.sampling.distribution import (
    FREE,
    NEUTRAL,
    departures,
    require_distribution,
    require_plain,
)


class Configured:
    """What all samplers say of themselves that draw by a `GenerationConfig`. Source: ours."""

    effective: GenerationConfig

    @property
    def temperature(self) -> float:
        """Temperature τ of the distribution the responses come from; 1 where greedy."""
        return float(self.effective.temperature) if self.effective.do_sample else 1.0

    @property
    def max_new_tokens(self) -> int:
        """Longest response possible, in tokens."""
        return int(self.effective.max_new_tokens)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        eos = self.effective.eos_token_id
        return (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def departures(self) -> list[str]:
        """What makes the drawn distribution differ from the scored one, temperature apart."""
        given = departures(self.effective).items()
        return [f"{name}={value}" for name, value in given if name != "temperature"]


def effective_config(
    asked: GenerationConfig, eos_token_id: int | Sequence[int], pad_token_id: int
) -> GenerationConfig:
    """Return a config with every field set that shapes the distribution.

    Args:
        asked: ``max_new_tokens`` must be set; unset temperature, top-k, top-p and penalty mean
            the policy's own distribution.
        eos_token_id: token(s) that end a response.
        pad_token_id: any id of the vocabulary.

    Raises:
        ValueError: where ``max_new_tokens`` is missing, no token ends a response, or what is asked
            for is no distribution, or no sampling of one response per prompt, token by token.

    Source: ours.
    """
    config = copy.deepcopy(asked)
    if config.max_new_tokens is None:
        raise ValueError(
            "generation_config: max_new_tokens is None; say how long a response may become, "
            "e.g. GenerationConfig(max_new_tokens=512)"
        )
    require_plain(config)
    greedy = config.do_sample is False  # then transformers warns of what concerns sampling
    for name, value in FREE.items():
        if getattr(config, name) is None and not (greedy and name != "repetition_penalty"):
            setattr(config, name, value)
    require_distribution(config)
    if not isinstance(eos_token_id, int) and len(eos_token_id) == 0:
        raise ValueError(
            "eos_token_id: got none, expected at least one token that ends a response; to let "
            "all run to the limit, name one the policy never says"
        )
    config.eos_token_id = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    config.pad_token_id = pad_token_id
    config.return_dict_in_generate = False
    return config


def require_known(config: GenerationConfig, known: Collection[str], drawn_by: str) -> None:
    """Refuse what would be passed over in silence.

    Args:
        config: the one in force.
        known: fields that are heeded.
        drawn_by: what the error calls whoever draws.

    Raises:
        ValueError: with the first field that is not heeded.

    Source: ours.
    """
    for name, value in departures(config).items():
        if name not in known:
            raise ValueError(
                f"generation_config: {name} = {value!r}, expected {NEUTRAL[name]!r}: {drawn_by} "
                "would pass over it; leave it out, or draw with HFSampler"
            )


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> tuple[int | Sequence[int], int]:
    """Return the tokens that end and pad, the config's before the tokenizer's.

    Args:
        tokenizer: needs an eos token; without a padding token, eos pads.
        config: its own ``eos_token_id`` and ``pad_token_id`` go first.

    Raises:
        ValueError: where neither names an end token.

    Source: ours.
    """
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "processing_class: has no eos token, so no response can end; set "
            "tokenizer.eos_token or GenerationConfig(eos_token_id=)"
        )
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    if pad is None:
        pad = eos if isinstance(eos, int) else eos[0]
    return eos, pad


def within_layers(model: nn.Module, drawn_by: str) -> nn.Module:
    """Return the transformers model inside of adapters, where it says all that they say.

    Args:
        model: a transformers model, with or without adapters.
        drawn_by: what the error calls whoever draws.

    Raises:
        ValueError: where adapters act outside of layers too.

    Source: ours.
    """
    found = unwrap_peft(model)
    for config in getattr(model, "peft_config", {}).values() if found is not model else ():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"model: its adapter ({kind}) acts outside of layers, which {drawn_by} would not "
                "see; draw with HFSampler"
            )
    return found
