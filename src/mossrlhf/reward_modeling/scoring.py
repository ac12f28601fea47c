"""Rewards of texts: of responses to prompts, and of preference pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mossrlhf.data import encode_prompt, encode_response, pad, pad_id
from mossrlhf.models.backbone import evaluation_mode, group_by_length
from mossrlhf.options import check_range

Prompt = str | Sequence[Mapping[str, str]]
Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


def score_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Float[Tensor, " N"]:
    """Return the rewards of responses to prompts, encoded as in the training of the model.

    Every response ends with the end token. Sequences of similar length share a batch.

    Args:
        model: a `RewardModel`; its mode is restored.
        tokenizer: its tokenizer.
        prompts: N texts or lists of messages.
        responses: N texts of the assistant.
        batch_size: sequences per forward pass.
        max_length: limit for prompt and response together, in tokens; None for no limit.

    Returns:
        ``[N]`` rewards, float32, on the CPU.

    Raises:
        ValueError: if prompts and responses are not lists of equal length, a sequence is too long,
            a reward is not finite, or the batch size is below 1.

    Source: P1 §3.1.
    """
    check_range("score_responses", "batch_size", batch_size, 1)
    for name, texts in (("prompts", prompts), ("responses", responses)):
        if isinstance(texts, str):
            raise ValueError(f"{name}: got one text, expected a list of them: [{texts!r:.40}]")
    if len(prompts) != len(responses):
        raise ValueError(
            f"prompts, responses: got {len(prompts)} and {len(responses)}, expected one response "
            "to each prompt"
        )
    rows = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        given = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        ids = [*encode_prompt(tokenizer, given), *encode_response(tokenizer, given, response)]
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"prompts: number {number} takes {len(ids)} tokens with its response, at most "
                f"{max_length} are allowed; raise max_length, or shorten it"
            )
        rows.append(ids)
    rewards = torch.zeros(len(rows))
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    for batch in group_by_length(lengths, batch_size):
        rewards[batch] = _rewards(model, *pad([rows[i] for i in batch], pad_id(tokenizer)))
    return rewards


def pair_margins(
    model: nn.Module, pairs: Sequence[Mapping[str, Any]], collator: Collate, batch_size: int = 32
) -> Float[Tensor, " N"]:
    """Return r_w − r_l of every pair, float32, on the CPU."""
    check_range("pair_margins", "batch_size", batch_size, 1)
    margins = torch.zeros(len(pairs))
    for start in range(0, len(pairs), batch_size):
        indices = range(start, min(start + batch_size, len(pairs)))
        batch = collator([pairs[i] for i in indices])
        chosen, rejected = _rewards(model, batch["input_ids"], batch["attention_mask"]).chunk(2)
        margins[indices.start : indices.stop] = chosen - rejected
    return margins


@torch.no_grad()
def _rewards(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute finite rewards on the CPU, with the model in evaluation mode."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        rewards: Tensor = model(ids.to(device), mask.to(device)).float().cpu()
    if broken := int((~rewards.isfinite()).sum()):
        raise ValueError(
            f"model: {broken} of {len(rewards)} rewards are not finite; it diverged in training "
            "(a lower learning rate may help), or its weights are damaged"
        )
    return rewards
