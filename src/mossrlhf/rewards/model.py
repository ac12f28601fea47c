"""Reward models as rewards: those that read the policy's tokens, and those that read text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mossrlhf.models import RewardModel, ValueHead
from mossrlhf.models.backbone import group_by_length
from mossrlhf.strict import strict
from mossrlhf.types import Rollout

Messages = Sequence[Mapping[str, str]]


@strict
@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model, or any one-label sequence classifier, as a reward.

    With the policy's tokenizer it reads the policy's tokens; with another one (`tokenizer`) it
    reads text: the prompt as the dataset has it, through that tokenizer's own chat template where
    it is a list of messages, and the completion decoded. A truncated response is not ended there.

    Args:
        model: `RewardModel`, or any one-label ``…ForSequenceClassification`` of transformers.
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
        object.__setattr__(self, "model", as_scorer(self.model).eval().requires_grad_(False))

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
            ids, mask = self._encode(prompts, completions, rollout.truncated.tolist())
            ids, mask = ids.to(rollout.input_ids.device), mask.to(rollout.input_ids.device)
        else:
            ids, mask = rollout.input_ids, rollout.attention_mask
        groups = group_by_length(mask.sum(1), self.batch_size)  # for little padding
        parts = [
            self.model(ids[rows, :width], mask[rows, :width])
            for rows in groups
            for width in [int(mask[rows].sum(1).max())]
        ]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def _encode(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str],
        truncated: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        texts = zip(prompts, completions, truncated, strict=True)
        rows = [self._row(prompt, completion, cut) for prompt, completion, cut in texts]
        width = max(len(ids) for ids in rows)
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        lengths = torch.tensor([len(ids) for ids in rows])
        return padded, torch.arange(width) < lengths[:, None]

    def _row(self, prompt: str | Messages, completion: str, truncated: bool) -> list[int]:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        if not isinstance(prompt, str):
            turns = [*prompt, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(
                turns, tokenize=False, continue_final_message=truncated
            )
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids, end = list(tokenizer(prompt + completion)["input_ids"]), tokenizer.eos_token_id
        if end is None:
            return ids
        if truncated:  # also where the tokenizer puts an end after whatever it reads
            return ids[:-1] if ids[-1:] == [end] else ids
        return ids if ids[-1:] == [end] else [*ids, end]


class Classifier(nn.Module):
    """A one-label sequence classifier asked as it is: BERT and its like, whatever their head.

    Args:
        model: gives ``logits [B, 1]`` of ids and mask, padded on the right.

    Source: ours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of the tokens it reads."""
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Score each sequence.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on the padding behind them.

        Returns:
            ``[B]`` scores, float32.

        Raises:
            ValueError: where a sequence is longer than the model reads.
        """
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or -1
        if 0 < limit < input_ids.shape[1]:
            raise ValueError(
                f"reward: a prompt with its response takes {input_ids.shape[1]} tokens, "
                f"{type(self.model).__name__} reads at most {limit}; lower max_prompt_length or "
                "max_new_tokens"
            )
        if (pad := config.pad_token_id) is not None:  # positions may be counted by it
            input_ids = input_ids.masked_fill(attention_mask == 0, pad)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        return output.logits[:, 0].float()


def as_scorer(model: nn.Module) -> RewardModel | Classifier:
    """Return what scores sequences from ``input_ids`` and ``attention_mask``, sharing the weights.

    Args:
        model: a `RewardModel`, or a transformers sequence classifier with one label.

    Raises:
        ValueError: where it is neither.

    Source: ours.
    """
    if isinstance(model, Classifier):
        return model
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    own_head = isinstance(getattr(model, "score", None), nn.Linear)
    if not isinstance(model, PreTrainedModel) or not classifies or own_head:
        return as_reward_model(model)
    _require_one_label(model, model.config.num_labels)
    return Classifier(model)


def as_reward_model(model: nn.Module, name: str = "reward") -> RewardModel:
    """Return a `RewardModel` sharing the weights of a one-label sequence classifier.

    Args:
        model: a `RewardModel`, which is returned as it is, or a transformers classifier with a
            head called ``score`` on a causal backbone: one that gives a value at every token.
        name: what the error calls it.

    Raises:
        ValueError: where it has no linear head called ``score`` with one output.

    Source: ours.
    """
    if isinstance(model, RewardModel):
        return model
    head = getattr(model, "score", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(head, nn.Linear):
        classifies = type(model).__name__.endswith("ForSequenceClassification")
        remedy = (
            "expected a RewardModel, a transformers sequence classifier with one label, or a "
            "callable; wrap others in a function reward(*, prompts, completions, completion_ids, "
            "**columns) -> list[float]"
        )
        if name == "critic":
            whole = "which scores sequences as a whole; " if classifies else ""
            remedy = (
                f"{whole}a critic needs a value at every token: a RewardModel, or a causal "
                "backbone under a head called 'score'. Leave critic=None for one made of the policy"
            )
        raise ValueError(f"{name}: got {type(model).__name__}, {remedy}")
    _require_one_label(model, head.out_features)
    value_head = ValueHead(head.in_features, bias=head.bias is not None)
    value_head.weight = head.weight
    if head.bias is not None:
        value_head.bias = head.bias
    return RewardModel(model.base_model, value_head)


def _require_one_label(model: nn.Module, labels: int) -> None:
    if labels != 1:
        raise ValueError(
            f"reward: {type(model).__name__} has {labels} labels, expected 1; write a function "
            "that says which of them is the reward"
        )
