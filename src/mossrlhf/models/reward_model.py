"""The reward model, which is also the critic: a backbone under a value head, loaded and saved."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from peft import AutoPeftModelForSequenceClassification, PeftConfig
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from mossrlhf.functional import upcast
from mossrlhf.models.backbone import last_hidden_states
from mossrlhf.models.lora import adapter_folder, forget_quantization, merged_state_dict
from mossrlhf.serialization import ShardError, Shards

SCORE_MOMENTS = ("score_mean", "score_std")
"""Fields of a reward model's configuration: mean and standard deviation of its scores."""

_RELEASED_HEAD = "reward_head.weight"
"""The weight by which the released MOSS-RLHF reward models are recognized."""

_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token",
)  # fmt: skip
"""Arguments of ``from_pretrained`` that locate a checkpoint."""


class ValueHead(nn.Linear):
    """Compute a value per position, V = w·h (+ b), in float32.

    Args:
        hidden_size: D of the backbone.
        bias: whether to add b.
        zero: start from w = 0, so that an untrained critic returns 0 everywhere.

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
            hidden: ``[B, L, D]`` last hidden states, of any floating type.

        Returns:
            ``[B, L]`` in float32 at least, with autocast or without.
        """
        hidden = upcast(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(hidden)
            return nn.functional.linear(hidden, self.weight.to(hidden), bias).squeeze(-1)


class RewardModel(nn.Module):
    """Score sequences with a transformer backbone under a `ValueHead`; also the critic.

    The weights have the names of transformers' ``…ForSequenceClassification`` with one label
    (``model.*``, ``score.weight``), in memory and on disk: any tool that loads such a classifier
    loads what is saved here, and any such classifier with a head called ``score`` loads here.

    Args:
        backbone: a bare transformer (``AutoModel``).
        head: its value head; None for a new one that returns 0 everywhere.

    Raises:
        ValueError: where the head expects hidden states of another size.

    Source: P1 §3.1; C's `LlamaRewardModel`.
    """

    def __init__(self, backbone: PreTrainedModel, head: ValueHead | None = None) -> None:
        super().__init__()
        self._prefix = backbone.base_model_prefix
        self.config = backbone.config
        text = backbone.config.get_text_config()
        # OPT projects its hidden states to another size.
        hidden_size = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
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
        """The device of the head."""
        return self.score.weight.device

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that no other model shares, by name: here, all."""
        return dict(self.named_parameters())

    def token_values(
        self,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Shaped[Tensor, "B L"],
        right_padded: bool | None = None,
    ) -> Float[Tensor, "B L"]:
        """Return the value at every position; positions count attended tokens only.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.
            right_padded: whether all padding is known to be on the right.

        Returns:
            ``[B, L]`` float32, in units of reward; meaningless on padding.
        """
        hidden = last_hidden_states(self.backbone, input_ids, attention_mask, right_padded)
        return self.score(hidden)

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Shaped[Tensor, "B L"]
    ) -> Float[Tensor, " B"]:
        """Score each sequence: the value at its last attended token.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]`` 1 on tokens, 0 on padding, on either side.

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
        reward_model.score.to(head.weight.dtype)  # not all: rotary frequencies stay in float32
        return reward_model

    @classmethod
    def from_language_model(
        cls, model: PreTrainedModel | str | Path, **kwargs: Any
    ) -> "RewardModel":
        """Put a zero head on a causal language model's backbone, which is copied.

        Args:
            model: the language model, or its folder or hub name.
            kwargs: passed to ``AutoModelForCausalLM.from_pretrained``.

        Source: P1 §4.2: the reward model starts from the SFT model, its head replaced.
        """
        if isinstance(model, (str, Path)):
            kwargs = {"dtype": torch.float32, **kwargs}
            return cls(AutoModelForCausalLM.from_pretrained(str(model), **kwargs).base_model)
        return cls(copy.deepcopy(model.base_model))

    def save_pretrained(self, path: str | Path, *, scores: bool = True, **kwargs: Any) -> None:
        """Write configuration and weights as transformers does for sequence classifiers.

        Adapters within the backbone are merged in what is written.

        Args:
            path: folder, created where absent.
            scores: False for a critic, which nobody scores with, to omit the warning.
            kwargs: passed to ``PreTrainedModel.save_pretrained`` (``max_shard_size`` …).

        Warns:
            UserWarning: where the padding token also ends responses, so that transformers would
                read the score one token early, or where there is none and it takes no batches.

        Raises:
            ValueError: where transformers does not know this family, or has no classifier with a
                head like this one.
        """
        if scores:
            _warn_of_padding_token(self.config)
        state = kwargs.pop("state_dict", None) or merged_state_dict(self)
        self._classifier(state).save_pretrained(str(path), state_dict=state, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload what `save_pretrained` writes to the hub.

        Args:
            repo_id: ``owner/name``.
            kwargs: passed to ``PreTrainedModel.push_to_hub``.
        """
        _warn_of_padding_token(self.config)
        state = merged_state_dict(self)
        classifier = self._classifier(state).to_empty(device="cpu")
        classifier.load_state_dict(state)
        classifier.push_to_hub(repo_id, **kwargs)

    def require_layout(self, argument: str) -> None:
        """Check, before training, that the family's classifier has a head like this one.

        Args:
            argument: the name to report.

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

    def _classifier(self, state: Mapping[str, Tensor]) -> PreTrainedModel:
        """Return transformers' classifier for these weights, which it does not hold yet."""
        architecture = classifier_class(self.config)
        config: PreTrainedConfig = copy.deepcopy(self.config)
        forget_quantization(config)
        config.num_labels = 1
        config.architectures = [architecture.__name__]
        with torch.device("meta"):
            classifier = architecture(config).to(self.backbone.dtype)
        different = sorted(state.keys() ^ classifier.state_dict().keys())
        if different:
            raise ValueError(
                f"transformers' {architecture.__name__} and this reward model differ in "
                f"{different[:3]}, so saving would lose weights; save its state_dict() yourself"
            )
        return classifier


def _warn_of_padding_token(config: PreTrainedConfig) -> None:
    """Warn of a padding token that also ends responses, or of none: transformers goes by its id."""
    text = config.get_text_config()
    pad, end = text.pad_token_id, text.eos_token_id
    if pad is not None and pad in (end if isinstance(end, list) else [end]):
        warnings.warn(
            f"config.pad_token_id is {pad}, which also ends responses. Transformers' sequence "
            "classifiers read the score at the last token that is not this one, so what is saved "
            "here would score a finished response one token early (as a RewardModel it does not). "
            "Set config.pad_token_id to a token that no response contains, and pad with it",
            UserWarning,
            stacklevel=3,
        )
    if pad is None:
        warnings.warn(
            "config.pad_token_id is None, without which transformers' sequence classifiers score "
            "one sequence at a time and refuse several (as a RewardModel it scores them). Set it "
            "to a token that no response contains",
            UserWarning,
            stacklevel=3,
        )


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the sequence classifier of a family, made from transformers' generic one if needed."""
    family = type(config)
    if family in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[family]
    if family not in MODEL_MAPPING:
        raise ValueError(
            f"transformers has no model for {family.__name__}, so there is no layout to keep this "
            "reward model in; save its state_dict() yourself"
        )
    backbone = MODEL_MAPPING[family]
    bare = next(kind for kind in backbone.__mro__[1:] if issubclass(kind, PreTrainedModel))
    name = backbone.__name__.removesuffix("Model") + "ForSequenceClassification"
    own = {"base_model_prefix": backbone.base_model_prefix, "__module__": __name__}
    return type(name, (GenericForSequenceClassification, bare), own)


def load_classifier(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a one-label sequence classifier of any family, and check that it is one.

    A folder in the layout of the released reward models (a causal language model with
    ``reward_head.weight`` beside it) is loaded as one, without its output head. An adapter alone
    is merged into the base model that its configuration names.

    Args:
        path: folder or hub name.
        kwargs: passed to ``from_pretrained`` of the family's classifier.

    Raises:
        ValueError: where the checkpoint has no head, more than one label, or lacks weights.

    Source: the released layout is C's.
    """
    kwargs = {"num_labels": 1, "dtype": torch.float32, **kwargs}
    if (folder := adapter_folder(path)) is not None:
        return _from_adapter(folder, **kwargs)
    location = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    try:
        shards = Shards(path)
    except ShardError:
        pass  # a hub name, or transformers reports it
    else:
        if _RELEASED_HEAD in shards:
            return _from_released(
                shards, **{name: v for name, v in kwargs.items() if name not in location}
            )
    architecture: Any = AutoModelForSequenceClassification
    if not kwargs.get("trust_remote_code"):  # then the checkpoint may bring a class of its own
        architecture = classifier_class(AutoConfig.from_pretrained(str(path), **location))
    model, info = architecture.from_pretrained(
        str(path), output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    lost = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if lost:
        raise ValueError(
            f"path: {str(path)!r} holds no sequence classifier with one label (missing or of "
            f"another shape: {lost[:3]}); to start a reward model from a language model, use "
            "RewardModel.from_language_model(path)"
        )
    return model


def _from_adapter(folder: Path, **kwargs: Any) -> PreTrainedModel:
    if PeftConfig.from_pretrained(str(folder)).base_model_name_or_path is None:
        raise ValueError(
            f"path: {str(folder)!r} holds adapters, and does not say over which base; name it "
            "as base_model_name_or_path in adapter_config.json"
        )
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), **kwargs)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()


def _from_released(shards: Shards, num_labels: int, **kwargs: Any) -> PreTrainedModel:
    """Load a classifier from weights in C's layout."""
    config = AutoConfig.from_pretrained(str(shards.folder))
    config.num_labels = num_labels
    state = {}
    for key in shards:
        # Older transformers saved the frequencies of rotary positions.
        if not key.startswith("lm_head.") and not key.endswith("rotary_emb.inv_freq"):
            state["score.weight" if key == _RELEASED_HEAD else key] = shards[key]
    model, info = classifier_class(config).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True,
        ignore_mismatched_sizes=True, **kwargs,
    )  # fmt: skip
    odd = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if odd:
        raise ValueError(
            f"path: {str(shards.folder)!r} holds a {_RELEASED_HEAD}, but not what should be below "
            f"it: {sorted(odd)[:3]} are missing, unknown or of another shape"
        )
    model.eval()
    return model
