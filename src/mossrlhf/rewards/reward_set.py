"""Several rewards with names and weights, called together, and checks of what they return."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence, Set
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mossrlhf.models import RewardModel
from mossrlhf.rewards.model_reward import Messages, ModelReward
from mossrlhf.types import Rollout

RESERVED = frozenset([
    "advantages", "critic", "kl", "perplexity", "policy",
    "response", "returns", "sampler", "values",
])  # fmt: skip
"""Names no reward may have, since other metrics are called ``eval/<name>/…``."""


@runtime_checkable
class RewardFunction(Protocol):
    """A function as a reward, called by keyword.

    It gets ``prompts`` and ``completions`` (texts), ``completion_ids`` (lists of token ids) and
    every further column of the dataset, B entries each. It returns B numbers; None means "not
    applicable", and NaN is an error. A tensor ``[B, T]`` holds one reward per token.

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
    """One or several rewards with weights, called together and summed.

    Args:
        rewards: a reward, or a list of rewards and (reward, weight) pairs; one of weight 0 is
            measured only.
        tokenizer: the policy's, to decode completions.

    Raises:
        ValueError: if there is no reward, two have the same name, or a name is in `RESERVED`.
        TypeError: if one is neither a model nor callable.
    """

    def __init__(self, rewards: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rewards: list[tuple[Reward, float]] = [
            (ModelReward(model=reward) if isinstance(reward, nn.Module) else reward, weight)
            for reward, weight in reward_pairs(rewards)
        ]
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
        return {n: weight for n, (_, weight) in zip(self.names, self.rewards, strict=True)}

    def models(self) -> list[nn.Module]:
        """Return the models among the rewards, `RewardModel` or `Classifier`."""
        return [r.model for r, _ in self.rewards if isinstance(r, ModelReward)]

    def same_tokenizer(self) -> list[RewardModel]:
        """Return the reward models that read the policy's tokens."""
        own = [r for r, _ in self.rewards if isinstance(r, ModelReward) and r.tokenizer is None]
        return [r.model for r in own if isinstance(r.model, RewardModel)]

    def to(self, device: torch.device | str) -> "RewardSet":
        """Move the models among the rewards to ``device``."""
        for model in self.models():
            model.to(device)
        return self

    def __call__(self, rollout: Rollout) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Return the rewards of a rollout.

        Args:
            rollout: B responses.

        Returns:
            the weighted sum of the rewards per response ``[B]`` (NaN where none applies), that of
            the rewards per token ``[B, T]`` (each None if no reward gives any), and by name the
            unweighted reward of each response ``[B]``.

        Raises:
            ValueError: if a function raises or returns something else; the error names the
                function and the sample.
        """
        prompts = rollout.columns.get("prompt")
        if prompts is None:
            prompts = self.tokenizer.batch_decode(rollout.prompts(), skip_special_tokens=False)
        completion_ids = rollout.completions()
        completions = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        per_response, per_token, by_name = [], [], {}
        for (reward, weight), name in zip(self.rewards, self.names, strict=True):
            if isinstance(reward, ModelReward):
                output: Any = reward.score(rollout, prompts, completions)
            else:
                texts = [self._render(prompt) for prompt in prompts]
                output = _call(
                    reward,
                    name,
                    dict(prompts=texts, completions=completions, completion_ids=completion_ids),
                    {k: list(v) for k, v in rollout.columns.items() if k != "prompt"},
                )
            given = _as_tensor(output, name, rollout, completions)
            dense = torch.where(rollout.mask, given, 0.0) if given.ndim == 2 else None
            by_name[name] = given if dense is None else dense.sum(1)
            if not weight:
                continue  # only measured: its NaN must not reach the sum either
            if dense is not None:
                per_token.append(weight * dense)
            else:
                per_response.append(weight * given)
        return (
            reduce(_add, per_response) if per_response else None,
            reduce(torch.add, per_token) if per_token else None,
            by_name,
        )

    def _render(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(
            self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
        )


def reward_pairs(rewards: Any) -> list[tuple[Any, float]]:
    """Return one reward, or a list of rewards and pairs, as (reward, weight); 1 by default.

    Raises:
        TypeError: if one of them cannot be a reward.
        ValueError: if there is none, a weight is not a finite number, or a tuple is not a pair.
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
    """Return a reward's name in metrics: its ``__name__``, or that of its class."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def _call(
    reward: Callable[..., Any], name: str, arguments: dict[str, Any], columns: dict[str, Any]
) -> Any:
    if taken := sorted(arguments.keys() & columns.keys()):
        raise ValueError(
            f"train_dataset: its column {taken[0]!r} has the name of an argument that the trainer "
            f"passes to the reward {name!r}; rename the column"
        )
    size, first = len(arguments["completions"]), next(iter(arguments["completions"]), "")
    parameters, known = inspect.signature(reward).parameters, sorted(columns)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # Without `**columns`, a function gets only what it names.
        arguments = {k: v for k, v in arguments.items() if k in parameters}
        columns = {k: v for k, v in columns.items() if k in parameters}
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = {n for n, p in parameters.items() if p.kind in by_name and p.default is p.empty}
    if lacking := sorted(needed - arguments.keys() - columns.keys()):
        raise ValueError(
            f"reward {name!r}: got a parameter {lacking[0]!r}, expected prompts, completions, "
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
    """Return rewards ``[B]``, NaN where they do not apply, or ``[B, T]``; refuse anything else."""
    device, size = rollout.input_ids.device, len(rollout)
    if isinstance(output, Tensor):
        if output.is_complex():
            raise ValueError(
                f"reward {name!r} returned a tensor of {output.dtype}, expected real numbers"
            )
        rewards = output.detach().to(device, torch.float32)
        counted = torch.ones_like(rewards, dtype=torch.bool)
    else:
        values = _as_list(output, name, size)
        given = [torch.nan if value is None else value for value in values]
        rewards = torch.tensor(given, dtype=torch.float32, device=device)
        counted = torch.tensor([value is not None for value in values], device=device)
    shapes = [(size,), tuple(rollout.mask.shape)]
    if tuple(rewards.shape) not in shapes:
        raise ValueError(
            f"reward {name!r} returned {tuple(rewards.shape)} values for {size} completions, "
            f"expected {shapes[0]}, or {shapes[1]} for one reward per token"
        )
    counted = rollout.mask if rewards.ndim == 2 else counted
    broken = (~torch.isfinite(rewards) & counted).nonzero()
    if len(broken):
        row = int(broken[0, 0])
        raise ValueError(
            f"reward {name!r} returned {rewards[row].tolist()} for sample {row}, "
            f"{completions[row]!r:.60}, expected finite numbers (None where it does not apply)"
        )
    return rewards


def _as_list(output: Any, name: str, size: int) -> list[float | None]:
    try:
        if isinstance(output, str | bytes | Mapping | Set):
            raise TypeError("its order is not that of the completions")
        if inspect.iscoroutine(output):
            output.close()
            raise TypeError("it was never awaited; write a plain function: asyncio.run(reward(…))")
        return [None if value is None else _as_float(value) for value in output]
    except (TypeError, OverflowError) as error:
        raise ValueError(
            f"reward {name!r} returned {type(output).__name__}, expected a list of {size} "
            f"numbers (None where it does not apply), or a tensor: {error}"
        ) from error


def _as_float(value: Any) -> float:
    if isinstance(value, Tensor):
        fits = value.numel() == 1 and not value.is_complex()
    else:  # numpy converts complex numbers and arrays to floats
        imaginary = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
        fits = getattr(value, "ndim", 0) == 0 and not imaginary
    if not fits or not isinstance(value, SupportsFloat):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


def _add(total: Tensor, part: Tensor) -> Tensor:
    """Add rewards where they apply; NaN where neither does."""
    both = torch.stack([total, part])
    return both.nansum(dim=0).masked_fill(both.isnan().all(dim=0), torch.nan)
