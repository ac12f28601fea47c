"""Supervised fine-tuning, on `transformers.Trainer`."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers import Trainer as TransformersTrainer

from mossrlhf.data import SFTCollator, require_fitting_prompts, require_records
from mossrlhf.options import check_range


class SFTTrainer(TransformersTrainer):
    """Next-token loss on the responses of ``prompt``/``response`` records, or on whole ``text``s.

    Everything else, resuming and sharding included, is `transformers.Trainer`'s.

    Args:
        model: a causal language model.
        args: of transformers. Its ``remove_unused_columns`` is passed over: records are tokenized
            when a batch is made of them.
        train_dataset: records as `mossrlhf.data.load_sft` returns them: a `datasets.Dataset`, or
            a sequence of dicts.
        processing_class: the tokenizer, with a chat template where prompts are messages.
        eval_dataset: more of them, or a dict of several by name.
        max_length: of prompt and response together, in tokens; None for no limit.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        ValueError: where a prompt leaves no room for a response, whatever is dropped of it, or a
            dataset is empty.
        TypeError: where a dataset is a path, or holds anything but dicts.

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
        room = None if max_length is None else max_length - 1  # beside a token of the response
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
    """Refuse what is no dataset; of a stream nothing can be said beforehand."""
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if indexed or isinstance(dataset, Path):
        require_records(dataset, name, prompts=False, reader="load_sft")
