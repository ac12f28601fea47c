"""What is to be maximized: reward models, classifiers and functions behind one door."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mossrlhf.models import RewardModel, ValueHead
from mossrlhf.strict import strict
from mossrlhf.types import Rollout

Messages = Sequence[Mapping[str, str]]


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


@strict
@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model, or any one-label sequence classifier, as a reward.

    With the policy's tokenizer it reads the policy's tokens; with another one (`tokenizer`) it
    reads text: the prompt as the dataset has it, through that tokenizer's own chat template where
    it is a list of messages, and the completion decoded.

    Args:
        model: `RewardModel`, or a classifier with a head called ``score``.
        tokenizer: its tokenizer, where it is not the policy's; None for the policy's.
        batch_size: sequences at a time.
        name: what metrics call it.

    Raises:
        ValueError: where the model has no one-label head.

    Source: P1 §3.1.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    batch_size: int = 64
    name: str = "reward_model"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_reward_model(self.model).eval().requires_grad_(False))

    @property
    def __name__(self) -> str:
        return self.name

    @torch.no_grad()
    def score(
        self, rollout: Rollout, prompts: Sequence[str | Messages], completions: Sequence[str]
    ) -> Float[Tensor, " B"]:
        """Score the responses of a rollout.

        Args:
            rollout: B sequences; read where the tokenizer is the policy's.
            prompts: B prompts as the dataset has them; read where it is not.
            completions: B texts.

        Returns:
            ``[B]`` scores.
        """
        if self.tokenizer is not None:
            ids, mask = self._encode(prompts, completions)
            ids, mask = ids.to(rollout.input_ids.device), mask.to(rollout.input_ids.device)
        else:
            ids, mask = rollout.input_ids, rollout.attention_mask
        parts = zip(ids.split(self.batch_size), mask.split(self.batch_size), strict=True)
        return torch.cat([self.model(i, m) for i, m in parts])

    def _encode(
        self, prompts: Sequence[str | Messages], completions: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        rows: list[list[int]] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                ids = list(tokenizer(prompt + completion)["input_ids"])
                if tokenizer.eos_token_id not in (None, *ids[-1:]):
                    ids.append(tokenizer.eos_token_id)
            else:
                turns = [*prompt, {"role": "assistant", "content": completion}]
                text = tokenizer.apply_chat_template(turns, tokenize=False)
                ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            rows.append(ids)
        width = max(len(ids) for ids in rows)
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        lengths = torch.tensor([len(ids) for ids in rows])
        return padded, torch.arange(width) < lengths[:, None]


def as_reward_model(model: nn.Module) -> RewardModel:
    """Return a `RewardModel` sharing the weights of a one-label sequence classifier.

    Args:
        model: a `RewardModel`, which is returned as it is, or a transformers classifier.

    Raises:
        ValueError: where it has no linear head called ``score`` with one output.

    Source: ours.
    """
    if isinstance(model, RewardModel):
        return model
    head = getattr(model, "score", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"reward: got a {type(model).__name__}, expected a RewardModel, a transformers "
            "sequence classifier whose head is called 'score', or a callable; wrap others in a "
            "function reward(*, prompts, completions, completion_ids, **columns) -> list[float]"
        )
    if head.out_features != 1:
        raise ValueError(
            f"reward: {type(model).__name__} has {head.out_features} labels, expected 1; write a "
            "function that says which of them is the reward"
        )
    value_head = ValueHead(head.in_features, bias=head.bias is not None)
    value_head.weight = head.weight
    if head.bias is not None:
        value_head.bias = head.bias
    return RewardModel(model.base_model, value_head)


Reward: TypeAlias = ModelReward | RewardModel | PreTrainedModel | Callable[..., Any]


class RewardSet:
    """One or several rewards with weights, called together; the score is the weighted sum.

    Args:
        rewards: a reward, a list of them, or of (reward, weight) pairs; one of weight 0 is
            measured and never trained on.
        tokenizer: the policy's, to decode completions.

    Raises:
        ValueError: where there is none, or two share a name.
        TypeError: where one is no model and cannot be called.

    Source: ours.
    """

    def __init__(
        self,
        rewards: Any,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        listed = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        if not listed:
            raise ValueError("reward: got an empty list, expected at least one reward")
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in listed]
        self.tokenizer = tokenizer
        self.rewards = [(_as_reward(reward), float(weight)) for reward, weight in pairs]
        self.names = [reward_name(reward) for reward, _ in self.rewards]
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"reward: names must differ, since metrics carry them; got {self.names}. Give "
                "each function its own __name__, each ModelReward its own name="
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward, by name."""
        pairs = zip(self.names, self.rewards, strict=True)
        return {name: weight for name, (_, weight) in pairs}

    def models(self) -> list[RewardModel]:
        """Return the reward models among the rewards."""
        return [as_reward_model(r.model) for r, _ in self.rewards if isinstance(r, ModelReward)]

    def same_tokenizer(self) -> list[RewardModel]:
        """Return the reward models that read the policy's tokens."""
        models = [r for r, _ in self.rewards if isinstance(r, ModelReward)]
        return [as_reward_model(r.model) for r in models if r.tokenizer is None]

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
                given = _as_tensor(reward.score(rollout, prompts, completions), name, rollout)
            else:
                texts = [p if isinstance(p, str) else self._render(p) for p in prompts]
                columns = {k: v for k, v in rollout.columns.items() if k != "prompt"}
                output = _call(
                    reward,
                    name,
                    dict(prompts=texts, completions=completions, completion_ids=completion_ids),
                    {k: list(v) for k, v in columns.items()},
                )
                given = _as_tensor(output, name, rollout)
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
    if isinstance(reward, nn.Module):
        return ModelReward(model=reward)
    if not callable(reward):
        raise TypeError(
            f"reward: got {reward!r}, expected a reward model, a sequence classifier, a path to "
            "one, or a function reward(*, prompts, completions, completion_ids, **columns)"
        )
    return reward


