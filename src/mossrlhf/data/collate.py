"""Collators from canonical records to padded tensors, with masks from lengths."""

import hashlib
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from mossrlhf.data.formats import Prompt
from mossrlhf.data.prompts import encode_prompt, encode_response, encode_text, prompt_encodings
from mossrlhf.options import check_range, strict

IGNORE = -100  # label of tokens outside the loss, as in torch's cross entropy and transformers
CACHE_BYTES = 2**28  # 256 MiB: some 50 million tokens
LENGTH_STEP = 16  # lengths that round up to the same multiple of it are shuffled together
_OVERHEAD = 500  # bytes of a cached record, without its token ids
_REMEDY = "read them with load_sft (SFTCollator) or load_pairs (PairCollator)"


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
        ValueError: if there are no sequences.
    """
    if not sequences:
        raise ValueError("sequences: got none, expected at least one to pad")
    side = "left" if left else "right"
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad id of a `tokenizer`, or its eos id, or 0: padding is masked, any id works."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


class EncodingCache:
    """Cache of the token ids of records, of up to about `size` bytes; None disables it.

    Entries are never evicted: in a shuffled epoch all records are equally likely to come next.
    Copies begin empty; each worker process has its own.
    """

    def __init__(self, size: int | None = CACHE_BYTES) -> None:
        self.size = size
        self.used = 0
        self.has_warned = False  # of its collator, which is frozen
        self._rows: dict[bytes, tuple[array[int], ...]] = {}
        self._state: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type["EncodingCache"], tuple[int | None]]:
        return EncodingCache, (self.size,)

    def __len__(self) -> int:
        return len(self._rows)

    def follow(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Clear the cache if the tokenizer's template or tokens have changed."""
        special = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = tuple(tokenizer.added_tokens_encoder)
        state = (tokenizer, tokenizer.chat_template, special, added)
        if state != self._state:
            self._rows, self.used, self._state = {}, 0, state

    def __call__(self, content: Any, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return the lists of token ids of a record's content; call `encode` if not cached."""
        if not self.size:
            return encode()
        key = hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
        cached = self._rows.get(key)
        if cached is not None:
            return [ids.tolist() for ids in cached]
        rows = encode()
        weight = _OVERHEAD + 4 * sum(map(len, rows))
        if self.used + weight <= self.size:
            self._rows[key] = tuple(array("i", ids) for ids in rows)
            self.used += weight
        return rows


@dataclass(frozen=True)
class _Collator:
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = field(default=None, kw_only=True)
    cache_bytes: int | None = field(default=CACHE_BYTES, kw_only=True)
    _cache: EncodingCache = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "max_length", self.max_length, 2)
        object.__setattr__(self, "_cache", EncodingCache(self.cache_bytes))

    def _encode(self, prompt: Prompt, *responses: str) -> list[list[int]]:
        """Return the ids of a prompt and of its responses, cut so that each sequence fits."""
        return self._cache((prompt, responses), lambda: self._fit(prompt, responses))

    def _fit(self, prompt: Prompt, responses: Sequence[str]) -> list[list[int]]:
        encoded = [encode_response(self.tokenizer, prompt, response) for response in responses]
        longest = max(map(len, encoded))
        if self.max_length is None:
            return [encode_prompt(self.tokenizer, prompt), *encoded]
        ids: list[int] = []
        for ids in prompt_encodings(self.tokenizer, prompt):
            if len(ids) + longest <= self.max_length:
                return [ids, *encoded]
        room = self.max_length - len(ids)
        if room < 1:
            raise ValueError(
                f"prompt: {len(ids)} tokens with nothing left to drop leave no room for a response "
                f"within max_length={self.max_length}; raise max_length, or leave such prompts out"
            )
        return [ids, *(response[:room] for response in encoded)]


