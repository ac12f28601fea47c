"""`Trainer`: Algorithm 1 of P1."""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from mossrlhf.checkpoint import no_progress_bars
from mossrlhf.critic_evaluation import CriticEvaluation, evaluate_critic
from mossrlhf.data import require_records
from mossrlhf.evaluation import compare, own_randomness
from mossrlhf.kernels import backend
from mossrlhf.leaving import keep_fault
from mossrlhf.loading.critic import lent_base
from mossrlhf.loading.policy import as_reference, count_parameters, save_policy
from mossrlhf.metrics import distinct_2, rollout_metrics
from mossrlhf.models import token_path
from mossrlhf.processes import together
from mossrlhf.returned import as_scores
from mossrlhf.rewards import RewardSet
from mossrlhf.run import Run
from mossrlhf.sharding import whole
from mossrlhf.stages import Stages
from mossrlhf.types import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Dataset = Sequence[Mapping[str, Any]]


class Trainer(Stages):
    """PPO-max: collect → score → annotate → estimate → update, each a method to override.

    Its arguments are those of `Stages`: ``model``, ``reward`` and ``train_dataset``, and whatever
    of ``critic``, ``ref_model``, ``args``, ``eval_dataset``, ``ptx_dataset``,
    ``processing_class``, ``peft_config``, ``generation_config``, ``shaper``, ``advantage``,
    ``loss``, ``sampler``, ``accelerator`` and ``callbacks`` is wanted.

    Source: P1 Algorithm 1.
    """

    def _ready(self, callbacks: Sequence[TrainerCallback]) -> None:
        self.run = Run(self, callbacks)
        self.engine.keep_fault = partial(keep_fault, self.run)
        self._references: deque[tuple[Any, Rollout]] = deque(maxlen=4)

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None
    ) -> list[dict[str, Any]]:
        """Train until `TrainerConfig.total_steps`, or go on to there.

        Ctrl-C stops after the iteration at hand and leaves everything usable; pressed again it
        stops at once. SIGTERM does the same, and then ends the process. docs/faults.md has the
        rest of what may come in between.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True for the newest in `output_dir`.

        Returns:
            `history`: one dict of metrics for each logged iteration.

        Raises:
            FloatingPointError: where a loss or gradient is not finite.
            ValueError: where the checkpoint is not of this trainer.
            PeerError: where another process has failed or is gone.
            SystemExit: with 143, after SIGTERM, where the script has no handler of its own for it.

        Source: P1 Algorithm 1.
        """
        run = self.run
        with run.session(resume_from_checkpoint):
            self.pretrain_critic()
            while not run.finished:
                run.begin_step()
                rollout = run.timed(self.collect)
                rollout = run.timed(self.score, rollout)
                rollout = run.timed(self.annotate, rollout)
                rollout = run.timed(self.estimate, rollout)
                run.begin_update()
                metrics = run.timed(self.update, rollout)
                run.end_step(rollout, metrics)
        return self.history

    def pretrain_critic(self, steps: int | None = None) -> list[dict[str, float]]:
        """Let the critic alone learn the value of the policy as it is.

        The value loss is not clipped meanwhile, and the policy's optimizer and schedule rest.

        Args:
            steps: iterations; None for those of `TrainerConfig.critic_pretrain_steps` that
                have not been taken yet.

        Returns:
            metrics of each iteration.

        Source: P1 §5.3.1 (critic pre-training). Its figure 8 trains "until it approaches zero".
        """
        history: list[dict[str, float]] = []
        if self.critic is None:
            return history
        for _ in self.run.pretraining(steps):
            rollout = self.run.timed(self.collect)
            for stage in (self.score, self.annotate, self.estimate):
                rollout = self.run.timed(stage, rollout)
            self.run.begin_update()
            # Not `self.update`: what a subclass adds to it belongs to PPO, and may take no roles.
            metrics = super().update(rollout, ("critic",), self.loss.without_value_clip())
            history.append(metrics)
            self.run.end_pretraining_step(metrics)
        return history

    def step(
        self, rollout: Rollout, scores: Sequence[float] | Tensor | None = None
    ) -> dict[str, float]:
        """Learn from responses of one's own drawing: the stages after `collect` in one call.

        Args:
            rollout: B responses, as `collect` or a sampler returns them.
            scores: ``[B]``; None to ask the rewards.

        Returns:
            the metrics of `update`.

        Raises:
            ValueError: where there are not B scores, or not all are finite numbers.
        """
        if scores is None:
            rollout = self.score(rollout)
        else:
            given = as_scores(scores, rollout)
            if given.shape != (len(rollout),):
                raise ValueError(
                    f"scores: got {tuple(given.shape)}, expected one for each of the "
                    f"{len(rollout)} responses"
                )
            if not bool(torch.isfinite(given).all()):
                raise ValueError(f"scores: got {given.tolist()}, expected finite numbers")
            rollout = replace(rollout, scores=given)
        return self.update(self.estimate(self.annotate(rollout)))

    def evaluate(
        self, eval_dataset: Dataset | None = None, rewards: Any = None
    ) -> dict[str, float]:
        """Answer held-out prompts with policy and reference, and let rewards compare them.

        The training run is not disturbed: evaluation has random numbers of its own, and the
        reference's answers stay the same from one evaluation to the next.

        Args:
            eval_dataset: records; None for the trainer's.
            rewards: any rewards, trained ones or not; None for the trainer's.

        Returns:
            for each reward its mean on both sides, win, tie and lose rate; KL, perplexity,
            length and variety of the policy's answers. Names begin with ``eval/``.

        Raises:
            ValueError: where there is nothing to evaluate on.
            TypeError: where its records are no dicts.

        Source: P1 §5.5.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is not None:
            require_records(eval_dataset, "eval_dataset")
        if dataset is None or len(dataset) < self.accelerator.num_processes:
            raise ValueError(
                "eval_dataset: there is none, or fewer records than processes; pass one to "
                "Trainer(eval_dataset=) or to evaluate()"
            )
        if rewards is None:
            return self._compare(dataset, self.rewards)
        with lent_base(self.policy) as base:
            judges = self._reward_set(rewards, base).to(self.accelerator.device)
            return self._compare(dataset, judges)

    def _compare(self, dataset: Dataset, judges: RewardSet) -> dict[str, float]:
        ours = self.answer(dataset)
        theirs = self.answer(dataset, reference=True)
        ours = self.annotate(ours)
        described = rollout_metrics(ours, self.engine.reduce)
        metrics = {f"eval/{name}": value for name, value in described.items()}
        with together(self.accelerator), self._at_work(*judges.models()):
            scores = judges(ours)[2], judges(theirs)[2]
        metrics.update(compare(*scores, self.engine.reduce))
        return metrics

    def evaluate_critic(self, dataset: Dataset | None = None, **options: Any) -> CriticEvaluation:
        """Hold the critic's values against Monte-Carlo continuations of the same states.

        Args but ``trainer``: those of `evaluate_critic`. The training run is not disturbed.
        """
        return evaluate_critic(self, dataset, **options)

    def answer(self, dataset: Dataset, reference: bool = False) -> Rollout:
        """Draw an answer to every prompt of a dataset, with random numbers of their own.

        Args:
            dataset: records with ``prompt``.
            reference: whether the reference answers, or the policy. The reference's answers to
                the last few datasets are kept.

        Returns:
            this process's share of the answers, in order.
        """
        if not reference:
            return self._answer(dataset, reference)
        # Known by the prompts and who draws: either may have been changed in between.
        prompts = repr([dict(dataset[i])["prompt"] for i in range(len(dataset))]).encode()
        asked = hashlib.blake2b(prompts).digest(), self.sampler
        for known, answers in self._references:
            if known[0] == asked[0] and known[1] is asked[1]:
                return answers
        self._references.append((asked, self._answer(dataset, reference)))
        return self._references[-1][1]

    def _answer(self, dataset: Dataset, reference: bool) -> Rollout:
        accelerator = self.accelerator
        mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        records = [dict(dataset[i]) for i in mine]
        size = max(1, self.args.rollout_size // accelerator.num_processes)
        parts = [records[start : start + size] for start in range(0, len(records), size)]
        lent = as_reference(self.ref_model, self.policy) if reference else nullcontext(self.policy)
        # Processes may have different numbers of parts: the weights are lent for all of them.
        with own_randomness(self.args.seed), lent as model, self._at_work(model):
            return Rollout.concat([self._respond(model, self._encode(p)) for p in parts])

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of every logged iteration and evaluation, in order."""
        return self.run.state.log_history

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw the curves that tell whether PPO works.

        Args:
            path: where to write the picture; None to return the figure alone.

        Raises:
            ImportError: without matplotlib; it says what to install.

        Source: P1 figures 4 and 9.
        """
        from mossrlhf.plotting import plot_history

        return plot_history(self.history, path)

    def reference_distinct_2(self) -> float:
        """Return distinct-2 of as many of the reference's answers as a rollout has."""
        dataset, copies = self.prompts.dataset, self.args.samples_per_prompt
        size = self.args.rollout_size // copies
        records = [dict(dataset[i % len(dataset)]) for i in range(size) for _ in range(copies)]
        answers = self._answer(records, reference=True).completions()
        shares = torch.tensor([distinct_2(answers), 1.0], device=self.accelerator.device)
        total, processes = self.engine.reduce(shares).tolist()
        return total / processes

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write ``policy/`` (with the tokenizer) and ``critic/``, as transformers loads them.

        Args:
            output_dir: folder; None for `TrainerConfig.output_dir`.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        main = self.accelerator.is_main_process
        with whole(main, self.model), no_progress_bars():
            if not main:
                return
            save_policy(self.policy, folder / "policy")
            self.processing_class.save_pretrained(folder / "policy")
            if self.critic is not None:
                self.critic.save_pretrained(folder / "critic", scores=False)
                self.processing_class.save_pretrained(folder / "critic")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload policy and tokenizer to the hub.

        Args:
            repo_id: ``owner/name``.
            kwargs: passed to ``PreTrainedModel.push_to_hub``.
        """
        main = self.accelerator.is_main_process
        with whole(main, self.model):
            if main:
                self.policy.push_to_hub(repo_id, **kwargs)  # type: ignore[operator]
                self.processing_class.push_to_hub(repo_id, **kwargs)

    def __repr__(self) -> str:
        return describe(self)


def describe(trainer: Trainer) -> str:
    """Lay out every object and number in force.

    Args:
        trainer: any.

    Source: ours.
    """
    accelerator = trainer.accelerator
    lines = [
        f"{type(trainer).__name__} on {accelerator.num_processes} x {accelerator.device}, "
        f"mixed precision {accelerator.mixed_precision}",
        f"policy:     {count_parameters(trainer.policy)}",
        f"critic:     {count_parameters(trainer.critic)}",
        f"reference:  {count_parameters(trainer.ref_model)}",
        f"scoring:    {_scoring(trainer)}",
        f"rewards:    {', '.join(f'{n} x {w:g}' for n, w in trainer.rewards.weights.items())}",
        f"prompts:    {len(trainer.prompts.dataset)}, at most {trainer.max_prompt_length} tokens",
    ]
    for name in ("sampler", "shaper", "advantage", "loss", "args"):
        part = getattr(trainer, name)
        lines.append(f"{name}: {type(part).__name__}")
        if is_dataclass(part):
            shown = {spec.name: getattr(part, spec.name) for spec in fields(part)}
            # Of a sampler the config in force is shown, not the one it was made of.
            shown.pop("generation_config", None)
            effective = shown.pop("effective", None)
            if effective is not None:
                shown |= effective.to_diff_dict()
            lines += [f"    {key} = {value!r}" for key, value in shown.items()]
    return "\n".join(lines)


def _scoring(trainer: Trainer) -> str:
    """How tokens are scored, by whom, and how the gradient of their loss is made."""
    path, chosen = token_path(trainer.policy), backend(trainer.accelerator.device)
    if not path.by_hidden:
        return f"by whole logits, since {path.reason}"
    why = trainer.engine.why_not_fused(trainer.loss)
    if why is None and "as a module" in path.reason:
        why = "a module is run twice"
    units = "three matrix units" if why is None else f"four matrix units, since {why}"
    return f"{path.reason}; {units}; by {chosen.name}, since {chosen.reason}"