def _call(
    reward: Callable[..., Any], name: str, arguments: dict[str, Any], columns: dict[str, Any]
) -> Any:
    parameters = inspect.signature(reward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # Refusing `def reward(completions, **_)` without its `**_` would help nobody.
        arguments = {k: v for k, v in arguments.items() if k in parameters}
        columns = {k: v for k, v in columns.items() if k in parameters}
    try:
        return reward(**arguments, **columns)
    except Exception as error:
        raise ValueError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It was called with "
            f"{len(arguments.get('completions', []))} completions and the columns "
            f"{sorted(columns)}"
        ) from error


def _as_tensor(output: Any, name: str, rollout: Rollout) -> Tensor:
    device, size = rollout.input_ids.device, len(rollout)
    absent = torch.zeros(size, dtype=torch.bool, device=device)
    if isinstance(output, Tensor):
        scores = output.detach().to(device, torch.float32)
    else:
        try:
            numbers = [0.0 if value is None else float(value) for value in output]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {name!r} returned a {type(output).__name__}, expected a list of {size} "
                f"numbers (None where it does not apply), or a tensor: {error}"
            ) from error
        scores = torch.tensor(numbers, dtype=torch.float32, device=device)
        if len(numbers) == size:
            absent = torch.tensor([value is None for value in output], device=device)
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
            f"reward {name!r} returned {scores[row].tolist()} for sample {row}, expected finite "
            "numbers (None where it does not apply)"
        )
    return scores.masked_fill(absent, torch.nan) if scores.ndim == 1 else scores


def _add(total: Tensor, part: Tensor) -> Tensor:
    """Sum of what applies; NaN only where neither does."""
    both = torch.stack([total, part])
    summed = torch.nansum(both, dim=0)
    return torch.where(torch.isnan(both).all(dim=0), torch.nan, summed)
