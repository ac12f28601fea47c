"""Rewards of all kinds called together: their names, their weights, what they may return."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mossrlhf.models import RewardModel
from mossrlhf.rewards.model import Messages, ModelReward
from mossrlhf.types import Rollout

RESERVED = frozenset([
    "advantages", "critic", "kl", "perplexity", "policy",
    "response", "returns", "sampler", "values",
])  # fmt: skip
"""What no reward may be called: its ``eval/<name>/…`` would stand among other metrics."""


@runtime_checkable
class RewardFunction(Protocol):
    """A reward that is a function; always called by keyword.

    It gets ``prompts`` and ``completions`` (texts), ``completion_ids`` (lists of token ids) and
    every further column of the dataset, B entries each, and returns B numbers; None says "not
    applicable" (NaN is refused). A tensor ``[B, T]`` is read as one reward per token.

    Source: TRL's convention for reward functions.
    """

    def __call__(
        self,
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        **columns: Any,
    ) -> Sequence[float | None] | Tensor:
        """Return the reward of each completion."""


Reward: TypeAlias = ModelReward | RewardModel | PreTrainedModel | Callable[..., Any]


class RewardSet:
    """One or several rewards with weights, called together; the score is the weighted sum.

    Args:
        rewards: a reward, a list of them, or of (reward, weight) pairs; one of weight 0 is
            measured and never trained on.
        tokenizer: the policy's, to decode completions.

    Raises:
        ValueError: where there is none, two share a name, or a name is one of `RESERVED`.
        TypeError: where one is no model and cannot be called.

    Source: ours.
    """

    def __init__(self, rewards: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rewards = [(_as_reward(reward), weight) for reward, weight in reward_pairs(rewards)]
        self.names = [reward_name(reward) for reward, _ in self.rewards]
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"reward: names must differ, since metrics carry them; got {self.names}. Give "
                "each function its own __name__, each ModelReward its own name="
            )
        if taken := [name for name in self.names if name.split("/")[0] in RESERVED]:
            raise ValueError(
                f"reward: {taken[0]!r} cannot be a reward's name, since other metrics are called "
                f"eval/{taken[0].split('/')[0]}/…; give the function another __name__, or the "
                f"ModelReward another name=. Reserved: {', '.join(sorted(RESERVED))}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward, by name."""
        pairs = zip(self.names, self.rewards, strict=True)
        return {name: weight for name, (_, weight) in pairs}

    def models(self) -> list[nn.Module]:
        """Return the models among the rewards, `RewardModel` or `Classifier`."""
        return [r.model for r, _ in self.rewards if isinstance(r, ModelReward)]

    def same_tokenizer(self) -> list[RewardModel]:
        """Return the reward models that read the policy's tokens."""
        models = [r for r, _ in self.rewards if isinstance(r, ModelReward)]
        alike = [r.model for r in models if r.tokenizer is None]
        return [model for model in alike if isinstance(model, RewardModel)]

    def to(self, device: torch.device | str) -> "RewardSet":
        """Move the reward models among the rewards.

        Args:
            device: where to.
        """
        for model in self.models():
            model.to(device)
        return self

    def __call__(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Score a rollout by every reward.

        Args:
            rollout: B responses.

        Returns:
            the weighted sum of the sequence rewards ``[B]`` (NaN where none applies), that of
            the token rewards ``[B, T]`` (each None where no reward gives any), and by name the
            unweighted reward of each response ``[B]``.

        Raises:
            ValueError: where a function raises or returns what is not asked for; it names the
                function and the sample.
        """
        prompts = self._prompts(rollout)
        completion_ids = rollout.completions()
        completions = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        scores: Tensor | None = None
        token_scores: Tensor | None = None
        by_name: dict[str, Tensor] = {}
        for (reward, weight), name in zip(self.rewards, self.names, strict=True):
            if isinstance(reward, ModelReward):
                output: Any = reward.score(rollout, prompts, completions)
            else:
                texts = [p if isinstance(p, str) else self._render(p) for p in prompts]
                columns = {k: v for k, v in rollout.columns.items() if k != "prompt"}
                output = _call(
                    reward,
                    name,
                    dict(prompts=texts, completions=completions, completion_ids=completion_ids),
                    {k: list(v) for k, v in columns.items()},
                )
            given = _as_tensor(output, name, rollout, completions)
            dense = torch.where(rollout.mask, given, 0.0) if given.ndim == 2 else None
            by_name[name] = given if dense is None else dense.sum(1)
            if not weight:
                continue  # Measured alone: it must not even turn a score into NaN.
            if dense is not None:
                token_scores = weight * dense + (0.0 if token_scores is None else token_scores)
            else:
                scores = weight * given if scores is None else _add(scores, weight * given)
        return scores, token_scores, by_name

    def _prompts(self, rollout: Rollout) -> list[str | Messages]:
        if "prompt" in rollout.columns:
            return list(rollout.columns["prompt"])
        return list(self.tokenizer.batch_decode(rollout.prompts(), skip_special_tokens=False))

    def _render(self, messages: Messages) -> str:
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return str(text)


def reward_pairs(rewards: Any) -> list[tuple[Any, float]]:
    """Return rewards as pairs of a reward and its weight, 1 where none is given.

    Args:
        rewards: one reward, or a list of rewards and pairs; nothing is loaded yet.

    Raises:
        TypeError: where one of them can be no reward, or its weight no number.
        ValueError: where there is none, a weight is not finite, or a pair is none.

    Source: ours.
    """
    listed = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not listed:
        raise ValueError("reward: got an empty list, expected at least one reward")
    pairs = []
    for item in listed:
        if isinstance(item, tuple) and len(item) != 2:
            raise ValueError(f"reward: got a tuple of {len(item)}, expected (reward, weight)")
        reward, weight = item if isinstance(item, tuple) else (item, 1.0)
        if not isinstance(reward, str | Path | ModelReward) and not callable(reward):
            raise TypeError(
                f"reward: got {reward!r}, expected a reward model, a sequence classifier, a path "
                "to one, or a function reward(*, prompts, completions, completion_ids, **columns)"
            )
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(
                f"reward: the weight of {reward!r:.40} is {weight!r}, expected a number"
            )
        pairs.append((reward, float(weight)))
    return pairs


def reward_name(reward: Any) -> str:
    """Return what metrics call a reward: its ``__name__``, or its class.

    Args:
        reward: a function or `ModelReward`.

    Source: ours.
    """
    return str(getattr(reward, "__name__", type(reward).__name__))


def _as_reward(reward: Any) -> Reward:
    if isinstance(reward, ModelReward):
        return reward
    return ModelReward(model=reward) if isinstance(reward, nn.Module) else reward


def _call(
    reward: Callable[..., Any], name: str, arguments: dict[str, Any], columns: dict[str, Any]
) -> Any:
    if taken := sorted(arguments.keys() & columns.keys()):
        raise ValueError(
            f"train_dataset: its column {taken[0]!r} is what the reward {name!r} gets from the "
            "trainer; rename the column"
        )
    size, first = len(arguments["completions"]), next(iter(arguments["completions"]), "")
    parameters, known = inspect.signature(reward).parameters, sorted(columns)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # Refusing `def reward(completions, **_)` without its `**_` would help nobody.
        arguments = {k: v for k, v in arguments.items() if k in parameters}
        columns = {k: v for k, v in columns.items() if k in parameters}
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = {n for n, p in parameters.items() if p.kind in by_name and p.default is p.empty}
    if lacking := sorted(needed - arguments.keys() - columns.keys()):
        raise ValueError(
            f"reward {name!r} asks for {lacking[0]!r}, expected prompts, completions, "
            f"completion_ids or a column of the dataset, which are {known}; give it a default, or "
            "the dataset that column"
        )
    try:
        return reward(**arguments, **columns)
    except Exception as error:
        raise ValueError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It was called for "
            f"{size} completions with {sorted(arguments)} and the columns {sorted(columns)}; the "
            f"first completion is {first!r:.60}"
        ) from error


def _as_tensor(output: Any, name: str, rollout: Rollout, completions: Sequence[str]) -> Tensor:
    device, size = rollout.input_ids.device, len(rollout)
    absent = torch.zeros(size, dtype=torch.bool, device=device)
    if isinstance(output, Tensor):
        if output.is_complex():
            raise ValueError(
                f"reward {name!r} returned a tensor of {output.dtype}, expected real numbers"
            )
        scores = output.detach().to(device, torch.float32)
    else:
        values = _listed(output, name, size)
        given = [0.0 if value is None else value for value in values]
        scores = torch.tensor(given, dtype=torch.float32, device=device)
        if len(values) == size:
            absent = torch.tensor([value is None for value in values], device=device)
    shapes = [(size,), tuple(rollout.mask.shape)]
    if tuple(scores.shape) not in shapes:
        raise ValueError(
            f"reward {name!r} returned {tuple(scores.shape)} values for {size} completions, "
            f"expected {shapes[0]}, or {shapes[1]} for one reward per token"
        )
    counted = rollout.mask if scores.ndim == 2 else torch.ones_like(absent)
    wild = (~torch.isfinite(scores) & counted).nonzero()
    if len(wild):
        row = int(wild[0, 0])
        raise ValueError(
            f"reward {name!r} returned {scores[row].tolist()} for sample {row}, "
            f"{completions[row]!r:.60}, expected finite numbers (None where it does not apply)"
        )
    return scores.masked_fill(absent, torch.nan) if scores.ndim == 1 else scores


def _listed(output: Any, name: str, size: int) -> list[Any]:
    """Return what a reward function gave as a list of numbers and None."""
    try:
        if isinstance(output, str | bytes | Mapping | Set):
            raise TypeError("its order says nothing of the completions'")
        if inspect.iscoroutine(output):
            output.close()
            raise TypeError("it was never awaited; write a plain function: asyncio.run(judge(…))")
        return [None if value is None else _number(value) for value in output]
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"reward {name!r} returned {type(output).__name__}, expected a list of {size} "
            f"numbers (None where it does not apply), or a tensor: {error}"
        ) from error


def _number(value: Any) -> float:
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and not value.is_complex()
    else:  # numpy makes numbers of complex ones, and of arrays
        imaginary = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
        fits = getattr(value, "ndim", 0) == 0 and not imaginary
    if not fits or not isinstance(value, SupportsFloat):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _add(total: Tensor, part: Tensor) -> Tensor:
    """Sum of what applies; NaN only where neither does."""
    both = torch.stack([total, part])
    summed = torch.nansum(both, dim=0)
    return torch.where(torch.isnan(both).all(dim=0), torch.nan, summed)
