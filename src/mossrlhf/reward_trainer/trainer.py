"""`RewardTrainer`: what a reward model adds to the trainer of transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from mossrlhf.data import PairCollator, TokenBatches
from mossrlhf.loading.policy import disable_dropout as without_dropout
from mossrlhf.models import SCORE_MOMENTS, RewardModel
from mossrlhf.reward_trainer import storage
from mossrlhf.reward_trainer.loader import PairLoader
from mossrlhf.reward_trainer.pairs import (
    PairModel,
    PairRows,
    PairScores,
    RankingLoss,
    count_tokens,
    totals,
)
from mossrlhf.reward_trainer.parts import check_arguments, check_records, load_model, output_head
from mossrlhf.reward_trainer.report import RewardReport

GROUPS = 4
"""In how many groups the sequences of a batch by token count are computed."""


class RewardTrainer(PairLoader):
    """Trains a reward model on preference pairs, on transformers' `Trainer`.

    Schedules, resuming, evaluation, the best checkpoint, early stopping, trackers and sharding
    are its, told by plain `TrainingArguments`. The loss is divided by the pairs and tokens of a
    whole optimizer step: micro-batches and processes change nothing but speed. Trained parameters
    in half precision become float32 (compute in it by ``bf16=True``).

    `evaluate` reports accuracy (ties count half), loss, margin (mean of r_w − r_l), and mean and
    standard deviation of the scores, which the model's configuration then keeps, for PPO to
    normalize by (`RunningMoments.of_reward_model`); `report` tells more, in pictures.
    ``predict(pairs).predictions`` is ``[N, 2]``, the scores.

    Args:
        model: the `RewardModel`, trained in place, or its folder or hub name.
        args: of transformers; None for its defaults.
        processing_class: the tokenizer; it is saved along.
        train_dataset: records of ``prompt``, ``chosen``, ``rejected`` (`data.load_pairs`): a
            `datasets.Dataset`, or a sequence of dicts.
        eval_dataset: the same, or a dict of several by name.
        data_collator: from records to what `PairCollator` returns; None for
            ``PairCollator(processing_class)``, which knows no limit of length.
        batches: batches by token count, in place of ``per_device_train_batch_size`` pairs each;
            they are micro-batches, of which ``gradient_accumulation_steps`` make a step. Sequences
            of a batch are then computed in a few groups of like length.
        loss: what is minimized; None for ``RankingLoss()``.
        lm_head: the language model's output head, for ``lm_coef``: copied, and trained along.
            None where there is no such term, or where the configuration ties the output
            embeddings to the input embeddings, which then serve.
        margin_column: the records' column of margins m(x), in units of score; None for none.
            Records held out may lack it.
        smoothing_column: likewise of α, in place of the loss's.
        peft_config: LoRA or another adapter inside the backbone; the base is then frozen, and
            checkpoints hold adapters and head alone. `save_model` merges them.
        disable_dropout: whether to train without the dropout that the configuration asks for.
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
        batches: TokenBatches | None = None,
        loss: RankingLoss | None = None,
        lm_head: nn.Module | None = None,
        margin_column: str | None = None,
        smoothing_column: str | None = None,
        peft_config: Any = None,
        disable_dropout: bool = False,
        callbacks: Sequence[Any] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_arguments(args, loss, batches)
        self.loss = loss or RankingLoss()
        self._shares: dict[str, Tensor] = {}
        self._resumable_only = False
        collator = data_collator or PairCollator(processing_class)
        rows = PairRows(collator, margin_column, smoothing_column)
        check_records(rows, train_dataset=train_dataset)
        check_records(replace(rows, optional=True), eval_dataset=eval_dataset)
        reward_model = load_model(model, processing_class, peft_config)
        if disable_dropout:
            without_dropout(reward_model)
        self.batches = batches
        head = output_head(reward_model, lm_head, self.loss)
        super().__init__(
            model=PairModel(reward_model, head, groups=1 if batches is None else GROUPS),
            args=args,
            data_collator=rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )
        if peft_config is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "peft_config: adapters are merged where their weights are whole, and FSDP and "
                "DeepSpeed's stage 3 split them; use DDP or stage 2, or train without adapters"
            )

    @property
    def reward_model(self) -> RewardModel:
        """The model in training."""
        return self.accelerator.unwrap_model(self.model).reward_model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does; moments of the scores before that are forgotten.

        Args:
            args: as it takes them.
            kwargs: likewise.
        """
        storage.set_moments(self.reward_model.config, {})
        return super().train(*args, **kwargs)

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
        tokens = count_tokens(labels)
        return PairScores(chosen, rejected, inputs["margin"], nll, tokens, inputs["smoothing"])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Float[Tensor, "P 6"], None]:
        """Return the `PairScores` of a batch as ``[P, 6]``; the loss is that of all batches.

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
        if metric_key_prefix == self._first_evaluation:
            storage.set_moments(self.reward_model.config, metrics)
        for name, value in metrics.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output._replace(predictions=rows[:, :2])

    @property
    def _first_evaluation(self) -> str:
        """What the metrics of the set begin with whose moments the configuration keeps."""
        several = isinstance(self.eval_dataset, Mapping) and len(self.eval_dataset) > 0
        return f"eval_{next(iter(self.eval_dataset))}" if several else "eval"

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

    def report(self, dataset: Any = None) -> RewardReport:
        """Look closely at how well the model tells good from bad.

        Args:
            dataset: pairs; None for `eval_dataset`.

        Returns:
            what can be printed, drawn and saved.

        Raises:
            ValueError: where there are no pairs to report on.

        Source: P1 §4.3, figures 2 and 3.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None or isinstance(dataset, Mapping):
            raise ValueError(
                "dataset: got none to report on, or several; pass one: report(pairs), or "
                "RewardTrainer(eval_dataset=pairs)"
            )
        scores = torch.tensor(self.predict(dataset).predictions)
        return RewardReport.of(scores, self.state.log_history, self._first_evaluation)

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as transformers' classifiers are written, its adapters merged.

        Args:
            output_dir: folder; None for that of `args`.
        """
        self._resumable_only = _internal_call
        super().save_model(output_dir, _internal_call)
        self._resumable_only = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        storage.write(model, folder, state_dict, resumable_only=self._resumable_only)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            storage.read(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            prefix, best = f"{self._first_evaluation}_", self.state.best_global_step
            for entry in self.state.log_history:  # weights alone were loaded
                if entry["step"] == best and f"{prefix}{SCORE_MOMENTS[0]}" in entry:
                    found = {name: entry[f"{prefix}{name}"] for name in SCORE_MOMENTS}
                    storage.set_moments(self.reward_model.config, found)
        else:
            best = Path(self.state.best_model_checkpoint)
            storage.read(self.accelerator.unwrap_model(self.model), best)
