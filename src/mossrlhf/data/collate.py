"""Collation: canonical records in, padded tensors with masks from lengths out."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mossrlhf.data.formats import Prompt
from mossrlhf.data.memory import DEFAULT_BYTES, Encodings
from mossrlhf.data.templates import (
    encode_prompt,
    encode_response,
    encode_text,
    prompt_encodings,
)
from mossrlhf.options import check_range

IGNORE = -100
"""The label of tokens outside the loss, as torch's cross entropy and transformers have it."""


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Pad sequences to the longest of them.

    Args:
        sequences: B lists of token ids.
        pad_id: any id, eos included: the mask comes from the lengths.
        left: pad before the sequence instead of after it.

    Returns:
        ``[B, L]`` token ids; ``[B, L]`` attention mask, 1 on the sequences and 0 on the padding.

    Raises:
        ValueError: where there is nothing to pad.

    Source: ours.
    """
    if not sequences:
        raise ValueError("sequences: got none, expected at least one to pad")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    fill = [[pad_id] * (width - len(sequence)) for sequence in sequences]
    pairs = zip(fill, map(list, sequences), strict=True)
    ids = [padding + ids if left else ids + padding for padding, ids in pairs]
    positions = torch.arange(width)
    mask = positions >= width - lengths[:, None] if left else positions < lengths[:, None]
    return torch.tensor(ids, dtype=torch.long), mask.long()


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad id of a `tokenizer`, or its eos id, or 0: masked out, so any will do.

    Source: ours.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


@dataclass(frozen=True)
class SFTCollator:
    """Turn SFT or PTX records into a batch for a causal language model.

    ``{"prompt", "response"}`` is learned on its response, ``{"text"}`` on every token. What is
    too long loses the prompt's oldest exchanges first, then the end of the response or text.

    Args:
        tokenizer: with an eos token, and a chat template where prompts are messages.
        max_length: of prompt and response, in tokens; None for no limit.
        cache_bytes: room for the token ids of records met before, which are then not rendered
            and tokenized again; None for none.

    Raises:
        ValueError: where a record has not these columns, what they hold is no text, or a prompt
            leaves no room for a response.
        TypeError: where a record is no dict.

    Source: ours.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = field(default=None, kw_only=True)
    cache_bytes: int | None = field(default=DEFAULT_BYTES, kw_only=True)
    _known: Encodings = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("SFTCollator", "max_length", self.max_length, 2)
        object.__setattr__(self, "_known", Encodings(self.cache_bytes))

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Int[Tensor, "B L"]]:
        """Return ``[B, L]`` ``input_ids``, ``attention_mask`` and ``labels`` (-100: no loss)."""
        self._known.follow(self.tokenizer)
        rows = [self._encode(record) for record in records]
        ids, mask = pad([prompt + learned for prompt, learned in rows], pad_id(self.tokenizer))
        labels = _labels(ids, mask, [len(prompt) for prompt, _ in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _encode(self, record: Mapping[str, Any]) -> list[list[int]]:
        _require(record)
        if "prompt" in record:
            _require(record, "response")
            prompt, response = record["prompt"], record["response"]
            return self._known(
                (prompt, response),
                lambda: _encode(self.tokenizer, prompt, [response], self.max_length),
            )
        _require(record, "text")
        text = record["text"]
        return self._known(text, lambda: [[], encode_text(self.tokenizer, text)[: self.max_length]])


@dataclass(frozen=True)
class PairCollator:
    """Turn preference pairs into a batch for a reward model.

    Both responses of a pair follow the same prompt ids: it loses as many of its oldest exchanges
    as the longer response asks for; if that is not enough, responses lose their ends. Of two that
    become the same nothing can be learned, which is said, once.

    Args:
        tokenizer: with an eos token, and a chat template where prompts are messages.
        max_length: of prompt and response, in tokens; None for no limit.
        cache_bytes: as for `SFTCollator`.

    Raises:
        ValueError: where a record has not these columns, an answer is no text, or a prompt leaves
            no room for one.

    Source: ours.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = field(default=None, kw_only=True)
    cache_bytes: int | None = field(default=DEFAULT_BYTES, kw_only=True)
    _known: Encodings = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("PairCollator", "max_length", self.max_length, 2)
        object.__setattr__(self, "_known", Encodings(self.cache_bytes))

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Encode P pairs.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[2P, L]``, all chosen, then all rejected in the
            same order; ``chosen_labels`` ``[P, L]``: the chosen response's ids, -100 elsewhere.
        """
        self._known.follow(self.tokenizer)
        rows = [self._encode(record) for record in records]
        sequences = [prompt + answers[side] for side in (0, 1) for prompt, *answers in rows]
        ids, mask = pad(sequences, pad_id(self.tokenizer))
        count = len(rows)
        labels = _labels(ids[:count], mask[:count], [len(prompt) for prompt, *_ in rows])
        return {"input_ids": ids, "attention_mask": mask, "chosen_labels": labels}

    def _encode(self, record: Mapping[str, Any]) -> list[list[int]]:
        _require(record, "prompt", "chosen", "rejected")
        prompt, answers = record["prompt"], [record["chosen"], record["rejected"]]
        found = self._known(
            (prompt, answers),
            lambda: _encode(self.tokenizer, prompt, answers, self.max_length),
        )
        if found[1] == found[2] and not self._known.told:
            self._known.told = True
            warnings.warn(
                f"both responses to {str(prompt)[-80:]!r} have the same {len(found[1])} tokens "
                f"within max_length={self.max_length}, so the pair teaches nothing, and counts as "
                "half right. Raise max_length, or leave such pairs out; of others nothing is said",
                UserWarning,
                stacklevel=2,
            )
        return found


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    responses: list[str],
    max_length: int | None,
) -> list[list[int]]:
    """Return the ids of a prompt, and of its responses, cut so that each sequence fits."""
    answers = [encode_response(tokenizer, prompt, response) for response in responses]
    longest = max(map(len, answers))
    if max_length is None:
        return [encode_prompt(tokenizer, prompt), *answers]
    ids: list[int] = []
    for ids in prompt_encodings(tokenizer, prompt):
        if len(ids) + longest <= max_length:
            return [ids, *answers]
    room = max_length - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt: {len(ids)} tokens with nothing left to drop leave no room for a response "
            f"within max_length={max_length}; raise max_length, or leave such prompts out"
        )
    return [ids, *(answer[:room] for answer in answers)]


def _labels(
    ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], prompt_lengths: list[int]
) -> Int[Tensor, "B L"]:
    learned = torch.arange(ids.shape[1]) >= torch.tensor(prompt_lengths)[:, None]
    return torch.where(learned & mask.bool(), ids, IGNORE)


def _require(record: Mapping[str, Any], *keys: str) -> None:
    if not isinstance(record, Mapping):
        raise TypeError(
            f"records: one is of type {type(record).__name__} ({record!r:.80}), expected a dict; "
            "read them with load_sft (SFTCollator) or load_pairs (PairCollator)"
        )
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(
            f"records: {' and '.join(missing)} missing among {sorted(record)}; "
            "read them with load_sft (SFTCollator) or load_pairs (PairCollator)"
        )
    for key in keys:
        if key != "prompt" and not isinstance(record[key], str):
            raise ValueError(
                f"records: {key} is a {type(record[key]).__name__} ({record[key]!r:.80}), expected "
                "a string, that text alone without its prompt; read them with load_sft "
                "(SFTCollator) or load_pairs (PairCollator), which make strings of messages"
            )
