"""What a `RewardTrainer` is made of, looked at before anything is trained."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from mossrlhf.data import PairCollator, TokenBatches, require_fitting_prompts, require_records
from mossrlhf.models import RewardModel, add_adapters
from mossrlhf.reward_trainer.pairs import PairRows, RankingLoss


def load_model(
    model: nn.Module | str | Path, tokenizer: PreTrainedTokenizerBase, peft_config: Any = None
) -> RewardModel:
    """Return the reward model, fit to be trained on what the tokenizer makes.

    Args:
        model: the `RewardModel`, or its folder or hub name.
        tokenizer: what is read with.
        peft_config: adapters to put inside; None for none.

    Raises:
        TypeError: where it is no reward model.
        ValueError: where it cannot read all tokens, or cannot take the adapters.

    Source: ours.
    """
    if isinstance(model, (str, Path)):
        model = RewardModel.from_pretrained(model)
    if not isinstance(model, RewardModel):
        raise TypeError(
            f"model: got a {type(model).__name__}, expected a RewardModel; make one of a language "
            "model with RewardModel.from_language_model(model)"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"processing_class: it has {len(tokenizer)} tokens, the model's vocabulary only "
            f"{vocabulary}; use the tokenizer the model was trained with, or call "
            "model.backbone.resize_token_embeddings(len(tokenizer)) first"
        )
    if peft_config is not None:
        add_adapters(model, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model


def output_head(
    model: RewardModel, lm_head: nn.Module | None, loss: RankingLoss
) -> nn.Module | None:
    """Return the output head that the language-model term trains; None where it needs none.

    Args:
        model: whose configuration may tie it to the input embeddings.
        lm_head: the language model's, which is copied.
        loss: has such a term, or has not.

    Raises:
        ValueError: where there is a term without a head, or a head without a term.

    Source: P1 eq. 2.
    """
    if loss.lm_coef is None and lm_head is not None:
        raise ValueError(
            "lm_head: loss.lm_coef is None, so it has nothing to learn; set "
            "loss=RankingLoss(lm_coef=1.0), or leave the head out"
        )
    if lm_head is not None:
        return copy.deepcopy(lm_head).float()
    if loss.lm_coef is not None and not getattr(model.config, "tie_word_embeddings", False):
        raise ValueError(
            f"lm_head: got None, but RankingLoss(lm_coef={loss.lm_coef}) needs an output head, and "
            f"a {type(model.config).__name__} does not tie it to the input embeddings; pass "
            "lm_head=language_model.get_output_embeddings()"
        )
    return None


def check_arguments(args: Any, loss: Any, batches: Any) -> None:
    """Refuse arguments of another type, and a smoothing that is not of pairs.

    Args:
        args: of transformers.
        loss: what is minimized.
        batches: by token count.

    Raises:
        TypeError: where one is neither None nor of its type.
        ValueError: where `args` ask to smooth labels of tokens.

    Source: ours.
    """
    expected = {"args": TrainingArguments, "loss": RankingLoss, "batches": TokenBatches}
    for (name, kind), value in zip(expected.items(), (args, loss, batches), strict=True):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got {value!r:.60}, expected a {kind.__name__}")
    if args is not None and args.label_smoothing_factor:
        raise ValueError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, which is for "
            "labels of tokens; use loss=RankingLoss(label_smoothing=)"
        )


def check_records(rows: PairRows, **datasets: Any) -> None:
    """Try the first record of each dataset, and its longest prompts: an error now, not later.

    Args:
        rows: what is to be made of records.
        datasets: by the name of the argument they were given as.

    Raises:
        ValueError: where a record lacks a column, or room for a response.

    Source: ours.
    """
    collator = rows.collator
    for name, dataset in datasets.items():
        several = isinstance(dataset, Mapping) and name == "eval_dataset"
        for part in dataset.values() if several else [dataset]:
            if part is None or isinstance(part, IterableDataset):
                continue
            require_records(part, name, prompts=False, reader="load_pairs")
            if isinstance(collator, PairCollator):
                _check_texts(name, part[0])
            rows([part[0]])
        if isinstance(collator, PairCollator) and collator.max_length is not None:
            room = collator.max_length - 1  # beside a token of the response
            require_fitting_prompts(dataset, collator.tokenizer, room, name=name)


def _check_texts(name: str, record: Mapping[str, Any]) -> None:
    answers = (record.get("chosen"), record.get("rejected"))
    if "prompt" not in record or not all(isinstance(answer, str) for answer in answers):
        columns = {key: type(value).__name__ for key, value in record.items()}
        raise ValueError(
            f"{name}: its first record has {columns}, expected prompt, and chosen and rejected of "
            "type str (the responses alone); read it with data.load_pairs"
        )
