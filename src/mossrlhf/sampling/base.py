"""What every sampler shares: protocol, effective generation config, layout of a rollout."""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mossrlhf.models.lora import unwrap_peft
from mossrlhf.types import Rollout


@runtime_checkable
class Sampler(Protocol):
    """Generates one response for each prompt; log-probs are computed at its `temperature`."""

    @property
    def temperature(self) -> float:
        """Temperature τ of the sampled distribution."""

    @property
    def max_new_tokens(self) -> int:
        """Longest possible response, in tokens."""

    def __call__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
        """Generate one response for each of B prompts, lists of token ids, none of them empty.

        Returns a `Rollout` of B sequences on the model's device, with `sampler_logprobs` of the
        sampled distribution where they are known.
        """


FREE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Values for fields that a config leaves unset: they sample from the policy's own distribution."""

NEUTRAL = {
    **FREE,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
"""The value, besides None, at which each field leaves the distribution unchanged."""

_SEARCH = "tokens would not be sampled one by one from a distribution with known log-probs"
_ASSISTED = "assisted decoding takes one prompt at a time and samples several tokens at once"

REFUSED = {
    "stop_strings": "a response ends with a token here; name it by eos_token_id=",
    "max_time": "responses would end by the clock; shorten them by max_new_tokens=",
    "token_healing": "prompts would be changed; rewards and log-probabilities are of those given",
    "assistant_early_exit": _ASSISTED,
    "is_assistant": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "speculation_type": _ASSISTED,
    "use_mtp": _ASSISTED,
    "constraints": _SEARCH,
    "dola_layers": _SEARCH,
    "force_words_ids": _SEARCH,
    "penalty_alpha": _SEARCH,
}
"""Fields that no sampler supports, and what to do instead."""


def departures(config: GenerationConfig) -> dict[str, Any]:
    """Return the fields that change the distribution, with their values."""
    given = {name: getattr(config, name, None) for name in NEUTRAL}
    return {n: v for n, v in given.items() if v is not None and v != NEUTRAL[n]}


def require_distribution(config: GenerationConfig) -> None:
    """Raise ValueError for numbers that define no distribution; `generate` misses some of them."""
    if not config.do_sample:
        return
    ranges = {
        "temperature": (0 < config.temperature < math.inf, "above 0"),
        "top_p": (0 <= config.top_p <= 1, "in [0, 1]"),  # `generate` would ignore 95
        "top_k": (0 <= config.top_k < math.inf, "of at least 0 (0 for all tokens)"),
        "repetition_penalty": (0 < config.repetition_penalty < math.inf, "above 0 (1 for none)"),
    }
    for name, (fits, expected) in ranges.items():
        if not fits:
            raise ValueError(
                f"generation_config: {name} = {getattr(config, name)}, expected a number {expected}"
                "; for the likeliest token each time set do_sample=False"
            )


def require_plain(config: GenerationConfig) -> None:
    """Raise ValueError for anything but one response per prompt, sampled token by token."""
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(config, name) or 1) != 1:
            raise ValueError(
                f"generation_config: {name} = {getattr(config, name)}, expected 1; for several "
                "responses to a prompt set TrainerConfig.samples_per_prompt"
            )
    for name, instead in REFUSED.items():
        # Older releases of transformers lack the newest of them.
        value = getattr(config, name, None)
        off = value is None or value is False or (name == "penalty_alpha" and value == 0)
        if not off:
            raise ValueError(f"generation_config: {name} = {value!r}, expected None: {instead}")
    require_no_watermark(config)


def require_no_watermark(config: GenerationConfig) -> None:
    """Raise ValueError for a watermark: `generate` adds it after all other processors."""
    if config.do_sample is not False and config.watermarking_config is not None:
        raise ValueError(
            f"generation_config: watermarking_config = {config.watermarking_config}, expected "
            "None: a watermark is put on after everything else, so the log-probabilities of what "
            "was sampled could not be recorded; watermark the trained policy's responses instead"
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
    """Return the base model, whose layers hold the adapters."""
    base = unwrap_peft(model)
    for config in getattr(model, "peft_config", {}).values() if base is not model else ():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"model: its adapter ({kind}) acts outside of layers, which {backend} would not "
                "see; use HFSampler"
            )
    return base


def require_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where there is no prompt, or an empty one."""
    empty = [index for index, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not prompts:
        raise ValueError(
            f"prompts: got {len(prompts)}, of which {empty} are empty; expected at least one, "
            "and at least one token in each"
        )


def assemble(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    ended: Sequence[bool],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """Build a rollout ``[prompt][response][pad]``, padded on the right; for custom samplers.

    Args:
        prompts: B lists of token ids, none empty.
        completions: B lists of token ids, none empty, each with the token that ends it.
        ended: B booleans: whether the response ended by itself, rather than at the length limit.
        pad_token_id: any id of the vocabulary; masks come from lengths.
        device: of the rollout.
        logprobs: B lists of the tokens' log-probabilities under the sampled distribution, nats;
            None if they are unknown.

    Returns:
        a `Rollout` of B sequences; its ``sampler_logprobs`` ``[B, T]`` are float32, and zero
        outside the mask.

    Raises:
        ValueError: if there is not one response to each prompt, a response has no token, a token
            has a negative id, or the log-probabilities are not one finite number per token.
    """
    require_prompts(prompts)
    for name, values in (("completions", completions), ("ended", ended), ("logprobs", logprobs)):
        if values is not None and len(values) != len(prompts):
            raise ValueError(
                f"{name}: got {len(values)} for {len(prompts)} prompts, expected one for each, in "
                "their order"
            )
    _require_tokens(completions)
    known = None
    if logprobs is not None:
        _require_one_per_token(completions, logprobs)
        known = _padded(logprobs, 0.0, torch.float32).to(device)
    rows = [[*prompt, *response] for prompt, response in zip(prompts, completions, strict=True)]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    response_lengths = torch.tensor([len(response) for response in completions], device=device)
    length = max(len(response) for response in completions)
    mask = torch.arange(length, device=device) < response_lengths[:, None]
    return Rollout(
        input_ids=_padded(rows, pad_token_id, torch.long).to(device),
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        truncated=~torch.tensor([bool(end) for end in ended], device=device),
        mask=mask,
        sampler_logprobs=known,
    )


def _padded(rows: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)


def _require_tokens(completions: Sequence[Sequence[int]]) -> None:
    empty = [index for index, response in enumerate(completions) if len(response) == 0]
    if empty:
        raise ValueError(
            f"completions: {empty} have no token, expected at least one in each; the token that "
            "ends a response belongs to it"
        )
    negative = [index for index, response in enumerate(completions) if min(response) < 0]
    if negative:
        raise ValueError(
            f"completions: {negative} hold negative ids, expected ids of tokens; padding is "
            "added here, so leave it out"
        )


def _require_one_per_token(
    completions: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]
) -> None:
    for index, (response, given) in enumerate(zip(completions, logprobs, strict=True)):
        if len(response) != len(given):
            raise ValueError(
                f"logprobs: got {len(given)} for the {len(response)} tokens of response {index}, "
                "expected one for each; pass None where the sampler does not know them"
            )
        odd = [at for at, value in enumerate(given) if not math.isfinite(value)]
        if odd:
            raise ValueError(
                f"logprobs: that of token {odd[0]} of response {index} is {given[odd[0]]}, "
                "expected a finite number of nats: a sampled token cannot have been impossible"
            )