@dataclass(frozen=True)
class SFTCollator(_Collator):
    """Turn SFT or PTX records into a batch for a causal language model.

    The loss covers the response of ``{"prompt", "response"}``, and every token of ``{"text"}``.
    Records that are too long lose the prompt's oldest exchanges first, then the end of the
    response or text.

    Args:
        tokenizer: with an eos token, and a chat template if prompts are messages.
        max_length: of prompt and response, in tokens; None for no limit.
        cache_bytes: size of the cache of token ids, so that records are not rendered and
            tokenized again; None caches nothing.

    Raises:
        ValueError: if a record lacks these columns, they are not text, or a prompt leaves no
            room for a response.
        TypeError: if a record is not a dict.
    """

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Int[Tensor, "B L"]]:
        """Return ``[B, L]`` ``input_ids``, ``attention_mask`` and ``labels`` (-100: no loss)."""
        self._cache.follow(self.tokenizer)
        rows = [self._ids(record) for record in records]
        ids, mask = pad([prompt + learned for prompt, learned in rows], pad_id(self.tokenizer))
        labels = _labels(ids, mask, [len(prompt) for prompt, _ in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _ids(self, record: Mapping[str, Any]) -> list[list[int]]:
        _require(record)
        if "prompt" in record:
            _require(record, "response")
            return self._encode(record["prompt"], record["response"])
        _require(record, "text")
        text = record["text"]
        return self._cache(text, lambda: [[], encode_text(self.tokenizer, text)[: self.max_length]])


@dataclass(frozen=True)
class PairCollator(_Collator):
    """Turn preference pairs into a batch for a reward model.

    Both responses follow the same prompt ids, which lose their oldest exchanges until the longer
    response fits; if that is not enough, the responses are truncated. The first pair whose
    responses become identical causes a warning.

    Args: those of `SFTCollator`: tokenizer, max_length, cache_bytes.

    Raises:
        ValueError: if a record lacks ``prompt``, ``chosen`` or ``rejected``, a response is not
            text, or a prompt leaves no room for one.
        TypeError: if a record is not a dict.
    """

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Encode P pairs.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[2P, L]``, all chosen, then all rejected in the
            same order; ``chosen_labels`` ``[P, L]``: the chosen response's ids, -100 elsewhere.
        """
        self._cache.follow(self.tokenizer)
        rows = [self._ids(record) for record in records]
        sequences = [prompt + sides[side] for side in (0, 1) for prompt, *sides in rows]
        ids, mask = pad(sequences, pad_id(self.tokenizer))
        count = len(rows)
        labels = _labels(ids[:count], mask[:count], [len(prompt) for prompt, *_ in rows])
        return {"input_ids": ids, "attention_mask": mask, "chosen_labels": labels}

    def _ids(self, record: Mapping[str, Any]) -> list[list[int]]:
        _require(record, "prompt", "chosen", "rejected")
        rows = self._encode(record["prompt"], record["chosen"], record["rejected"])
        if rows[1] == rows[2] and not self._cache.has_warned:
            self._cache.has_warned = True
            warnings.warn(
                f"both responses to {str(record['prompt'])[-80:]!r} have the same {len(rows[1])} "
                f"tokens within max_length={self.max_length}: the model learns nothing from them, "
                "and the pair's accuracy counts as 0.5. Raise max_length, or leave such pairs out. "
                "Further pairs are not reported",
                UserWarning,
                stacklevel=2,
            )
        return rows


def _labels(
    ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], prompt_lengths: list[int]
) -> Int[Tensor, "B L"]:
    learned = torch.arange(ids.shape[1]) >= torch.tensor(prompt_lengths)[:, None]
    return torch.where(learned & mask.bool(), ids, IGNORE)


def _require(record: Mapping[str, Any], *keys: str) -> None:
    if not isinstance(record, Mapping):
        raise TypeError(
            f"records: one is of type {type(record).__name__} ({record!r:.80}), expected a dict; "
            f"{_REMEDY}"
        )
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(
            f"records: {' and '.join(missing)} missing among {sorted(record)}; {_REMEDY}"
        )
    for key in keys:
        if key != "prompt" and not isinstance(record[key], str):
            raise ValueError(
                f"records: {key} is a {type(record[key]).__name__} ({record[key]!r:.80}), expected "
                f"a string, the text alone without the prompt; {_REMEDY}, which convert messages"
            )


@strict
@dataclass(frozen=True, kw_only=True)
class TokenBatches:
    """A batch size in tokens: as many pairs as a budget holds, padding included.

    Args:
        max_tokens: per batch, padding included: twice its pairs times its longest sequence.
        min_pairs: per batch, even if they exceed `max_tokens`; only the last may have fewer.
        max_pairs: per batch, even if they are short.

    Raises:
        ValueError: if a number is out of range.

    Source: P1 §4.2: batches by token count, of 4 pairs at least and 128 at most.
    """

    max_tokens: int = 8192
    min_pairs: int = 4
    max_pairs: int = 128

    def __post_init__(self) -> None:
        check_range("TokenBatches", "max_tokens", self.max_tokens, 1)
        check_range("TokenBatches", "min_pairs", self.min_pairs, 1)
        check_range("TokenBatches", "max_pairs", self.max_pairs, self.min_pairs)

    def sizes(self, lengths: Sequence[int]) -> list[int]:
        """Return each batch's number of pairs, given their `lengths` in ascending order."""
        sizes: list[int] = []
        size = 0
        for length in lengths:
            fits = 2 * (size + 1) * length <= self.max_tokens or size < self.min_pairs
            if size and not (fits and size < self.max_pairs):
                sizes.append(size)
                size = 0
            size += 1
        return [*sizes, size] if size else sizes


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of `TokenBatches` in a new order every epoch, each pair once.

    All epochs and all processes have the same number of batches, so that a schedule is known from
    the beginning; if batches do not divide evenly, the largest are halved.

    Args:
        lengths: tokens of each pair's longer sequence.
        batches: the size of a batch.
        seed: seed of the order.
        processes: number of processes that share the batches.
        process: index of this process.

    Raises:
        ValueError: if there are fewer pairs than processes, or batches of one pair do not
            divide evenly.

    Source: P1 §4.2 (batches by token count).
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batches: TokenBatches,
        *,
        seed: int = 0,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        if len(lengths) < processes:
            raise ValueError(
                f"lengths: got {len(lengths)} pairs for {processes} processes, expected at "
                "least one for each"
            )
        self.steps = torch.tensor([-(-length // LENGTH_STEP) for length in lengths])
        self.seed, self.processes, self.process, self.epoch = seed, processes, process, 0
        sizes = batches.sizes((self.steps.sort().values * LENGTH_STEP).tolist())
        while len(sizes) % processes:
            largest = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[largest] == 1:
                raise ValueError(
                    f"lengths: {len(sizes)} pairs form batches of one, which {processes} processes "
                    "cannot share evenly; raise max_tokens or max_pairs, or leave a few pairs out"
                )
            half = sizes[largest] // 2
            sizes[largest : largest + 1] = [half, sizes[largest] - half]
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """Switch to the order of an `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes) // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.steps), generator=generator)
        order = order[self.steps[order].argsort(stable=True)]  # shuffled among equal lengths
        parts = order.split(self.sizes)
        turns = torch.randperm(len(parts), generator=generator)
        for number in turns[self.process :: self.processes].tolist():
            yield parts[number].tolist()
