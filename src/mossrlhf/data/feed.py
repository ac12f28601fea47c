"""Endless, shuffled, resumable streams of prompts and pre-training batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mossrlhf.data.templates import encode_prompt


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the sampler wants them, with the dataset's columns for the reward.

    Args:
        ids: token ids of each prompt.
        columns: the dataset's columns, ``prompt`` among them, a list of values each.

    Source: ours.
    """

    ids: list[list[int]]
    columns: dict[str, list[Any]]


class Shuffled:
    """Deals out the rows of a dataset without end, in a new order every epoch.

    Every process draws the same order and takes its share of it, so that a number of rows means
    the same on one process and on eight.

    Args:
        dataset: a `datasets.Dataset` or any sequence of dicts.
        seed: of the order.
        process_index: which of the processes this is.
        num_processes: how many there are.

    Raises:
        ValueError: where the dataset is empty.

    Source: ours.
    """

    def __init__(
        self,
        dataset: Sequence[Mapping[str, Any]],
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset: it is empty, expected at least one record")
        self.dataset = dataset
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.position = 0
        self._epoch: int | None = None
        self._order: list[int] = []

    def next(self, count: int) -> list[dict[str, Any]]:
        """Return this process's share of the next rows.

        Args:
            count: rows for this process; all of them together move on by `num_processes` times
                that many.
        """
        start = self.position + self.process_index * count
        self.position += count * self.num_processes
        return [dict(self.dataset[self._row(start + i)]) for i in range(count)]

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.dataset))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self._epoch = epoch
        return int(self._order[offset])

    def state_dict(self) -> dict[str, int]:
        """Return how many rows have been dealt out."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: that mapping.
        """
        self.position = state["position"]


def prompt_batch(
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    copies: int = 1,
) -> PromptBatch:
    """Tokenize the prompts of records; chat templates are applied, the oldest turns dropped.

    Args:
        records: with a ``prompt`` each: a string or a list of messages.
        tokenizer: the policy's.
        max_length: tokens a prompt may have; None for no bound.
        copies: times each record appears, one after the other.

    Raises:
        ValueError: where a record has no prompt, a column called as what rewards are given, or a
            prompt that has no tokens, ends with an answer, or whose last turn alone is too long.

    Source: C: too-long dialogues lose their oldest turns.
    """
    for record in records:
        _require_columns(record, "train_dataset")
        _require_open(record["prompt"], "train_dataset: a prompt")
    repeated = [record for record in records for _ in range(copies)]
    names = [name for name in records[0] if all(name in record for record in records)]
    encoded = [encode_prompt(tokenizer, record["prompt"], max_length) for record in records]
    for ids, record in zip(encoded, records, strict=True):
        if not ids:
            raise ValueError(
                f"train_dataset: the prompt {record['prompt']!r} has no tokens, expected at least "
                "one to draw a response after; leave such records out, or open prompts with a "
                "begin-of-sequence token"
            )
    return PromptBatch(
        ids=[ids for ids in encoded for _ in range(copies)],
        columns={name: [record[name] for record in repeated] for name in names},
    )


GIVEN = ("prompts", "completions", "completion_ids")
"""What reward functions get beside the dataset's columns, and no column may be called."""


def require_records(dataset: Any, name: str, *, prompts: bool = True) -> None:
    """Refuse what is no dataset of records, and prompts that no response can follow.

    Args:
        dataset: a sequence of dicts, a `datasets.Dataset`, a map-style dataset of torch.
        name: what the error calls it.
        prompts: whether its records are prompts, whose columns reach the rewards.

    Raises:
        TypeError: where it is something else; the error says what to make of it.
        ValueError: where it is empty, a record has no prompt or a column called as one of
            `GIVEN`, or a prompt has no user turn or ends with an answer.

    Source: ours.
    """
    if remedy := _remedy(dataset):
        raise TypeError(
            f"{name}: got a {type(dataset).__name__}, expected a sequence of records (dicts); "
            f"{remedy}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: it is empty, expected at least one record")
    first = dataset[0]
    if not isinstance(first, Mapping):
        remedy = "write [{'prompt': text} for text in texts]"
        raise TypeError(
            f"{name}: record 0 is a {type(first).__name__}, expected a dict"
            + (f"; {remedy}" if prompts and isinstance(first, str) else "")
        )
    if not prompts:
        return
    _require_columns(first, name)
    if isinstance(first["prompt"], str):
        return  # a mixture is found out as its turn comes
    for index in range(len(dataset)):
        _require_open(dataset[index].get("prompt"), f"{name}: the prompt of record {index}")


def _remedy(dataset: Any) -> str:
    """Say what to make of something that is no dataset of records; "" where it is one."""
    if isinstance(dataset, str | Path):
        return f"read the file: mossrlhf.data.load_prompts({str(dataset)!r})"
    if isinstance(dataset, Mapping):
        return (
            f"pick one of its parts, of {list(dataset)[:5]}: dataset[{next(iter(dataset), '')!r}]"
        )
    if hasattr(dataset, "iloc"):
        return "write frame.to_dict('records')"
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return "it has no length and no index, so read it first: list(dataset)"
    return ""


def _require_columns(record: Mapping[str, Any], name: str) -> None:
    if "prompt" not in record:
        raise ValueError(
            f"{name}: a record has the columns {sorted(record)}, expected one called 'prompt' (a "
            "string, or a list of messages that ends with the user's)"
        )
    if taken := [column for column in GIVEN if column in record]:
        raise ValueError(
            f"{name}: a column is called {taken[0]!r}, which is what reward functions get from "
            f"the trainer, as they do {', '.join(GIVEN)}; rename the column"
        )


def _require_open(prompt: Any, where: str) -> None:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return  # said elsewhere, where it is of no use
    turn = prompt[-1]
    if not isinstance(turn, Mapping):
        return
    if all(one.get("role") == "system" for one in prompt if isinstance(one, Mapping)):
        raise ValueError(
            f"{where} has no user turn, so there is nothing to answer: {str(prompt)!r:.80}; "
            "leave such records out"
        )
    if turn.get("role") == "assistant":
        raise ValueError(
            f"{where} ends with the assistant's {str(turn.get('content'))!r:.60}, expected a user "
            "turn last, so that there is something to answer; cut the answer off: prompt[:-1]"
        )
