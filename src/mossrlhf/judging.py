"""What a reward model says of texts: of responses to prompts, and of pairs of them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mossrlhf.data import encode_prompt, encode_response, pad, pad_id
from mossrlhf.models.backbone import evaluation_mode, group_by_length
from mossrlhf.strict import check_range

Prompt = str | Sequence[Mapping[str, str]]
Collate = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


@torch.no_grad()
def score_responses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> Float[Tensor, " N"]:
    """Score responses to prompts, as in the training of the model: each ended, nothing between.

    Sequences of like length are scored together, whatever order they come in.

    Args:
        model: a `RewardModel`; its mode is left as it is.
        tokenizer: its tokenizer.
        prompts: N texts or lists of messages.
        responses: N texts of the assistant.
        batch_size: sequences at a time.
        max_length: tokens of prompt and response; None for no limit.

    Returns:
        ``[N]`` scores, float32, on the CPU.

    Raises:
        ValueError: where prompts and responses are no lists or not as many, one pair is too
            long, a score is not finite, or the batch size is below 1.

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
    rows: list[list[int]] = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        given = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
        ids = [*encode_prompt(tokenizer, given), *encode_response(tokenizer, given, response)]
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"prompts: number {number} takes {len(ids)} tokens with its response, at most "
                f"{max_length} are allowed; raise max_length, or shorten it"
            )
        rows.append(ids)
    scores = torch.zeros(len(rows))
    for chosen in group_by_length(torch.tensor([len(ids) for ids in rows]).long(), batch_size):
        batch = pad([rows[i] for i in chosen], pad_id(tokenizer))
        scores[chosen] = _asked(model, *batch)
    return scores


def pair_margins(
    model: nn.Module,
    pairs: Sequence[Mapping[str, Any]],
    collator: Collate,
    batch_size: int = 32,
) -> Float[Tensor, " N"]:
    """Return r_w − r_l of every pair.

    Args:
        model: a `RewardModel`; its mode is left as it is.
        pairs: N records of ``prompt``, ``chosen``, ``rejected``.
        collator: a `PairCollator`.
        batch_size: pairs at a time.

    Returns:
        ``[N]`` float32, on the CPU.

    Raises:
        ValueError: where a score is not finite, or the batch size is below 1.

    Source: P1 §3.1.
    """
    check_range("pair_margins", "batch_size", batch_size, 1)
    found = [torch.zeros(0)]
    for start in range(0, len(pairs), batch_size):
        batch = collator([pairs[i] for i in range(start, min(start + batch_size, len(pairs)))])
        scores = _asked(model, batch["input_ids"], batch["attention_mask"])
        both = rearrange(scores, "(side pair) -> side pair", side=2)
        found.append(both[0] - both[1])
    return torch.cat(found)


def fingerprint(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Return what pairs are known by: their texts, in their order.

    Args:
        pairs: records of ``prompt``, ``chosen``, ``rejected``.

    Source: ours.
    """
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(pairs)):
        record = pairs[index]
        digest.update(repr([record.get(k) for k in ("prompt", "chosen", "rejected")]).encode())
    return digest.hexdigest()


@torch.no_grad()
def _asked(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    device = next(model.parameters()).device
    with evaluation_mode(model):
        scores: Tensor = model(ids.to(device), mask.to(device)).float().cpu()
    if broken := int((~scores.isfinite()).sum()):
        raise ValueError(
            f"model: {broken} of {len(scores)} scores are not finite; it has diverged in training "
            "(a lower learning rate may help), or its weights are damaged"
        )
    return scores
