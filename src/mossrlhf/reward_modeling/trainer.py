"""`RewardTrainer`: reward-model training on the `Trainer` of transformers."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import seed_worker

from mossrlhf.data import (
    PairCollator,
    TokenBatches,
    TokenBatchSampler,
    require_fitting_prompts,
    require_records,
)
from mossrlhf.loading.policy import disable_dropout as without_dropout
from mossrlhf.models import SCORE_MOMENTS, RewardModel, add_adapters
from mossrlhf.reward_modeling.pairs import (
    PairModel,
    PairRewards,
    PairwiseCollator,
    RankingLoss,
    count_tokens,
    denominators,
    set_moments,
)
from mossrlhf.reward_modeling.report import RewardReport

GROUPS = 4  # of similar length, in which a batch by token count is computed


class RewardTrainer(Trainer):
    """Train a reward model on preference pairs, on transformers' `Trainer`.

    Schedules, resuming, evaluation, the best checkpoint, early stopping, trackers and sharding
    are those of `Trainer`, set by plain `TrainingArguments`. The loss is divided by the pairs and
    tokens of a whole optimizer step, so micro-batches and processes only change the speed. Trained
    parameters in half precision become float32 (``bf16=True`` computes in bfloat16).

    `evaluate` reports accuracy (ties count half), loss, margin (mean of r_w − r_l), and mean and
    standard deviation of the rewards. It keeps the last two in the model's configuration, where
    PPO's normalization reads them (`RunningMoments.of_reward_model`). `report` adds plots.
    ``predict(pairs).predictions`` is ``[N, 2]``, the rewards.

    Args:
        model: the `RewardModel`, trained in place, or its folder or hub name.
        args: transformers' arguments; None for their defaults.
        processing_class: the tokenizer; it is saved with the model.
        train_dataset: records of ``prompt``, ``chosen``, ``rejected`` (`data.load_pairs`): a
            `datasets.Dataset`, or a sequence of dicts.
        eval_dataset: the same, or a dict of several by name.
        data_collator: from records to what `PairCollator` returns; None for
            ``PairCollator(processing_class)``, without a limit of length.
        batches: batches by token count instead of ``per_device_train_batch_size`` pairs each; an
            optimizer step takes ``gradient_accumulation_steps`` of them. The sequences of a batch
            are computed in a few groups of similar length.
        loss: the loss; None for ``RankingLoss()``.
        lm_head: the language model's output head, for ``lm_coef``: copied, and trained too. None
            without such a term, or if the configuration ties the output embeddings to the input
            embeddings, which are then used.
        margin_column: the column of margins m(x), in units of reward; None for no margin.
            Evaluation records may lack it.
        smoothing_column: the column of α, in place of the loss's α; likewise.
        peft_config: LoRA or another adapter in the backbone; the base is then frozen, and
            checkpoints hold the adapters and the value head only. `save_model` merges the adapters.
        disable_dropout: whether to train without the dropout of the configuration.
        callbacks: transformers' callbacks (`EarlyStoppingCallback` …).
        optimizers: optimizer and schedule; None each for those of `args`.

    Raises:
        TypeError: if the model is not a `RewardModel`.
        ValueError: if records lack a column or room for a response, the tokenizer has more
            tokens than the model, or a language-model term and its head do not come together.

    Source: P1 §3.1, §4.2 (it uses a learning rate of 5e-6, 10 % of warm-up, one epoch).
    """

    data_collator: Any

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
        _check_arguments(args, loss, batches)
        self.loss = loss or RankingLoss()
        self.batches = batches
        self._statistics: dict[str, Tensor] = {}  # summed since they were last logged
        self._adapters_only = False
        collator = PairwiseCollator(
            data_collator or PairCollator(processing_class), margin_column, smoothing_column
        )
        _check_dataset(collator, "train_dataset", train_dataset)
        _check_dataset(replace(collator, optional=True), "eval_dataset", eval_dataset)
        reward_model = _load_model(model, processing_class, peft_config)
        if disable_dropout:
            without_dropout(reward_model)
        head = _output_head(reward_model, lm_head, self.loss)
        super().__init__(
            model=PairModel(reward_model, head, groups=1 if batches is None else GROUPS),
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )
        if peft_config is not None and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "peft_config: merging adapters needs full weights, and FSDP and "
                "DeepSpeed's stage 3 shard them; use DDP or stage 2, or train without adapters"
            )

    @property
    def reward_model(self) -> RewardModel:
        """The model in training."""
        return self._pair_model.reward_model

    @property
    def _pair_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the rewards' moments of earlier evaluations are cleared.

        Args: those of `Trainer`, in ``args`` and ``kwargs``.
        """
        set_moments(self.reward_model.config, {})
        return super().train(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Return the batches of an optimizer step, and ``[2]`` pairs and tokens to divide by.

        Args: those of `Trainer`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(2, device=device)
        for batch in batches:
            counts += denominators(count_tokens(batch["chosen_labels"])).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Float[Tensor, "2"] | None = None,
    ) -> Any:
        """Return this micro-batch's part of the loss, times the number of processes.

        Args: those of `Trainer`; ``num_items_in_batch`` is ``[2]`` pairs and tokens of the step.

        Raises:
            FloatingPointError: if a reward or log-probability is not finite.
        """
        pairs = self._compute_pairs(model, inputs)
        broken = ~torch.isfinite(pairs.chosen + pairs.rejected + pairs.nll)
        if broken.any():
            text = self.processing_class.decode(inputs["input_ids"][broken][0, 0])
            raise FloatingPointError(
                f"step {self.state.global_step}: rewards or log-probabilities of "
                f"{int(broken.sum())} pairs are not finite; the step was not taken. The first: "
                f"{text[:200]!r}"
            )
        output = self.loss(pairs, num_items_in_batch)
        loss = output.loss
        if num_items_in_batch is not None:
            share = len(broken) / num_items_in_batch[0]  # adds up to 1 over a step
            for name, value in {**output.stats, "steps": share}.items():
                self._statistics[name] = self._statistics.get(name, 0) + value
            loss = loss * self.accelerator.num_processes  # which average their gradients
        return (loss, pairs) if return_outputs else loss

    def _compute_pairs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> PairRewards:
        labels = inputs["chosen_labels"]
        used = labels if self.loss.lm_coef is not None else None
        rewards, nll = model(inputs["input_ids"], inputs["attention_mask"], used)
        chosen, rejected = rewards.unbind(1)
        tokens = count_tokens(labels)
        return PairRewards(chosen, rejected, inputs["margin"], nll, tokens, inputs["smoothing"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and with the training loss the mean of its statistics since it was last logged.

        Args: those of `Trainer`, ``logs`` and ``start_time``.
        """
        if "loss" in logs and self._statistics:
            stacked = torch.stack(list(self._statistics.values()))
            sums = self.accelerator.reduce(stacked, "sum").tolist()
            means = dict(zip(self._statistics, sums, strict=True))
            steps = means.pop("steps")
            logs = {**logs, **{name: value / steps for name, value in means.items()}}
        if "loss" in logs or "train_loss" in logs:
            self._statistics = {}
        super().log(logs, start_time)

    # Batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, by token count if `batches` is given.

        Raises:
            ValueError: if `batches` is given and the number of pairs is unknown.
        """
        if self.batches is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import DataLoaderShard

        dataset, args = self.train_dataset, self.args
        if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
            raise ValueError(
                f"train_dataset: got a {type(dataset).__name__}, expected a dataset with a length, "
                "to batch it by token count; leave batches=None, or read it first"
            )
        quiet = args.disable_tqdm or not self.is_world_process_zero()
        sampler = TokenBatchSampler(
            self.data_collator.lengths(dataset, quiet),
            self.batches,
            seed=args.seed if args.data_seed is None else args.data_seed,
            processes=args.world_size,
            process=args.process_index,
        )
        workers = args.dataloader_num_workers
        # Not `accelerator.prepare`: the sampler has already shared the batches among processes.
        return DataLoaderShard(
            dataset,
            device=self.accelerator.device,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the batches of an evaluation, whose records may lack margins and α.

        Args: those of `Trainer`, ``eval_dataset``.
        """
        with self._columns_optional():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of `predict`, whose records may lack margins and α.

        Args: those of `Trainer`, ``test_dataset``.
        """
        with self._columns_optional():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _columns_optional(self) -> Iterator[None]:
        collator = self.data_collator
        self.data_collator = replace(collator, optional=True)
        try:
            yield
        finally:
            self.data_collator = collator

    # `Trainer` would remove the columns that the collator reads.
    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return dataset

    def _get_collator_with_removed_columns(self, data_collator: Any, *_: Any, **__: Any) -> Any:
        return data_collator

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Float[Tensor, "P 6"], None]:
        """Return the `PairRewards` of a batch as ``[P, 6]``; `evaluation_loop` computes the loss.

        Args: those of `Trainer`; the last two have no effect.
        """
        with torch.no_grad(), self.compute_loss_context_manager():
            pairs = self._compute_pairs(model, self._prepare_inputs(inputs))
        return None, torch.stack(pairs, dim=1), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Compute metrics over all pairs at once, so that batches only change the speed.

        Args: those of `Trainer`; ``prediction_loss_only`` and ``ignore_keys`` have no effect.

        Returns:
            predictions ``[N, 2]``, the rewards of chosen and rejected, and the metrics.
        """
        output = super().evaluation_loop(
            dataloader, description, False, ignore_keys, metric_key_prefix
        )
        rows = output.predictions
        rows = np.concatenate(rows) if isinstance(rows, list) else rows
        metrics = self.pair_metrics(PairRewards(*torch.tensor(rows).double().unbind(1)))
        if metric_key_prefix == self._first_evaluation:
            set_moments(self.reward_model.config, metrics)
        for name, value in metrics.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output._replace(predictions=rows[:, :2])

    @property
    def _first_evaluation(self) -> str:
        """Prefix of the metrics of the evaluation set whose moments the configuration keeps."""
        several = isinstance(self.eval_dataset, Mapping) and len(self.eval_dataset) > 0
        return f"eval_{next(iter(self.eval_dataset))}" if several else "eval"

    def pair_metrics(self, pairs: PairRewards) -> dict[str, float]:
        """Return the metrics of `evaluate` by name, of all ``pairs``, ``[N]`` each, float64."""
        output = self.loss(pairs)
        both = torch.cat([pairs.chosen, pairs.rejected])
        moments = {"score_mean": both.mean(), "score_std": both.std(correction=0)}
        metrics = {"loss": output.loss, **output.stats, **moments}
        return {name: value.item() for name, value in metrics.items()}

    def report(self, dataset: Any = None) -> RewardReport:
        """Measure how well the model distinguishes chosen from rejected responses.

        Args:
            dataset: pairs; None for `eval_dataset`.

        Returns:
            a report to print, plot and save.

        Raises:
            ValueError: if there is no dataset, or there are several.

        Source: P1 §4.3, figures 2 and 3.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None or isinstance(dataset, Mapping):
            raise ValueError(
                "dataset: got none to report on, or several; pass one: report(pairs), or "
                "RewardTrainer(eval_dataset=pairs)"
            )
        rewards = torch.tensor(self.predict(dataset).predictions)
        return RewardReport.of(rewards, self.state.log_history, self._first_evaluation)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as transformers' classifiers are, adapters merged, to ``output_dir``."""
        self._adapters_only = _internal_call  # in checkpoints, which `_save` cannot tell
        super().save_model(output_dir, _internal_call)
        self._adapters_only = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self._pair_model.save(folder, state_dict, adapters_only=self._adapters_only)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._pair_model.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._pair_model.load(Path(self.state.best_model_checkpoint))
            return
        super()._load_best_model()  # loads weights only; the log has the moments
        prefix, best = f"{self._first_evaluation}_", self.state.best_global_step
        for entry in self.state.log_history:
            if entry["step"] == best and f"{prefix}{SCORE_MOMENTS[0]}" in entry:
                found = {name: entry[f"{prefix}{name}"] for name in SCORE_MOMENTS}
                set_moments(self.reward_model.config, found)


def _check_arguments(args: Any, loss: Any, batches: Any) -> None:
    """Refuse arguments of another type, and label smoothing meant for tokens."""
    expected = {"args": TrainingArguments, "loss": RankingLoss, "batches": TokenBatches}
    for (name, kind), value in zip(expected.items(), (args, loss, batches), strict=True):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got {value!r:.60}, expected a {kind.__name__}")
    if args is not None and args.label_smoothing_factor:
        raise ValueError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, which is for "
            "labels of tokens; use loss=RankingLoss(label_smoothing=)"
        )


def _check_dataset(rows: PairwiseCollator, name: str, dataset: Any) -> None:
    """Collate the first record and try the longest prompts, to raise errors before training."""
    collator = rows.collator
    several = isinstance(dataset, Mapping) and name == "eval_dataset"
    for part in dataset.values() if several else [dataset]:
        if part is None or isinstance(part, IterableDataset):
            continue
        require_records(part, name, prompts=False, reader="load_pairs")
        try:
            rows([part[0]])
        except ValueError as error:
            raise ValueError(f"{name}[0]: {error}") from error
    if isinstance(collator, PairCollator) and collator.max_length is not None:
        room = collator.max_length - 1  # beside one token of the response
        require_fitting_prompts(dataset, collator.tokenizer, room, name=name)


def _load_model(
    model: nn.Module | str | Path, tokenizer: PreTrainedTokenizerBase, peft_config: Any = None
) -> RewardModel:
    """Return the reward model with its adapters added and trained parameters in float32."""
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


def _output_head(
    model: RewardModel, lm_head: nn.Module | None, loss: RankingLoss
) -> nn.Module | None:
    """Return a copy of the output head for the language-model term; None if it needs none."""
    if loss.lm_coef is None and lm_head is not None:
        raise ValueError(
            "lm_head: loss.lm_coef is None, so the head would not be trained; set "
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
