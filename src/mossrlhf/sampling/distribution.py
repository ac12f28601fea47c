"""The fields of a generation config that shape the sampled distribution."""

import math
from typing import Any

from transformers import GenerationConfig

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
