"""`RolloutBuffer`: minibatches of a rollout, and micro-batches of a minibatch."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mossrlhf.models.backbone import group_by_length
from mossrlhf.types import Rollout


class RolloutBuffer:
    """Holds the rollouts of one iteration and splits them into minibatches.

    A minibatch is a number of *sequences*; `micro_batches` splits it further, which changes speed
    and memory alone.

    Source: P1 §5.1 (sample 128, train in batches of 32).
    """

    def __init__(self) -> None:
        self._rollouts: list[Rollout] = []

    def __len__(self) -> int:
        """Return the number of sequences held."""
        return sum(len(rollout) for rollout in self._rollouts)

    def add(self, rollout: Rollout) -> None:
        """Add the sequences of a rollout.

        Args:
            rollout: B sequences, with the same fields as those already held.
        """
        self._rollouts.append(rollout)

    def clear(self) -> None:
        """Remove everything held."""
        self._rollouts.clear()

    def all(self) -> Rollout:
        """Return everything held as one rollout.

        Raises:
            ValueError: where the buffer is empty, or rollouts have different fields.
        """
        return Rollout.concat(self._rollouts)

    def minibatches(
        self, size: int, epochs: int = 1, generator: torch.Generator | None = None
    ) -> Iterator[Rollout]:
        """Yield the sequences in minibatches, shuffled again in every epoch.

        Args:
            size: sequences in a minibatch; the last of an epoch may hold fewer.
            epochs: passes over all sequences.
            generator: source of the order, on the CPU; None keeps the order of addition.

        Yields:
            rollouts of at most `size` sequences.

        Raises:
            ValueError: where `size` is below 1 or the buffer is empty.

        Source: P1 Algorithm 1.
        """
        if size < 1:
            raise ValueError(f"size: got {size}, expected at least 1 sequence in a minibatch")
        everything = self.all()
        for _ in range(epochs):
            order = torch.arange(len(everything))
            if generator is not None:
                order = torch.randperm(len(everything), generator=generator)
            for index in order.split(size):
                yield everything.select(index)

    def state_dict(self) -> dict[str, Any]:
        """Return the rollouts held, to be stored."""
        return {"rollouts": list(self._rollouts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state` that `state_dict` returned."""
        self._rollouts = list(state["rollouts"])


def split(
    rollout: Rollout, size: int | None = None, max_tokens: int | None = None
) -> list[Int[Tensor, " K"]]:
    """Split the sequences of a rollout into groups that fit into memory."""
    for name, bound in (("size", size), ("max_tokens", max_tokens)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name}: got {bound}, expected at least 1, or None for no bound")
    if max_tokens is None:
        return list(torch.arange(len(rollout)).split(size or len(rollout)))
    return group_by_length(rollout.prompt_lengths + rollout.response_lengths, size, max_tokens)


def micro_batches(
    minibatch: Rollout, size: int | None = None, max_tokens: int | None = None
) -> list[Rollout]:
    """Split a minibatch into micro-batches, by the rules of `split`.

    Args:
        minibatch: the sequences of one optimizer step.
        size: most sequences in one micro-batch; None for no bound.
        max_tokens: most padded tokens in one; None for no bound.
    """
    groups = split(minibatch, size, max_tokens)
    return [minibatch] if len(groups) == 1 else [minibatch.select(rows) for rows in groups]


def note(
    noted: dict[str, Tensor],
    name: str,
    rows: Int[Tensor, " K"],
    shape: torch.Size,
    mask: Bool[Tensor, "K t"],
    values: Float[Tensor, " N"] | None,
) -> None:
    """Write flat values ``[N]`` to the places of a mask ``[K, t]`` in rows ``[K]`` of a tensor.

    The tensor is ``noted[name]``, of the given shape (B, T), created where absent; t ≤ T.
    """
    assert values is not None
    block = values.new_zeros(mask.shape)
    block[mask] = values
    noted.setdefault(name, values.new_zeros(shape))[rows, : mask.shape[1]] = block
