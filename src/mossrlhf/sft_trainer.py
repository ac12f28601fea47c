"""Supervised fine-tuning, on `transformers.Trainer`."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers import Trainer as TransformersTrainer

from mossrlhf.data import SFTCollator, require_fitting_prompts, require_records
from mossrlhf.options import check_range


class SFTTrainer(TransformersTrainer):
    """Train on the responses of ``prompt``/``response`` records, or on whole ``text``s.

    The loss is that of the next token. Everything else, including resuming and sharding, is
    `transformers.Trainer`'s.

    Args:
        model: a causal language model.
        args: transformers' arguments. ``remove_unused_columns`` has no effect: records are
            tokenized when a batch is collated.
        train_dataset: records as `mossrlhf.data.load_sft` returns them: a `datasets.Dataset`, or
            a sequence of dicts.
        processing_class: the tokenizer, with a chat template if prompts are messages.
        eval_dataset: evaluation records, or a dict of several such datasets by name.
        max_length: limit for prompt and response together, in tokens; None for no limit.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: if a prompt without its oldest turns leaves no room for a response, or a
            dataset is empty.
        TypeError: if a dataset is a path, or holds anything but dicts.

    Source: P1 §4.1 (the SFT model).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: Any = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        _require_records("train_dataset", train_dataset)
        parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for part in parts:
            _require_records("eval_dataset", part)
        check_range("SFTTrainer", "max_length", max_length, 2)
        room = None if max_length is None else max_length - 1  # beside one token of the response
        require_fitting_prompts(train_dataset, processing_class, room)
        require_fitting_prompts(eval_dataset, processing_class, room, name="eval_dataset")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=SFTCollator(processing_class, max_length=max_length),
            **kwargs,
        )

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(
        self, data_collator: Any, description: str | None = None
    ) -> Any:
        return data_collator


def _require_records(name: str, dataset: Any) -> None:
    """Refuse anything but a dataset; a stream cannot be checked before training."""
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if indexed or isinstance(dataset, Path):
        require_records(dataset, name, prompts=False, reader="load_sft")
