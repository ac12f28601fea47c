"""The stages before PPO, as the recipes use them: an SFT model and a reward model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from mossrlhf.models import RewardModel
from mossrlhf.reward_modeling.trainer import RewardTrainer
from mossrlhf.sft_trainer import SFTTrainer

Records = Sequence[Mapping[str, Any]]


def training_arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """Arguments of transformers for a short stage that saves nothing by itself.

    Args:
        folder: of its logs.
        options: what differs: learning rate, epochs, batch size, seed.

    Source: ours; Adam's β as in P1.
    """
    settings = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    folder: str | Path,
    max_length: int | None = None,
    **options: Any,
) -> float:
    """Fine-tune a language model on demonstrations, in place.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        records: with ``prompt`` and ``response``.
        folder: of the logs.
        max_length: tokens of prompt and response.
        options: of `training_arguments`.

    Returns:
        the mean training loss, nats per token.

    Source: P1 §4.1.
    """
    args = training_arguments(folder, **options)
    trainer = SFTTrainer(model, args, records, tokenizer, max_length=max_length)
    trainer.remove_callback(_printer())
    output = trainer.train()
    model.eval()
    return float(output.training_loss)


def train_reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Records,
    held_out: Records,
    folder: str | Path,
    max_length: int | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[RewardModel, dict[str, float]]:
    """Train a reward model on preference pairs, from a language model's backbone.

    Args:
        model: the SFT model, which is copied.
        tokenizer: its tokenizer.
        pairs: with ``prompt``, ``chosen``, ``rejected``.
        held_out: more of them, to be reported on.
        folder: of the logs.
        max_length: tokens of prompt and response.
        trainer_options: of `RewardTrainer`: its loss, columns of margins and α.
        options: of `training_arguments`.

    Returns:
        the reward model, and what `RewardTrainer.evaluate` says of the held-out pairs.

    Source: P1 §4.2.
    """
    from mossrlhf.data import PairCollator

    args = training_arguments(folder, **options)
    reward_model = RewardModel.from_language_model(model)
    trainer = RewardTrainer(
        reward_model,
        args,
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=PairCollator(tokenizer, max_length=max_length),
        **(trainer_options or {}),
    )
    trainer.remove_callback(_printer())
    trainer.train()
    metrics = {k.removeprefix("eval_"): float(v) for k, v in trainer.evaluate().items()}
    return reward_model.eval(), metrics


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback
