"""Prompts that are too long whatever is dropped: found before training starts, not in its midst."""

import warnings
from collections.abc import Iterator, Mapping
from heapq import nlargest
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from mossrlhf.data.formats import Prompt
from mossrlhf.data.templates import prompt_encodings, suffixes

LONGEST = 1000
"""How many prompts are tokenized at the start of training, at most."""


@runtime_checkable
class Records(Protocol):
    """A list of dicts, a `datasets.Dataset`, a map-style dataset of torch. Source: ours."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def overlong_prompts(
    dataset: Records,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    at_most: int | None = None,
) -> dict[int, int]:
    """Find the prompts that `encode_prompt` refuses: too long even without their oldest turns.

    Every record is read, but only prompts with more bytes than `max_length` are tokenized, the
    longest first: no token is shorter than a byte (but for a tokenizer that spells characters
    out, as NFKC does with a few, and then by `encode_prompt` itself at the latest).

    Args:
        dataset: records with a ``prompt``: a string, or messages; ``text`` records are passed over.
        tokenizer: as for `encode_prompt`.
        max_length: tokens a prompt may have; None for no bound.
        at_most: how many prompts to tokenize, at most; None for as many as it takes.

    Returns:
        by index in the dataset, the tokens of what cannot be dropped; the longest first.

    Raises:
        ValueError: where a record has no prompt, or messages come without a chat template.

    Source: ours.
    """
    if max_length is None:
        return {}
    candidates = _candidates(dataset, tokenizer, max_length)
    # At most as many are held: those of a file larger than memory may be too many themselves.
    count = len(dataset) if at_most is None else at_most
    found: dict[int, int] = {}
    for _, index in nlargest(count, candidates, key=lambda pair: pair[0]):
        least = min(map(len, prompt_encodings(tokenizer, dataset[index]["prompt"])))
        if least > max_length:
            found[index] = least
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def require_fitting_prompts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    name: str = "train_dataset",
) -> None:
    """Refuse a dataset with a prompt that would stop the training when its turn comes.

    The longest `LONGEST` prompts are looked at, by their bytes: quick, however many there are.

    Args:
        dataset: as for `overlong_prompts`, or a dict of several by name. None passes, and so does
            what has no length: of a stream nothing can be said beforehand.
        tokenizer: as for `encode_prompt`.
        max_length: tokens a prompt may have; None for no bound.
        name: what the error calls the dataset.

    Raises:
        ValueError: where a prompt is too long whatever is dropped of it, or a record has none.

    Source: ours.
    """
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if not isinstance(part, Records):
            continue
        try:
            found = overlong_prompts(part, tokenizer, max_length, at_most=LONGEST)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if found:
            index, tokens = next(iter(found.items()))
            raise ValueError(
                f"{name}: {len(found)} of its longest prompts do not fit; that of record {index} "
                f"takes {tokens} tokens with nothing left to drop, expected at most {max_length}. "
                "Raise the limit, or leave them out: data.without_overlong(records, tokenizer, "
                f"max_length={max_length})"
            )


def without_overlong(
    dataset: Records, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[Mapping[str, Any]]:
    """Return the records whose prompts fit, with one warning that counts the others.

    Args:
        dataset: as for `overlong_prompts`; so are the others.
        tokenizer: as for `encode_prompt`.
        max_length: tokens a prompt may have; None for no bound.

    Raises:
        ValueError: where no prompt fits, or a record has none.

    Source: ours.
    """
    found = overlong_prompts(dataset, tokenizer, max_length)
    if found and len(found) == len(dataset):
        raise ValueError(
            f"dataset: none of its {len(dataset)} prompts fits into max_length={max_length} "
            f"tokens, the shortest has {min(found.values())}; raise max_length"
        )
    if found:
        warnings.warn(
            f"left out {len(found)} of {len(dataset)} records: their prompts take more than "
            f"{max_length} tokens with nothing left to drop",
            UserWarning,
            stacklevel=2,
        )
    return [dataset[index] for index in range(len(dataset)) if index not in found]


def _candidates(
    dataset: Records, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[int, int]]:
    """Yield bytes and index of the prompts that may have more tokens than they should."""
    frame: int | None = None
    for index in range(len(dataset)):
        record = dataset[index]
        if "prompt" not in record and "text" in record:
            continue
        least = _least(index, record)
        texts = [least] if isinstance(least, str) else [str(turn["content"]) for turn in least]
        size = sum(len(text.encode(errors="replace")) for text in texts)
        around = 2  # a beginning of sequence, and the space that SentencePiece puts first
        if not isinstance(least, str):
            if frame is None:  # what the template says of a turn, and before all of them
                turn = [{"role": "user", "content": ""}]
                frame = min(map(len, prompt_encodings(tokenizer, turn)))
            around = frame * len(least)
        if size + around > max_length:
            yield size, index


def _least(index: int, record: Mapping[str, Any]) -> Prompt:
    """Return what cannot be dropped of a prompt."""
    if "prompt" not in record:
        raise ValueError(f"record {index} has the columns {sorted(record)}, expected a prompt")
    prompt = record["prompt"]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(
            f"the prompt of record {index} is {prompt!r:.80}, expected a string, or a list of "
            "messages that ends with the user's"
        )
    *_, least = suffixes(list(prompt))
    return least
