"""Sequence classifiers of one label: the layout in which reward models and critics are kept."""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from mossrlhf.models.adapters import adapter_folder
from mossrlhf.shards import ShardError, Shards

RELEASED_HEAD = "reward_head.weight"
"""By which the released MOSS-RLHF reward models are known."""

OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where a checkpoint is, not what to make of it."""


def classifier_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the sequence classifier of a family.

    Transformers has none for Granite, Cohere, OLMoE and others: theirs is made of its generic
    one, in the layout that transformers will read once it has one.

    Args:
        config: of a model of the family.

    Raises:
        ValueError: where transformers has no such family.

    Source: ours.
    """
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
    """Load a one-label sequence classifier of any family, and make sure that it is one.

    A folder in the layout of the released reward models (a causal language model with
    ``reward_head.weight`` beside it) becomes one: its output head is left out. Adapters alone are
    merged into the base that their configuration names.

    Args:
        path: folder or hub name.
        kwargs: passed to ``from_pretrained`` of the family's classifier.

    Raises:
        ValueError: where the checkpoint has no head, more than one label, or lacks weights.

    Source: ours; the released layout is C's.
    """
    kwargs = {"num_labels": 1, "dtype": torch.float32, **kwargs}
    if (folder := adapter_folder(path)) is not None:
        return _from_adapters(folder, **kwargs)
    if (released := _released(path)) is not None:
        return _from_released(released, **{k: v for k, v in kwargs.items() if k not in OF_THE_HUB})
    architecture: Any = AutoModelForSequenceClassification
    if not kwargs.get("trust_remote_code"):  # then the checkpoint may bring a class of its own
        place = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
        architecture = classifier_class(AutoConfig.from_pretrained(str(path), **place))
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


def _from_adapters(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Load the base that adapters were trained over, and merge them in."""
    from peft import AutoPeftModelForSequenceClassification, PeftConfig

    if PeftConfig.from_pretrained(str(folder)).base_model_name_or_path is None:
        raise ValueError(
            f"path: {str(folder)!r} holds adapters, and does not say over which base; name it "
            "as base_model_name_or_path in adapter_config.json"
        )
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), **kwargs)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.eval()


def _released(path: str | Path) -> Shards | None:
    """The weights of a folder in C's layout; None of any other."""
    try:
        shards = Shards(path)
    except ShardError:
        return None  # a hub name, or for transformers to complain of
    return shards if RELEASED_HEAD in shards else None


def _from_released(shards: Shards, num_labels: int, **kwargs: Any) -> PreTrainedModel:
    """Make a classifier of weights in C's layout: its head renamed, the output head left out.

    Older transformers kept the frequencies that rotate positions; newer ones make them.
    """
    config = AutoConfig.from_pretrained(str(shards.folder))
    config.num_labels = num_labels
    state = {}
    for key in shards:
        if not key.startswith("lm_head.") and not key.endswith("rotary_emb.inv_freq"):
            state["score.weight" if key == RELEASED_HEAD else key] = shards[key]
    model, info = classifier_class(config).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True,
        ignore_mismatched_sizes=True, **kwargs,
    )  # fmt: skip
    odd = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if odd:
        raise ValueError(
            f"path: {str(shards.folder)!r} holds a {RELEASED_HEAD}, but not what should be below "
            f"it: {sorted(odd)[:3]} are missing, unknown or of another shape"
        )
    model.eval()
    return model


def warn_of_padding(config: PreTrainedConfig) -> None:
    """Tell of a padding token that ends responses too, or is none: transformers go by its id.

    Args:
        config: of the model that is about to be written.

    Source: ours.
    """
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
