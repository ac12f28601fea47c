"""Supervised fine-tuning, on `transformers.Trainer`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers import Trainer as TransformersTrainer

from mossrlhf.data import SFTCollator


class SFTTrainer(TransformersTrainer):
    """Next-token loss on the responses of ``prompt``/``response`` records, or on whole ``text``s.

    Everything else, resuming and sharding included, is `transformers.Trainer`'s.

    Args:
        model: a causal language model.
        args: of transformers. Its ``remove_unused_columns`` is passed over: records are tokenized
            when a batch is made of them.
        train_dataset: records as `mossrlhf.data.load_sft` returns them.
        processing_class: the tokenizer, with a chat template where prompts are messages.
        eval_dataset: more of them.
        max_length: of prompt and response together, in tokens; None for no limit.
        kwargs: further arguments of `transformers.Trainer`.

    Source: P1 §4.1 (the SFT model).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Sequence[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
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
