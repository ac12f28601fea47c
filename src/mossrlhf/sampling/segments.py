"""`generate` in segments: between them, rows that have ended are let go."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from mossrlhf.models.backbone import accepts
from mossrlhf.models.lora import unwrap_peft
from mossrlhf.sampling.cache import has_rows, make_room
from mossrlhf.sampling.distribution import departures
from mossrlhf.sampling.draws import WARPERS, Draws, undrawn


@dataclass(frozen=True)
class Drawn:
    """What has been drawn for B prompts.

    Args:
        tokens: ``[B, T]``; what follows a row's first end token means nothing.
        logprobs: ``[B, T]`` of each under the distribution it was drawn from, nats; None where
            the likeliest was taken.
        entropies: ``[B, T]`` of those distributions, nats; None likewise.

    Source: ours.
    """

    tokens: Int[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"] | None = None
    entropies: Float[Tensor, "B T"] | None = None


@torch.no_grad()
def drawn(
    model: nn.Module,
    ids: Int[Tensor, "B P"],
    attended: Bool[Tensor, "B P"],
    config: GenerationConfig,
    uniform: Float[Tensor, "B T"],
    segment: int | None = None,
) -> Drawn:
    """Go on with prompts until each has come to an end token, or to T tokens.

    Args:
        model: with ``generate``.
        ids: ``[B, P]`` prompts, padded on the left.
        attended: ``[B, P]`` False on that padding.
        config: every field set.
        uniform: ``[B, T]`` numbers in [0, 1) to draw by.
        segment: tokens after which rows that have ended are let go; None for never. The answers
            are the same.

    Source: ours.
    """
    sampling = bool(config.do_sample)
    asked = undrawn(config) if sampling else copy.deepcopy(config)
    asked.return_dict_in_generate = True
    ends = torch.tensor(config.eos_token_id, device=ids.device).view(-1)
    size, limit = uniform.shape
    tokens = ids.new_full((size, limit), config.pad_token_id)
    noted = torch.zeros(2, size, limit, dtype=torch.float32, device=ids.device)
    rows, cache, done = torch.arange(size, device=ids.device), None, 0
    if segment is None or not _goes_on(model, config):
        segment = limit
    while done < limit:
        asked.max_new_tokens = min(segment, limit - done)
        draws = Draws(config, uniform[rows, done:]) if sampling else None
        ids, cache = _continued(model, ids, attended, asked, draws, cache)
        reached = done + ids.shape[1] - attended.shape[1]
        tokens[rows, done:reached] = ids[:, attended.shape[1] :]
        if draws is not None:
            noted[:, rows, done:reached] = torch.stack([draws.logprobs, draws.entropies])
        attended = nn.functional.pad(attended, (0, reached - done), value=True)
        done = reached
        going = ~torch.isin(tokens[rows, :done], ends).any(dim=1)
        if not going.any():
            break
        if cache is None:
            segment = limit  # each further segment would begin at the prompt
        elif not going.all() and has_rows(cache):
            kept = going.nonzero().squeeze(1)
            ids, attended, rows = ids[kept], attended[kept], rows[kept]
            cache.batch_select_indices(kept)
        make_room(cache, min(segment, limit - done))
    return Drawn(tokens, *noted) if sampling else Drawn(tokens)


def _continued(
    model: Any,
    ids: Tensor,
    attended: Tensor,
    config: GenerationConfig,
    draws: Draws | None,
    cache: Any,
) -> tuple[Tensor, Any]:
    """Prompts with some more tokens, and the cache of all but the last of them."""
    given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if draws is not None:
        given["logits_processor"] = [draws]
    if isinstance(unwrap_peft(model), GenerationMixin):
        # Weights are here, whole; processes go on each at its own pace.
        given["synced_gpus"] = False
    output = model.generate(ids, attention_mask=attended.long(), generation_config=config, **given)
    if isinstance(output, Tensor):  # by a `generate` of the user's
        return output, None
    return output.sequences, output.get("past_key_values")


FROM_ROWS = frozenset([*WARPERS, "do_sample", "repetition_penalty"])
"""What depends on a row's tokens alone, not on how many have been drawn since `generate` began."""


def _goes_on(model: nn.Module, config: GenerationConfig) -> bool:
    """Whether `generate` can be called again where it stopped, and would not notice."""
    plain = isinstance(unwrap_peft(model), GenerationMixin) and config.cache_implementation is None
    return (
        plain
        and config.use_cache is not False
        and accepts(unwrap_peft(model), "past_key_values")  # Mamba's state goes by another name
        and departures(config).keys() <= FROM_ROWS
        and not learns_prompt(model)  # which would come again
    )


def learns_prompt(model: nn.Module) -> bool:
    """Whether an adapter puts tokens of its own before every prompt.

    Args:
        model: a transformers model, with or without adapters.

    Source: ours.
    """
    kinds = getattr(model, "peft_config", {}).values()
    return any(kind.is_prompt_learning for kind in kinds)
