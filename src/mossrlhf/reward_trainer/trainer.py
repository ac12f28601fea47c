"""`RewardTrainer`: what a reward model adds to the trainer of transformers."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from mossrlhf.data import PairCollator, require_fitting_prompts
from mossrlhf.models import RewardModel
from mossrlhf.reward_trainer.pairs import (
    PairModel,
    PairRows,
    PairScores,
    RankingLoss,
    count_tokens,
    totals,
)

LM_HEAD = Path("lm_head") / "model.safetensors"
"""Where a folder keeps the output head: out of the way of tools that load a classifier."""


class RewardTrainer(Trainer):
    """Trains a reward model on preference pairs, on transformers' `Trainer`.

    Schedules, resuming, evaluation, the best checkpoint, early stopping, trackers and sharding
    are its, told by plain `TrainingArguments`. The loss is divided by the pairs and tokens of a
    whole optimizer step: micro-batches and processes change nothing but speed. Trained parameters
    in half precision become float32 (compute in it by ``bf16=True``). Dropout is as the model's
    configuration has it.

    `evaluate` reports accuracy (ties count half), loss, margin (mean of r_w − r_l), and mean and
    standard deviation of the scores; ``predict(pairs).predictions`` is ``[N, 2]``, the scores.

    Args:
        model: the `RewardModel`, trained in place, or its folder or hub name.
        args: of transformers; None for its defaults.
        processing_class: the tokenizer; it is saved along.
        train_dataset: records of ``prompt``, ``chosen``, ``rejected`` (`data.load_pairs`): a
            `datasets.Dataset`, or a sequence of dicts.
        eval_dataset: the same, or a dict of several by name.
        data_collator: from records to what `PairCollator` returns; None for
            ``PairCollator(processing_class)``, which knows no limit of length.
        loss: what is minimized; None for ``RankingLoss()``.
        lm_head: the language model's output head, for ``lm_coef``: copied, and trained along.
            None where there is no such term, or where the configuration ties the output
            embeddings to the input embeddings, which then serve.
        margin_column: the records' column of margins m(x), in units of score; None for none.
        callbacks: of transformers (`EarlyStoppingCallback` …).
        optimizers: optimizer and schedule; None each for those `args` ask for.

    Raises:
        TypeError: where the model is not a `RewardModel`.
        ValueError: where records lack a column or room for a response, the tokenizer has more
            tokens than the model, the language-model term has no head, or a head no such term.

    Source: P1 §3.1, §4.2 (its learning rate is 5e-6, after 10 % of warm-up, for one epoch).
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: TrainingArguments | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[..., Mapping[str, Tensor]] | None = None,
        loss: RankingLoss | None = None,
        lm_head: nn.Module | None = None,
        margin_column: str | None = None,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.loss = loss or RankingLoss()
        self._shares: dict[str, Tensor] = {}
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                f"args.label_smoothing_factor: got {args.label_smoothing_factor}, which is for "
                "labels of tokens; use loss=RankingLoss(label_smoothing=)"
            )
        rows = PairRows(data_collator or PairCollator(processing_class), margin_column)
        _check_records(rows, train_dataset=train_dataset, eval_dataset=eval_dataset)
        reward_model = _load(model, processing_class)
        super().__init__(
            model=PairModel(reward_model, _output_head(reward_model, lm_head, self.loss)),
            args=args,
            data_collator=rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )

    @property
    def reward_model(self) -> RewardModel:
        """The model in training."""
        return self.accelerator.unwrap_model(self.model).reward_model

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the batches of an optimizer step, and what its loss is to be divided by.

        Args:
            epoch_iterator: over this process's batches.
            num_batches: how many to take.
            device: of the totals.

        Returns:
            list of batches; ``[2]`` their `totals` over all processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            counts += totals(count_tokens(batch["chosen_labels"])).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Float[Tensor, "2"] | None = None,
    ) -> Any:
        """Return this micro-batch's share of the loss, times the processes averaged over.

        Args:
            model: the `PairModel`, wrapped or not.
            inputs: a batch by `PairRows`, ``[P, ...]`` each.
            return_outputs: whether to return the `PairScores` too.
            num_items_in_batch: ``[2]`` `totals` of the optimizer step; None where this is it.

        Raises:
            FloatingPointError: where a score or log-probability is not finite.
        """
        scores = self._score(model, inputs)
        broken = ~torch.isfinite(scores.chosen + scores.rejected + scores.nll)
        if broken.any():
            text = self.processing_class.decode(inputs["input_ids"][broken][0, 0])
            raise FloatingPointError(
                f"step {self.state.global_step}: scores or log-probability of {int(broken.sum())} "
                f"pairs are not finite; the step was not taken. The first: {text[:200]!r}"
            )
        output = self.loss(scores, num_items_in_batch)
        loss = output.loss
        if num_items_in_batch is not None:
            share = len(broken) / num_items_in_batch[0]  # adds up to 1 over a step
            for name, value in {**output.stats, "steps": share}.items():
                self._shares[name] = self._shares.get(name, 0) + value
            loss = loss * self.accelerator.num_processes
        return (loss, scores) if return_outputs else loss

    def _score(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> PairScores:
        labels = inputs["chosen_labels"]
        asked = labels if self.loss.lm_coef is not None else None
        scores, nll = model(inputs["input_ids"], inputs["attention_mask"], asked)
        chosen, rejected = scores.unbind(1)
        return PairScores(chosen, rejected, inputs["margin"], nll, count_tokens(labels))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Float[Tensor, "P 5"], None]:
        """Return the `PairScores` of a batch as ``[P, 5]``; the loss is that of all batches.

        Args:
            model: the `PairModel`, wrapped or not.
            inputs: a batch by `PairRows`, ``[P, ...]`` each.
            prediction_loss_only: of no effect.
            ignore_keys: of no effect.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = self._score(model, self._prepare_inputs(inputs))
        return None, torch.stack(scores, dim=1), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Score all pairs, and report on all at once: batches change nothing but speed.

        Args:
            dataloader: of batches by `PairRows`.
            description: for the log.
            prediction_loss_only: of no effect.
            ignore_keys: of no effect.
            metric_key_prefix: what the names of the metrics begin with.

        Returns:
            predictions ``[N, 2]``, the scores of chosen and rejected, and the metrics.
        """
        output = super().evaluation_loop(
            dataloader, description, False, ignore_keys, metric_key_prefix
        )
        rows = output.predictions
        rows = np.concatenate(rows) if isinstance(rows, list) else rows
        metrics = self.pair_metrics(PairScores(*torch.tensor(rows).double().unbind(1)))
        for name, value in metrics.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output._replace(predictions=rows[:, :2])

    def pair_metrics(self, scores: PairScores) -> dict[str, float]:
        """Return what `evaluate` reports, by name; override it to report more.

        Args:
            scores: of all N pairs, ``[N]`` each, float64.
        """
        output = self.loss(scores)
        both = torch.cat([scores.chosen, scores.rejected])
        moments = {"score_mean": both.mean(), "score_std": both.std(correction=0)}
        metrics = {"loss": output.loss, **output.stats, **moments}
        return {name: value.item() for name, value in metrics.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the training loss its statistics since it was last logged.

        Args:
            logs: numbers by name.
            start_time: of training.
        """
        if "loss" in logs and self._shares:
            sums = self.accelerator.reduce(torch.stack(list(self._shares.values())), "sum")
            means = dict(zip(self._shares, sums.tolist(), strict=True))
            steps = means.pop("steps")
            logs = {**logs, **{name: value / steps for name, value in means.items()}}
        if "loss" in logs or "train_loss" in logs:
            self._shares = {}
        super().log(logs, start_time)

    # What `remove_unused_columns` asks for is done by the collator, which takes what it needs.
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, *_: Any, **__: Any) -> Any:
        return data_collator

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is None:
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        self.reward_model.save_pretrained(folder, state_dict=_below("reward_model.", state_dict))
        if head := _below("lm_head.", state_dict):
            (folder / LM_HEAD).parent.mkdir(exist_ok=True)
            save_file(head, folder / LM_HEAD)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        """Load what `_save` wrote, every key; transformers would only log what is missing."""
        model = self.accelerator.unwrap_model(self.model)
        model.reward_model.load_state_dict(RewardModel.from_pretrained(folder).state_dict())
        if model.lm_head is not None:
            model.lm_head.load_state_dict(load_file(folder / LM_HEAD))


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load(model: nn.Module | str | Path, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
    """Return the reward model, fit to be trained on what the tokenizer makes."""
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
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    return model


def _output_head(
    model: RewardModel, lm_head: nn.Module | None, loss: RankingLoss
) -> nn.Module | None:
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


def _check_records(rows: PairRows, **datasets: Any) -> None:
    """Try the first record of each dataset, and its longest prompts: an error now, not later."""
    collator = rows.collator
    for name, dataset in datasets.items():
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if isinstance(part, Sized) and len(part):
                record = part[0]  # type: ignore[index]
                if isinstance(collator, PairCollator):
                    _check_texts(name, record)
                rows([record])
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
