"""The value head, and the reward model that is also the critic."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from mossrlhf.functional import upcast
from mossrlhf.models.adapters import merged_state_dict
from mossrlhf.models.classifiers import (
    classifier_class,
    load_classifier,
    warn_of_padding,
)
from mossrlhf.models.packing import states
from mossrlhf.models.quantized import forget_quantization

SCORE_MOMENTS = ("score_mean", "score_std")
"""What a reward model's configuration may hold: mean and standard deviation of its scores."""


class ValueHead(nn.Linear):
    """One number per position: V = w·h (+ b), computed in float32.

    Args:
        hidden_size: D of the backbone.
        bias: whether to add b.
        zero: start from w = 0, so that an untrained critic says 0 everywhere.

    Source: P1 §3.2 (the critic); C's `reward_head` has no bias either.
    """

    def __init__(self, hidden_size: int, bias: bool = False, zero: bool = True) -> None:
        super().__init__(hidden_size, 1, bias=bias)
        if zero:
            nn.init.zeros_(self.weight)
            if bias:
                nn.init.zeros_(self.bias)

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L"]:
        """Map hidden states to values.

        Args:
            hidden: ``[B, L, D]`` last hidden states, any floating type.

        Returns:
            ``[B, L]`` in float32 at least, autocast or not.
        """
        hidden = upcast(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(hidden)
            return nn.functional.linear(hidden, self.weight.to(hidden), bias).squeeze(-1)


class RewardModel(nn.Module):
    """A transformer backbone with a `ValueHead`: reward model and critic alike.

    Its weights carry the names of transformers' ``…ForSequenceClassification`` with one label
    (``model.*``, ``score.weight``), which is also the layout on disk: what it saves is served by
    any tool that loads such a classifier, and any such classifier loads here.

    Args:
        backbone: a bare transformer (``AutoModel``).
        head: its value head; None for a new one that says 0 everywhere.

    Raises:
        ValueError: where the head reads hidden states of another size.

    Source: P1 §3.1; C's `LlamaRewardModel`.
    """

    def __init__(self, backbone: PreTrainedModel, head: ValueHead | None = None) -> None:
        super().__init__()
        self._prefix = backbone.base_model_prefix
        self.config = backbone.config
        hidden_size = _hidden_size(backbone.config)
        if head is not None and head.in_features != hidden_size:
            raise ValueError(
                f"head: it reads {head.in_features} numbers a token, and the backbone's hidden "
                f"states have {hidden_size}; pass ValueHead({hidden_size})"
            )
        self.add_module(self._prefix, backbone)
        self.score = head if head is not None else ValueHead(hidden_size)

    @property
    def backbone(self) -> PreTrainedModel:
        """The bare transformer."""
        return self.get_submodule(self._prefix)

    @property
    def device(self) -> torch.device:
        """Where the head lives."""
        return self.score.weight.device

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are this model's alone, by name: here, all."""
        return dict(self.named_parameters())

    def token_values(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Shaped[Tensor, "B L"],
        right_padded: bool | None = None,
    ) -> Float[Tensor, "B L"]:
        """Return the head's value at every position; positions count attended tokens only.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.
            right_padded: whether it is known that all padding is on the right.

        Returns:
            ``[B, L]`` float32, in units of reward; meaningless on padding.
        """
        return self.score(states(self.backbone, input_ids, attention_mask, right_padded))

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Score each sequence: the value at its last attended token, either padding side.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding.

        Returns:
            ``[B]`` scores, float32.

        Source: P1 §3.1; C: the head at the last token.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.long() * positions).argmax(dim=1)
        values = self.token_values(input_ids, attention_mask)
        return values.gather(1, last[:, None]).squeeze(1)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> "RewardModel":
        """Load a one-label sequence classifier whose head is called ``score``.

        Args:
            path: folder or hub name.
            kwargs: passed to ``AutoModelForSequenceClassification.from_pretrained``.

        Raises:
            ValueError: where the checkpoint has no ``score`` head, more than one label, or
                lacks weights.
        """
        model = load_classifier(path, **kwargs)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"path: {str(path)!r} holds a {type(model).__name__}, whose head is not called "
                "'score', so it gives no value at every token; a critic and a model to be trained "
                "need a causal language model's backbone under such a head. It can be a reward: "
                "pass reward=path"
            )
        bias = head.bias is not None
        reward_model = cls(model.base_model, ValueHead(head.in_features, bias=bias))
        reward_model.score.load_state_dict(head.state_dict())
        reward_model.score.to(head.weight.dtype)  # not all: positions are rotated in float32
        return reward_model

    @classmethod
    def from_language_model(
        cls, model: PreTrainedModel | str | Path, **kwargs: Any
    ) -> "RewardModel":
        """Put a zero head on (a copy of) a causal language model's backbone.

        Args:
            model: the language model, which is copied, or a folder or hub name.
            kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

        Source: P1 §4.2: the reward model starts from the SFT model, its head replaced.
        """
        if isinstance(model, (str, Path)):
            kwargs = {"dtype": torch.float32, **kwargs}
            return cls(AutoModelForCausalLM.from_pretrained(str(model), **kwargs).base_model)
        return cls(copy.deepcopy(model.base_model))

    def save_pretrained(self, path: str | Path, *, scores: bool = True, **kwargs: Any) -> None:
        """Write config and weights in the layout of transformers' sequence classifiers.

        Adapters inside the backbone are merged in what is written.

        Args:
            path: folder, made where absent.
            scores: whether others may score with it; False for a critic, to do without the
                warning.
            kwargs: passed to ``PreTrainedModel.save_pretrained`` (``max_shard_size`` …).

        Warns:
            UserWarning: where the token that pads also ends responses, so that transformers would
                read the score one token early, or where none pads, and they take no batches.

        Raises:
            ValueError: where transformers does not know this family, or has no classifier with a
                head like this one.
        """
        if scores:
            warn_of_padding(self.config)
        state = kwargs.pop("state_dict", None) or merged_state_dict(self)
        self._shell(state).save_pretrained(str(path), state_dict=state, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload what `save_pretrained` writes to the hub.

        Args:
            repo_id: ``owner/name``.
            kwargs: passed to ``PreTrainedModel.push_to_hub``.
        """
        warn_of_padding(self.config)
        state = merged_state_dict(self)
        shell = self._shell(state).to_empty(device="cpu")
        shell.load_state_dict(state)
        shell.push_to_hub(repo_id, **kwargs)

    def require_layout(self, argument: str) -> None:
        """Refuse a model whose head no sequence classifier of its family has, before it is trained.

        Args:
            argument: what the error calls it.

        Raises:
            ValueError: where `save_pretrained` would lose weights.
        """
        with torch.device("meta"):
            empty: Any = classifier_class(self.config)(copy.deepcopy(self.config))
        theirs = {*getattr(empty, "score", nn.Module()).state_dict()}
        if theirs and (extra := sorted({*self.score.state_dict()} - theirs)):
            raise ValueError(
                f"{argument}: transformers' {type(empty).__name__} has no place for its head's "
                f"{extra[0]}, so it could not be saved; pass a head without, as ValueHead("
                f"{self.score.in_features}) is"
            )

    def _shell(self, state: Mapping[str, Tensor]) -> PreTrainedModel:
        architecture = classifier_class(self.config)
        config: PreTrainedConfig = copy.deepcopy(self.config)
        forget_quantization(config)
        config.num_labels = 1
        config.architectures = [architecture.__name__]
        with torch.device("meta"):
            shell = architecture(config).to(self.backbone.dtype)
        different = sorted(state.keys() ^ shell.state_dict().keys())
        if different:
            raise ValueError(
                f"transformers' {architecture.__name__} and this reward model differ in "
                f"{different[:3]}, so saving would lose weights; save its state_dict() yourself"
            )
        return shell


def _hidden_size(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    # OPT's smaller hidden states are what its backbone gives.
    return int(getattr(text, "word_embed_proj_dim", None) or text.hidden_size)
