"""`generate` in segments, between which finished responses leave the batch."""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from mossrlhf.options import accepts, inside
from mossrlhf.sampling.cache import can_drop_rows, preallocate
from mossrlhf.sampling.distribution import departures
from mossrlhf.sampling.draws import WARPERS, SamplingProcessor, greedy_config

FROM_ROWS = frozenset([*WARPERS, "do_sample", "repetition_penalty"])
"""Fields whose effect depends on a row's tokens alone, not on where the prompt ended."""


@torch.no_grad()
def generate_in_segments(
    model: nn.Module,
    ids: Int[Tensor, "B P"],
    attention_mask: Bool[Tensor, "B P"],
    config: GenerationConfig,
    uniform: Float[Tensor, "B T"],
    segment: int | None = None,
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generate until each row has an end token, or T tokens.

    Args:
        model: with ``generate``.
        ids: ``[B, P]`` prompts, padded on the left.
        attention_mask: ``[B, P]`` False on that padding.
        config: the effective one.
        uniform: ``[B, T]`` numbers in [0, 1) to sample by.
        segment: tokens after which finished rows leave the batch; None for never. The responses
            are the same.

    Returns:
        ``[B, T]`` tokens, arbitrary after a row's first end token, and their log-probs under the
        sampled distribution, nats; 0 for greedy decoding.
    """
    sampling = bool(config.do_sample)
    given = greedy_config(config) if sampling else copy.deepcopy(config)
    given.return_dict_in_generate = True
    ends = torch.tensor(config.eos_token_id, device=ids.device).view(-1)
    size, limit = uniform.shape
    tokens = ids.new_full((size, limit), config.pad_token_id)
    logprobs = torch.zeros(size, limit, dtype=torch.float32, device=ids.device)
    rows, cache, done = torch.arange(size, device=ids.device), None, 0
    if segment is None or not _can_continue(model, config):
        segment = limit
    while done < limit:
        given.max_new_tokens = min(segment, limit - done)
        processor = SamplingProcessor(config, uniform[rows, done:]) if sampling else None
        ids, cache = _generate(model, ids, attention_mask, given, processor, cache)
        new = ids.shape[1] - attention_mask.shape[1]
        tokens[rows, done : done + new] = ids[:, attention_mask.shape[1] :]
        if processor is not None:
            # Where transformers defers its stopping check, one token more was sampled.
            logprobs[rows, done : done + new] = processor.logprobs[:, :new]
        attention_mask = nn.functional.pad(attention_mask, (0, new), value=True)
        done += new
        unfinished = ~torch.isin(tokens[rows, :done], ends).any(dim=1)
        if not unfinished.any():
            break
        if cache is None:
            segment = limit  # each further segment would begin at the prompt
        elif not unfinished.all() and can_drop_rows(cache):
            kept = unfinished.nonzero().squeeze(1)
            ids, attention_mask, rows = ids[kept], attention_mask[kept], rows[kept]
            cache.batch_select_indices(kept)
        preallocate(cache, min(segment, limit - done))
    return tokens, logprobs


def _generate(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    processor: SamplingProcessor | None,
    cache: Any,
) -> tuple[Tensor, Any]:
    """Return the ids with new tokens, and the cache of all but the last."""
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if processor is not None:
        options["logits_processor"] = [processor]
    if isinstance(inside(model), GenerationMixin):
        # Each process holds whole weights here, and generates at its own pace.
        options["synced_gpus"] = False
    output = model.generate(
        ids, attention_mask=attention_mask.long(), generation_config=config, **options
    )
    if isinstance(output, Tensor):  # a custom `generate` may return the tokens alone
        return output, None
    return output.sequences, output.get("past_key_values")


def _can_continue(model: nn.Module, config: GenerationConfig) -> bool:
    """Whether a second `generate` from the cache gives what one call would."""
    base = inside(model)
    adapters = getattr(model, "peft_config", {}).values()
    return (
        isinstance(base, GenerationMixin)
        and config.cache_implementation is None
        and config.use_cache is not False
        and accepts(base, "past_key_values")  # Mamba's state has another name
        and departures(config).keys() <= FROM_ROWS
        and not any(adapter.is_prompt_learning for adapter in adapters)  # put in again each time
    )
