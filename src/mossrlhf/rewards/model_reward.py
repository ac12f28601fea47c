"""Reward models and sequence classifiers as rewards, with the policy's tokenizer or their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mossrlhf.models import RewardModel, ValueHead
from mossrlhf.models.backbone import group_by_length
from mossrlhf.options import strict
from mossrlhf.types import Rollout

Messages = Sequence[Mapping[str, str]]


@strict
@dataclass(frozen=True, kw_only=True)
class ModelReward:
    """A reward model, or any one-label sequence classifier, as a reward.

    With the policy's tokenizer it reads the policy's tokens. With its own (`tokenizer`) it reads
    text: the prompt as in the dataset, through that tokenizer's chat template if it is a list of
    messages, and the decoded completion. A truncated response gets no end token.

    Args:
        model: `RewardModel`, or any one-label ``…ForSequenceClassification`` of transformers.
        tokenizer: its tokenizer, if it is not the policy's; None for the policy's.
        batch_size: sequences per forward pass.
        name: the reward's name in metrics.

    Raises:
        ValueError: if the model has no one-label head.

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
        """Return the reward of each response, ``[B]``.

        Args:
            rollout: B sequences, whose tokens are read unless there is a `tokenizer`.
            prompts: B prompts as in the dataset, read by the `tokenizer`.
            completions: B texts, likewise.
        """
        ids, mask = rollout.input_ids, rollout.attention_mask
        if self.tokenizer is not None:
            texts = zip(prompts, completions, rollout.truncated.tolist(), strict=True)
            rows = [torch.tensor(_encode(self.tokenizer, *t), dtype=torch.long) for t in texts]
            lengths = torch.tensor([len(row) for row in rows], device=ids.device)
            ids = pad_sequence(rows, batch_first=True).to(ids.device)
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        groups = group_by_length(mask.sum(1), self.batch_size)  # for little padding
        parts = [
            self.model(ids[rows, :width], mask[rows, :width])
            for rows in groups
            for width in [int(mask[rows].sum(1).max())]
        ]
        return torch.cat(parts)[torch.cat(groups).argsort()]


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str, truncated: bool
) -> list[int]:
    """Return the ids of prompt and completion, with an end token unless truncated."""
    if not isinstance(prompt, str):
        turns = [*prompt, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, continue_final_message=truncated
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids, end = list(tokenizer(prompt + completion)["input_ids"]), tokenizer.eos_token_id
    if end is None:
        return ids
    if ids[-1:] == [end]:  # some tokenizers append it to every text
        ids = ids[:-1]
    return ids if truncated else [*ids, end]


class Classifier(nn.Module):
    """A one-label sequence classifier, such as BERT, with any head; ``model`` is transformers'."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's token embeddings."""
        return self.model.get_input_embeddings()

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Return the rewards of right-padded sequences, ``[B]``, float32.

        Raises:
            ValueError: if a sequence is longer than the model's context.
        """
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or -1
        if 0 < limit < input_ids.shape[1]:
            raise ValueError(
                f"reward: a prompt with its response takes {input_ids.shape[1]} tokens, "
                f"{type(self.model).__name__} reads at most {limit}; lower max_prompt_length or "
                "max_new_tokens"
            )
        if (pad := config.pad_token_id) is not None:  # some models derive positions from it
            input_ids = input_ids.masked_fill(attention_mask == 0, pad)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask.long())
        return output.logits[:, 0].float()


def as_scorer(model: nn.Module) -> RewardModel | Classifier:
    """Return a module from ``input_ids`` and ``attention_mask`` to rewards, sharing the weights.

    Args:
        model: a `RewardModel`, or a transformers sequence classifier with one label.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(model, Classifier):
        return model
    own_head = isinstance(getattr(model, "score", None), nn.Linear)
    if own_head or not isinstance(model, PreTrainedModel) or not _classifies(model):
        return as_reward_model(model)
    _require_one_label(model, model.config.num_labels)
    return Classifier(model)


def as_reward_model(model: nn.Module, name: str = "reward") -> RewardModel:
    """Return a `RewardModel` sharing the weights of a one-label sequence classifier.

    Args:
        model: a `RewardModel`, which is returned unchanged, or a transformers classifier with a
            head called ``score`` on a causal backbone, which gives a value at every token.
        name: the argument's name in errors.

    Raises:
        ValueError: if it has no linear head called ``score`` with one output.
    """
    if isinstance(model, RewardModel):
        return model
    head = getattr(model, "score", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(head, nn.Linear):
        remedy = (
            "expected a RewardModel, a transformers sequence classifier with one label, or a "
            "callable; wrap others in a function reward(*, prompts, completions, completion_ids, "
            "**columns) -> list[float]"
        )
        if name == "critic":
            whole = "which scores sequences as a whole; " if _classifies(model) else ""
            remedy = (
                f"{whole}a critic needs a value at every token: a RewardModel, or a causal "
                "backbone under a head called 'score'. Leave critic=None for one made of the policy"
            )
        raise ValueError(f"{name}: got {type(model).__name__}, {remedy}")
    _require_one_label(model, head.out_features)
    value_head = ValueHead(head.in_features)
    value_head.weight, value_head.bias = head.weight, head.bias
    return RewardModel(model.base_model, value_head)


def _classifies(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _require_one_label(model: nn.Module, labels: int) -> None:
    if labels != 1:
        raise ValueError(
            f"reward: {type(model).__name__} has {labels} labels, expected 1; write a function "
            "that selects the reward"
        )
