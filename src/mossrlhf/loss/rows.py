"""What a policy's loss knows of tokens besides their statistics: flat, so that it can be cut."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mossrlhf.types import Rollout


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """N tokens of a batch, in the order of ``batch.mask``; zeros where a token's weight is zero.

    Args:
        weights: ``[N]`` in the loss.
        old_logprob: ``[N]`` under the policy the ratio is taken to, nats.
        advantage: ``[N]``.
        ref_logprob: ``[N]`` under the reference, nats; None where the loss does not ask.
        drift: ``[N]`` log π_old − log π_sampler, nats; None likewise.
        entropy_side: ``[N]`` sign of what the entropy is to do; None likewise.

    Source: ours.
    """

    weights: Float[Tensor, " N"]
    old_logprob: Float[Tensor, " N"]
    advantage: Float[Tensor, " N"]
    ref_logprob: Float[Tensor, " N"] | None = None
    drift: Float[Tensor, " N"] | None = None
    entropy_side: Float[Tensor, " N"] | None = None

    def __getitem__(self, rows: slice) -> "TokenRows":
        return self._map(lambda x: x[rows])

    def to(self, like: Tensor) -> "TokenRows":
        """Return the same in the type and on the device of another tensor.

        Args:
            like: that tensor.
        """
        return self._map(lambda x: x.to(like))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "TokenRows":
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        changed: dict[str, Any] = {
            name: None if value is None else change(value) for name, value in values.items()
        }
        return TokenRows(**changed)


def weighted(x: Float[Tensor, "..."], weights: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """Σ w·x that a NaN of weight zero does not spoil.

    Args:
        x: any shape.
        weights: of the same shape.

    Source: ours.
    """
    return torch.where(weights > 0, x * weights, torch.zeros_like(x)).sum()


def counted(x: Tensor, mask: Tensor, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The entries of a mask, with zeros at weight zero: a NaN there would spoil the gradient.

    Args:
        x: ``[B, T]``.
        mask: ``[B, T]`` with N entries.
        weights: ``[N]``.

    Source: ours.
    """
    return torch.where(weights > 0, x[mask], torch.zeros_like(x[mask]))


def filled(batch: Rollout, name: str) -> Float[Tensor, "B T"]:
    """Return a field of a batch.

    Args:
        batch: any.
        name: of the field.

    Raises:
        ValueError: where it is empty; it says who fills it.

    Source: ours.
    """
    value: Tensor | None = getattr(batch, name)
    if value is None:
        raise ValueError(
            f"batch.{name}: got None, expected [B, T]; fill it in before the loss "
            "(Trainer.annotate and Trainer.estimate do, given the models it needs)"
        )
    return value


def require_per_token(name: str, returned: object, weights: Tensor) -> None:
    """Refuse a loss that is not one number per token.

    Args:
        name: of the method.
        returned: by it.
        weights: ``[N]``.

    Raises:
        ValueError: with the shape that came and the one expected.

    Source: ours.
    """
    shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
    if shape != tuple(weights.shape):
        raise ValueError(
            f"{name}: returned {shape}, expected one number per token, {tuple(weights.shape)}"
        )
