"""What a user's own components return, held to what it should be before anything is made of it.

A wrong shape would otherwise be broadcast in silence, or raise where nobody knows whose it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mossrlhf.functional.reduce import Reduce
from mossrlhf.signature import call_with
from mossrlhf.types import Advantages, Rollout


def responses(sampler: Any, model: nn.Module, prompts: Sequence[Sequence[int]]) -> Rollout:
    """Draw a response to each prompt.

    Args:
        sampler: ours or the user's.
        model: whose responses.
        prompts: token ids of each.

    Raises:
        TypeError: where it returns no `Rollout`.
        ValueError: where there is not one response to each prompt.

    Source: ours.
    """
    rollout: Any = sampler(model, prompts)
    name = type(sampler).__name__
    if not isinstance(rollout, Rollout):
        raise TypeError(
            f"sampler: {name} returned {type(rollout).__name__}, expected a Rollout: input_ids, "
            "prompt_lengths, response_lengths, truncated, mask"
        )
    if len(rollout) != len(prompts):
        raise ValueError(
            f"sampler: {name} returned {len(rollout)} responses to {len(prompts)} prompts, "
            "expected one to each, in their order"
        )
    return rollout


def shaped(shaper: Callable[..., Any], rollout: Rollout, reduce: Reduce) -> Tensor:
    """Shape the scores of a rollout into rewards.

    Args:
        shaper: ours or the user's.
        rollout: scored and annotated.
        reduce: sums a tensor over all processes; passed where it is asked for.

    Returns:
        ``[B, T]`` rewards.

    Raises:
        TypeError: where it returns no tensor.
        ValueError: where these are not rewards per token.

    Source: ours.
    """
    rewards = call_with(shaper, rollout, reduce=reduce)
    expected = tuple(rollout.mask.shape)
    if not isinstance(rewards, Tensor):
        raise TypeError(
            f"shaper: returned {type(rewards).__name__}, expected rewards per token, a tensor of "
            f"{expected}"
        )
    if tuple(rewards.shape) != expected:
        raise ValueError(
            f"shaper: returned {tuple(rewards.shape)}, expected rewards per token, {expected}; a "
            "number per response goes to its last token: mossrlhf.shaping.add_at_last"
        )
    return rewards


def estimated(
    estimator: Callable[..., Any], rewards: Tensor, rollout: Rollout, reduce: Reduce
) -> Advantages:
    """Estimate the advantages of a rollout; without a critic the values are 0.

    Args:
        estimator: ours or the user's.
        rewards: ``[B, T]``.
        rollout: annotated.
        reduce: sums a tensor over all processes; passed where it is asked for.

    Raises:
        TypeError: where it returns no `Advantages`.
        ValueError: where these are not per token.

    Source: ours.
    """
    values = rollout.values if rollout.values is not None else torch.zeros_like(rewards)
    found = call_with(
        estimator,
        rewards,
        values,
        rollout.states,
        bootstrap=rollout.bootstrap,
        counted=rollout.mask,
        reduce=reduce,
    )
    parts = [getattr(found, name, None) for name in ("advantages", "returns")]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(
            f"advantage: returned {type(found).__name__}, expected Advantages(advantages, returns)"
        )
    shapes = [tuple(part.shape) for part in parts if part is not None]
    if any(shape != tuple(rewards.shape) for shape in shapes):
        raise ValueError(
            f"advantage: returned advantages {shapes[0]} and returns {shapes[1]}, expected "
            f"{tuple(rewards.shape)} each, one number per token"
        )
    result: Advantages = found
    return result


def as_scores(scores: Any, rollout: Rollout) -> Tensor:
    """Return scores of the user's own as a tensor.

    Args:
        scores: numbers, one per response.
        rollout: B responses.

    Raises:
        ValueError: where they are no numbers.

    Source: ours.
    """
    try:
        return torch.as_tensor(scores, dtype=torch.float32, device=rollout.mask.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"scores: got {scores!r:.60}, expected {len(rollout)} numbers ({error})"
        ) from error
