"""`Trainer`: Algorithm 1 of P1, its five stages and its evaluation."""

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback

from mossrlhf.advantage import AdvantageEstimator
from mossrlhf.checkpoint.folders import require_writable
from mossrlhf.checkpoint.state import RunState
from mossrlhf.config import TrainerConfig
from mossrlhf.critic_evaluation import CriticEvaluation, Stages, evaluate_critic
from mossrlhf.data import (
    PromptBatch,
    SFTCollator,
    Shuffled,
    prompt_batch,
    require_fitting_prompts,
    require_records,
)
from mossrlhf.distributed.deepspeed import make_engine
from mossrlhf.distributed.processes import make_accelerator, together
from mossrlhf.distributed.sharding import on_device, place_frozen, whole
from mossrlhf.kernels import backend
from mossrlhf.loading.critic import lent_base, load_critic, load_rewards
from mossrlhf.loading.policy import (
    count_parameters,
    load_policy,
    load_reference,
    save_policy,
    set_switches,
)
from mossrlhf.loading.tokenizer import (
    load_tokenizer,
    policy_context,
    prompt_budget,
    require_vocabulary,
)
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.metrics import Meter, compare, distinct_2, rollout_metrics
from mossrlhf.minibatches import RolloutBuffer, note, split
from mossrlhf.models import ActorCritic, RewardModel, announce, token_path
from mossrlhf.models.lora import as_reference, vocabulary_size
from mossrlhf.options import strict_init
from mossrlhf.randomness import temporary_seed
from mossrlhf.reward_shaping import RewardShaper
from mossrlhf.rewards import RewardSet, reward_pairs
from mossrlhf.run import Run
from mossrlhf.sampling import HFSampler, Sampler
from mossrlhf.serialization import no_progress_bars
from mossrlhf.shutdown import keep_fault
from mossrlhf.types import Rollout
from mossrlhf.validation import (
    as_scores,
    estimated,
    require_fitting_parts,
    require_parts,
    require_reachable_entropy,
    responses,
    shaped,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Dataset = Sequence[Mapping[str, Any]]


class Trainer:
    """PPO-max: collect → score → annotate → estimate → update, each a method to override.

    The stages pass data on as a `Rollout`; `self` holds models, settings, and how far the run is.

    Args:
        model: the policy: a causal language model, or its folder or hub name.
        reward: a `RewardModel`, any one-label sequence classifier, a folder or hub name, a
            function ``reward(*, prompts, completions, completion_ids, **columns)``, or a list of
            them or of (reward, weight) pairs; weight 0 is measured and never trained on.
        train_dataset: records with ``prompt`` (string or messages); further columns reach the
            reward.
        critic: a `RewardModel`; None for a copy of the reward model where it reads the policy's
            tokens, else the policy's backbone under a zero head; False for none. On the policy's
            own base: a `peft.PeftConfig` for a further adapter, or a `ValueHead` alone.
        ref_model: the reference; None for a copy of the policy as it is now, or, where its
            adapters are new, for the policy with its adapters off.
        args: lengths of the run, sizes of batches, learning rates.
        eval_dataset: held-out records, for `evaluate`.
        ptx_dataset: records of pre-training or SFT data for the PTX term.
        processing_class: the policy's tokenizer; None to load it from the model's name.
        peft_config: LoRA or another adapter; the base is then frozen.
        generation_config: how responses are sampled, where no `sampler` is given.
        shaper: rewards of responses → rewards per token, a `RewardShaper` or any callable; copied
            together with its running moments.
        advantage: rewards and values → advantages and returns.
        loss: what is minimized.
        sampler: samples responses; None for `HFSampler`.
        accelerator: None for one made from `args`.
        callbacks: `transformers.TrainerCallback`s.

    Raises:
        ValueError: where the parts do not fit together; the error says which and what to do.
        TypeError: where one of them is of no use at all.

    Source: P1 Algorithm 1.
    """

    @strict_init
    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        reward: Any,
        train_dataset: Dataset,
        critic: Any = None,
        ref_model: nn.Module | str | Path | None = None,
        args: TrainerConfig | None = None,
        eval_dataset: Dataset | None = None,
        ptx_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        generation_config: GenerationConfig | None = None,
        shaper: RewardShaper | Callable[..., Tensor] | None = None,
        advantage: Any = None,
        loss: PPOMaxLoss | None = None,
        sampler: Sampler | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        require_parts(locals())  # exactly the arguments, so far
        self.args = args or TrainerConfig()
        self.output_dir = Path(self.args.output_dir)
        require_writable(self.output_dir)
        self.accelerator = make_accelerator(self.args, accelerator)
        self.advantage = advantage or AdvantageEstimator()
        self.loss = loss or PPOMaxLoss()
        require_fitting_parts(
            self.args, self.loss, self.advantage, self.accelerator.num_processes,
            critic=critic, ptx_dataset=ptx_dataset, generation_config=generation_config,
            sampler=sampler,
        )  # fmt: skip
        self.processing_class = processing_class or load_tokenizer(model)
        self.sampler = sampler or HFSampler.for_tokenizer(
            self.processing_class, generation_config or GenerationConfig(max_new_tokens=512)
        )
        self.eval_dataset = eval_dataset
        policy = self._load_policy(model, peft_config)
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            require_fitting_prompts(data, self.processing_class, self.max_prompt_length, name=name)
        self.rewards = self._reward_set(reward, policy)
        self.ref_model = load_reference(ref_model, policy)
        critic = load_critic(critic, policy, self.rewards.same_tokenizer(), seed=self.args.seed)
        actor_critic = ActorCritic(policy, critic, self.sampler.temperature)
        set_switches(self.args, actor_critic, self.ref_model)
        self.engine = make_engine(actor_critic, self.args, self.accelerator)
        frozen = (self.ref_model, *self.rewards.models())
        place_frozen(actor_critic, *frozen, device=self.accelerator.device, args=self.args)
        for probed, name in ((policy, "model"), (self.ref_model, "ref_model")):
            with self._on_device(probed):
                announce(probed, name)
        self._collate = SFTCollator(self.processing_class, max_length=policy_context(policy))
        if ptx_dataset is not None:
            self._collate([ptx_dataset[0]])  # fail on a wrong format now, not after the warm-up
        self._references: deque[tuple[Any, Rollout]] = deque(maxlen=4)
        run_state = RunState(
            args=self.args,
            accelerator=self.accelerator,
            engine=self.engine,
            ref_model=self.ref_model,
            reward_models=self.rewards.models(),
            # Copied: one preset may serve several trainers, each with its own running moments.
            shaper=copy.deepcopy(shaper) if shaper is not None else RewardShaper(),
            prompts=self._stream(train_dataset),
            ptx=self._stream(ptx_dataset) if ptx_dataset is not None else None,
            generator=torch.Generator().manual_seed(self.args.seed),
            save_models=lambda folder: self.save_model(folder),
        )
        self.run = Run(
            run_state,
            callbacks,
            self.processing_class,
            eval_dataset,
            evaluate=lambda: self.evaluate(),
            reference_distinct_2=lambda: self.reference_distinct_2(),
        )
        self.engine.keep_fault = partial(keep_fault, run_state)

    def _load_policy(self, model: nn.Module | str | Path, peft_config: Any) -> nn.Module:
        policy = load_policy(model, peft_config, seed=self.args.seed)
        special = getattr(self.sampler, "effective", None)
        require_vocabulary(policy, self.processing_class, special)
        require_reachable_entropy(self.loss, vocabulary_size(policy))
        self.max_prompt_length = prompt_budget(policy, self.args, self.sampler.max_new_tokens)
        return policy

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None
    ) -> list[dict[str, Any]]:
        """Train until `TrainerConfig.total_steps`; called again, continue to there.

        Ctrl-C stops after the current iteration and leaves everything usable; pressed again it
        stops at once. SIGTERM does the same, and then ends the process. docs/faults.md has the
        rest of what may go wrong.

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
        """Train the critic alone on the values of the unchanged policy.

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
            metrics = Trainer.update(self, rollout, ("critic",), self.loss.without_value_clip())
            history.append(metrics)
            self.run.end_pretraining_step(metrics)
        return history

    def step(
        self, rollout: Rollout, scores: Sequence[float] | Tensor | None = None
    ) -> dict[str, float]:
        """Learn from given responses: the stages after `collect` in one call.

        Args:
            rollout: B responses, as `collect` or a sampler returns them.
            scores: ``[B]``; None to call the rewards.

        Returns:
            the metrics of `update`.

        Raises:
            ValueError: where there are not B scores, or not all are finite numbers.
        """
        if scores is None:
            rollout = self.score(rollout)
        else:
            rollout = replace(rollout, scores=as_scores(scores, rollout))
        return self.update(self.estimate(self.annotate(rollout)))

    def collect(self, prompts: PromptBatch | None = None) -> Rollout:
        """Sample responses to the next prompts.

        Args:
            prompts: token ids and columns; None for the next of the training set.

        Returns:
            this process's share of the rollout, nothing scored yet.
        """
        if prompts is None:
            per_process = self.args.rollout_size // self.accelerator.num_processes
            records = self.prompts.next(per_process // self.args.samples_per_prompt)
            prompts = self._encode(records, copies=self.args.samples_per_prompt)
        return self._respond(self.policy, prompts)

    def score(self, rollout: Rollout) -> Rollout:
        """Call the rewards on every response.

        Args:
            rollout: B responses.

        Returns:
            the rollout with `scores` or `token_scores`, and each reward under
            ``extra["reward/<name>"]``.

        Raises:
            ValueError: where a reward function raises or returns the wrong thing.
        """
        self.model.eval()
        with self._on_device(*self.rewards.models()), self.accelerator.autocast():
            scores, token_scores, by_name = self.rewards(rollout)
        extra = {f"reward/{name}": value.float() for name, value in by_name.items()}
        return replace(
            rollout,
            scores=scores,
            token_scores=token_scores,
            extra={**rollout.extra, **extra},
        )

    @torch.no_grad()
    def annotate(self, rollout: Rollout) -> Rollout:
        """Compute log-probs of policy and reference, and values, before any model is updated.

        Args:
            rollout: B responses; results that it has already are overwritten.

        Returns:
            the rollout with `logprobs`, `entropies` and `ref_logprobs`; with `values` if there is
            a critic, and with `bootstrap` if `args.bootstrap_truncated` is set as well.
        """
        self.model.eval()
        noted: dict[str, Tensor] = {}
        groups = split(rollout, self.args.micro_batch_size, self.args.max_tokens)
        with self._on_device(self.ref_model, gather=False):
            for rows in self.engine.in_step(groups):
                self._annotate(rollout, rows, noted)
        return replace(rollout, **noted)  # type: ignore[arg-type]

    def _annotate(self, rollout: Rollout, rows: Tensor, noted: dict[str, Tensor]) -> None:
        part = rollout.select(rows)
        place = rows.to(part.mask.device), rollout.mask.shape
        with self.accelerator.autocast():
            stats = self.model.score(part, entropy=True)
            note(noted, "logprobs", *place, part.mask, stats.logprob)
            note(noted, "entropies", *place, part.mask, stats.entropy)
            with as_reference(self.ref_model, self.policy) as reference:
                ref = self.model.score(part, policy=reference)
            values = self.model.values(part) if self.critic is not None else None
        note(noted, "ref_logprobs", *place, part.mask, ref.logprob)
        if values is not None:
            note(noted, "values", *place, part.states, values[0][part.states])
            if self.args.bootstrap_truncated:
                after = torch.where(part.truncated, values[1], torch.zeros_like(values[1]))
                noted.setdefault("bootstrap", after.new_zeros(len(rollout)))[place[0]] = after

    def estimate(self, rollout: Rollout) -> Rollout:
        """Shape scores into rewards per token, and those into advantages and returns.

        Args:
            rollout: scored and annotated.

        Returns:
            the rollout with `rewards`, `advantages` and `returns`.

        Raises:
            TypeError, ValueError: where shaper or estimator return something else.
        """
        rewards = shaped(self.shaper, rollout, self.engine.reduce)
        found = estimated(self.advantage, rewards, rollout, self.engine.reduce)
        return replace(
            rollout,
            rewards=rewards,
            advantages=found.advantages,
            returns=found.returns,
        )

    def update(
        self,
        rollout: Rollout,
        roles: Sequence[str] = ("critic", "policy"),
        loss: PPOMaxLoss | None = None,
    ) -> dict[str, float]:
        """Train on a rollout: `num_ppo_epochs` times over it, in minibatches.

        Args:
            rollout: estimated.
            roles: which models learn.
            loss: what to minimize; None for `self.loss`.

        Returns:
            metrics over all processes, by name (docs/metrics.md).

        Raises:
            FloatingPointError: where a loss or gradient is not finite.
        """
        loss = loss or self.loss
        self.model.train(self.args.gradient_checkpointing or not self.args.disable_dropout)
        buffer = RolloutBuffer()
        buffer.add(rollout)
        shares, norms = Meter(), Meter()
        size = max(1, self.args.minibatch_size // self.accelerator.num_processes)
        for minibatch in buffer.minibatches(size, self.args.num_ppo_epochs, self.generator):
            ptx = self._ptx_batch(len(minibatch)) if "policy" in roles else None
            done = self.engine.step(minibatch, loss, roles, ptx)
            for role, weight in done.weights.items():
                of_role = {n: v for n, v in done.stats.items() if n.startswith(f"{role}/")}
                shares.add(of_role, weight)
            norms.add(done.norms, torch.ones_like(minibatch.token_weights.sum()))
        self.model.eval()
        rates = {f"{role}/learning_rate": v for role, v in self.engine.learning_rates().items()}
        described = rollout_metrics(rollout, self.engine.reduce)
        return {**described, **shares.compute(self.engine.reduce), **norms.compute(), **rates}

    @property
    def model(self) -> ActorCritic:
        """The trained models, unwrapped."""
        return self.engine.bare

    @property
    def policy(self) -> nn.Module:
        """The policy, unwrapped."""
        return self.model.policy

    @property
    def critic(self) -> RewardModel | None:
        """The critic, unwrapped; None where there is none."""
        return self.model.critic

    @property
    def shaper(self) -> Any:
        """Rewards of responses → rewards per token, with running moments."""
        return self.run.run_state.shaper

    @shaper.setter
    def shaper(self, shaper: Any) -> None:
        self.run.run_state.shaper = shaper

    @property
    def prompts(self) -> Shuffled:
        """The stream of the training set."""
        return self.run.run_state.prompts

    @property
    def ptx(self) -> Shuffled | None:
        """The stream of pre-training data, or None."""
        return self.run.run_state.ptx

    @property
    def generator(self) -> torch.Generator:
        """The order of the minibatches."""
        return self.run.run_state.generator

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics of every logged iteration and evaluation, in order."""
        return self.run.state.log_history

    def _respond(self, model: nn.Module, prompts: PromptBatch) -> Rollout:
        with self._on_device(model):
            rollout = self._sample(self.sampler, model, prompts.ids)
        rollout = replace(rollout, columns=prompts.columns)
        if getattr(self.shaper, "score_after_end", False):
            rollout = rollout.with_end_states(self.sampler.max_new_tokens)
        return rollout

    def _sample(self, sampler: Any, model: nn.Module, ids: Sequence[Sequence[int]]) -> Rollout:
        self.model.eval()
        with self.accelerator.autocast():
            return responses(sampler, model, ids)

    def _on_device(self, *models: nn.Module | None, gather: bool = True) -> Any:
        return on_device(self.model, *models, device=self.accelerator.device, gather=gather)

    def _encode(self, records: Dataset, copies: int = 1) -> PromptBatch:
        return prompt_batch(records, self.processing_class, self.max_prompt_length, copies)

    def _stream(self, dataset: Dataset) -> Shuffled:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        return Shuffled(dataset, self.args.seed, index, count)

    def _reward_set(self, rewards: Any, policy: nn.Module | None = None) -> RewardSet:
        loaded = load_rewards(reward_pairs(rewards), self.processing_class, policy)
        return RewardSet(loaded, self.processing_class)

    def _ptx_batch(self, size: int) -> Mapping[str, Tensor] | None:
        if self.ptx is None or self.loss.ptx_coef is None:
            return None
        batch = self._collate(self.ptx.next(size))
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def evaluate(
        self, eval_dataset: Dataset | None = None, rewards: Any = None
    ) -> dict[str, float]:
        """Compare the policy's responses to held-out prompts with the reference's, by rewards.

        The training run is not disturbed: evaluation has its own random numbers, and the
        reference's responses are the same in every evaluation.

        Args:
            eval_dataset: records; None for the trainer's.
            rewards: any rewards, trained on or not; None for the trainer's.

        Returns:
            for each reward its mean on both sides, win, tie and lose rate; KL, perplexity,
            length and variety of the policy's responses. Names begin with ``eval/``.

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
            reward_set = self._reward_set(rewards, base).to(self.accelerator.device)
            return self._compare(dataset, reward_set)

    def _compare(self, dataset: Dataset, rewards: RewardSet) -> dict[str, float]:
        ours = self.respond(dataset)
        theirs = self.respond(dataset, reference=True)
        ours = self.annotate(ours)
        described = rollout_metrics(ours, self.engine.reduce)
        metrics = {f"eval/{name}": value for name, value in described.items()}
        with together(self.accelerator), self._on_device(*rewards.models()):
            by_name = rewards(ours)[2], rewards(theirs)[2]
        metrics.update(compare(*by_name, self.engine.reduce))
        return metrics

    def evaluate_critic(self, dataset: Dataset | None = None, **options: Any) -> CriticEvaluation:
        """Compare the critic's values with Monte-Carlo returns of continuations.

        Args but ``stages``: those of `evaluate_critic`. The training run is not disturbed.
        """
        if self.critic is None:
            raise ValueError(
                "critic: this trainer has none (critic=False), so there are no values to evaluate; "
                "build it without critic=False, and with an advantage that uses values "
                "(AdvantageEstimator), or leave evaluate_critic() out"
            )
        if dataset is None:
            dataset = self.prompts.dataset if self.eval_dataset is None else self.eval_dataset
        stages = Stages(
            accelerator=self.accelerator,
            encode=self._encode,
            sample=lambda sampler, ids: self._sample(sampler, self.policy, ids),
            score=self.score,
            annotate=self.annotate,
            reduce=self.engine.reduce,
            sampler=self.sampler,
            shaper=self.shaper,
            advantage=self.advantage,
            seed=self.args.seed,
            batch_size=max(1, self.args.rollout_size // self.accelerator.num_processes),
            policy_on_device=lambda: self._on_device(self.policy),
        )
        return evaluate_critic(stages, dataset, **options)

    def respond(self, dataset: Dataset, reference: bool = False) -> Rollout:
        """Sample a response to every prompt of a dataset, with separate random numbers.

        Args:
            dataset: records with ``prompt``.
            reference: whether the reference responds, or the policy. The reference's responses to
                the last few datasets are cached.

        Returns:
            this process's share of the responses, in order.
        """
        if not reference:
            return self._respond_to_all(dataset, reference)
        # Keyed by prompts and sampler: either may have been changed in between.
        prompts = repr([dict(dataset[i])["prompt"] for i in range(len(dataset))]).encode()
        key = hashlib.blake2b(prompts).digest(), self.sampler
        for known, rollout in self._references:
            if known[0] == key[0] and known[1] is key[1]:
                return rollout
        self._references.append((key, self._respond_to_all(dataset, reference)))
        return self._references[-1][1]

    answer = respond  # the old name, until the next release

    def _respond_to_all(self, dataset: Dataset, reference: bool) -> Rollout:
        accelerator = self.accelerator
        mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        records = [dict(dataset[i]) for i in mine]
        size = max(1, self.args.rollout_size // accelerator.num_processes)
        parts = [records[start : start + size] for start in range(0, len(records), size)]
        chosen = (
            as_reference(self.ref_model, self.policy) if reference else nullcontext(self.policy)
        )
        # Weights are gathered once for all parts: processes may have different numbers of them.
        with temporary_seed(self.args.seed), chosen as model, self._on_device(model):
            return Rollout.concat([self._respond(model, self._encode(p)) for p in parts])

    def reference_distinct_2(self) -> float:
        """Return distinct-2 of as many of the reference's responses as a rollout has."""
        dataset, copies = self.prompts.dataset, self.args.samples_per_prompt
        size = self.args.rollout_size // copies
        records = [dict(dataset[i % len(dataset)]) for i in range(size) for _ in range(copies)]
        completions = self._respond_to_all(records, reference=True).completions()
        shares = torch.tensor([distinct_2(completions), 1.0], device=self.accelerator.device)
        total, processes = self.engine.reduce(shares).tolist()
        return total / processes

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
        """Upload policy and tokenizer: ``PreTrainedModel.push_to_hub(repo_id, **kwargs)``."""
        main = self.accelerator.is_main_process
        with whole(main, self.model):
            if main:
                self.policy.push_to_hub(repo_id, **kwargs)  # type: ignore[operator]
                self.processing_class.push_to_hub(repo_id, **kwargs)

    def __repr__(self) -> str:
        """Return the effective settings: every component with its numbers."""
        accelerator = self.accelerator
        lines = [
            f"{type(self).__name__} on {accelerator.num_processes} x {accelerator.device}, "
            f"mixed precision {accelerator.mixed_precision}",
            f"policy:     {count_parameters(self.policy)}",
            f"critic:     {count_parameters(self.critic)}",
            f"reference:  {count_parameters(self.ref_model)}",
            f"scoring:    {self._describe_scoring()}",
            f"rewards:    {', '.join(f'{n} x {w:g}' for n, w in self.rewards.weights.items())}",
            f"prompts:    {len(self.prompts.dataset)}, at most {self.max_prompt_length} tokens",
        ]
        for name in ("sampler", "shaper", "advantage", "loss", "args"):
            part = getattr(self, name)
            lines.append(f"{name}: {type(part).__name__}")
            if is_dataclass(part):
                shown = {spec.name: getattr(part, spec.name) for spec in fields(part)}
                # Of a sampler its effective config is shown, not the one it was made of.
                shown.pop("generation_config", None)
                effective = shown.pop("effective", None)
                if effective is not None:
                    shown |= effective.to_diff_dict()
                lines += [f"    {key} = {value!r}" for key, value in shown.items()]
        return "\n".join(lines)

    def _describe_scoring(self) -> str:
        """How tokens are scored, by which backend, and how the gradient of their loss is made."""
        path, chosen = token_path(self.policy), backend(self.accelerator.device)
        if not path.by_hidden:
            return f"by full logits, since {path.reason}"
        why = self.engine.why_not_fused(self.loss)
        if why is None and "as a module" in path.reason:
            why = "a module is run twice"
        work = "three matrix products" if why is None else f"four matrix products, since {why}"
        return f"{path.reason}; {work}; by {chosen.name}, since {chosen.reason}"
