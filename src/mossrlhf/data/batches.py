"""Batches by token count: sequences of like length together, as many as a budget holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from mossrlhf.options import check_range, strict

GRAIN = 16
"""Lengths are alike, and shuffled among each other, that are as many times this many tokens."""


@strict
@dataclass(frozen=True, kw_only=True)
class TokenBatches:
    """How many pairs make a batch: as many as a budget of tokens holds, padding included.

    Args:
        max_tokens: of a batch, padding included: twice its pairs times its longest sequence.
        min_pairs: of a batch, whatever their length; only what is left over may be fewer.
        max_pairs: of a batch, however short.

    Raises:
        ValueError: where a number is out of range.

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
        """Cut pairs in order of length into batches, and return how many each has.

        Args:
            lengths: tokens of each pair's longer sequence, in ascending order.
        """
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
    """Batches of `TokenBatches`, in an order of its own in each epoch, every pair once.

    All epochs have the same number of batches, and all processes as many, so that a schedule is
    known from the beginning; where batches would not come out even, the largest are halved.

    Args:
        lengths: tokens of each pair's longer sequence.
        batches: the budget.
        seed: of the order.
        processes: how many there are.
        process: which of them this is.

    Raises:
        ValueError: where there are fewer pairs than processes, or single ones come out uneven.

    Source: P1 §4.2; the order is ours.
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
                f"lengths: got {len(lengths)} pairs for {processes} processes, expected one for "
                "each at least"
            )
        self.grains = torch.tensor([-(-length // GRAIN) for length in lengths])
        self.seed, self.processes, self.process, self.epoch = seed, processes, process, 0
        sizes = batches.sizes((self.grains.sort().values * GRAIN).tolist())
        while len(sizes) % processes:
            largest = max(range(len(sizes)), key=sizes.__getitem__)
            if sizes[largest] == 1:
                raise ValueError(
                    f"lengths: {len(sizes)} pairs make a batch each, which {processes} processes "
                    "cannot share evenly; raise max_tokens or max_pairs, or leave a few pairs out"
                )
            half = sizes[largest] // 2
            sizes[largest : largest + 1] = [half, sizes[largest] - half]
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch.

        Args:
            epoch: counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes) // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.grains), generator=generator)
        order = order[self.grains[order].argsort(stable=True)]  # shuffled within a grain
        parts = order.split(self.sizes)
        turns = torch.randperm(len(parts), generator=generator)
        for number in turns[self.process :: self.processes].tolist():
            yield parts[number].tolist()
