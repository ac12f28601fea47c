"""Endless, shuffled, resumable streams of prompts and pre-training batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mossrlhf.data.records import require_record
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
        self.dealt: list[int] = []  # the rows that `next` returned last
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
        self.dealt = [self._row(start + i) for i in range(count)]
        return [dict(self.dataset[row]) for row in self.dealt]

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
        ValueError: where a record is of no use (`require_record`), or a prompt has no tokens or a
            last turn that alone is too long.

    Source: C: too-long dialogues lose their oldest turns.
    """
    for record in records:
        require_record(record, "records: a record")
    repeated = [record for record in records for _ in range(copies)]
    names = dict.fromkeys(name for record in records for name in record)
    encoded = [encode_prompt(tokenizer, record["prompt"], max_length) for record in records]
    for ids, record in zip(encoded, records, strict=True):
        if not ids:
            raise ValueError(
                f"records: the prompt {record['prompt']!r} has no tokens, expected at least one to "
                "draw a response after; leave such records out, or open prompts with a "
                "begin-of-sequence token"
            )
    return PromptBatch(
        ids=[ids for ids in encoded for _ in range(copies)],
        columns={name: [record.get(name) for record in repeated] for name in names},
    )
