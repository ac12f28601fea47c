"""The five stages of an iteration, and the parts they work with."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback

from mossrlhf.advantage import AdvantageEstimator
from mossrlhf.buffer import RolloutBuffer, note, split
from mossrlhf.config import TrainerConfig
from mossrlhf.data import (
    PromptBatch,
    SFTCollator,
    Shuffled,
    prompt_batch,
    require_fitting_prompts,
)
from mossrlhf.distributed.accelerator import make_accelerator
from mossrlhf.fitting import require_fitting_parts, require_parts, require_reachable_entropy
from mossrlhf.frozen import at_work, settle
from mossrlhf.kernels import fast_products
from mossrlhf.loading.critic import load_critic, load_rewards
from mossrlhf.loading.policy import as_reference, load_policy, load_reference, set_switches
from mossrlhf.loading.tokenizer import (
    load_tokenizer,
    policy_context,
    prompt_budget,
    require_vocabulary,
)
from mossrlhf.loss import PPOMaxLoss
from mossrlhf.metrics import Meter, rollout_metrics
from mossrlhf.models import ActorCritic, RewardModel, announce
from mossrlhf.models.lora import vocabulary_size
from mossrlhf.retention import require_writable
from mossrlhf.returned import confirmed, estimated, responses, shaped
from mossrlhf.rewards import RewardSet, reward_pairs
from mossrlhf.sampling import HFSampler, Sampler
from mossrlhf.shaping import RewardShaper
from mossrlhf.sharding import is_sharded
from mossrlhf.strict import strict_init
from mossrlhf.types import Rollout
from mossrlhf.zero import make_engine

Dataset = Sequence[Mapping[str, Any]]


class Stages:
    """The parts of PPO-max put together, and its five stages; `Trainer` runs them in turn.

    Each takes a `Rollout` and returns a new one; through `self` travel models and counters alone.

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
        ref_model: the reference; None for a copy of the policy as it is now (or the policy with
            its adapters off).
        args: how long, how much at a time, how fast.
        eval_dataset: held-out records, for `evaluate`.
        ptx_dataset: records of pre-training or SFT data for the PTX term.
        processing_class: the policy's tokenizer; None to load it from the model's name.
        peft_config: LoRA or another adapter; the base is then frozen.
        generation_config: how responses are drawn, where no `sampler` is given.
        shaper: scores → rewards, a `RewardShaper` or any callable; copied, with the running
            moments it has.
        advantage: rewards and values → advantages and returns.
        loss: what is minimized.
        sampler: draws responses; None for `HFSampler`.
        accelerator: None for one made from `args`.
        callbacks: `transformers.TrainerCallback`s, called where they mean the same.

    Raises:
        ValueError: where the parts do not fit together; it says which and what to do.
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
        require_parts(locals())  # nothing but the arguments, so far
        self.args = args or TrainerConfig()
        self.output_dir = Path(self.args.output_dir)
        require_writable(self.output_dir)
        self.accelerator = make_accelerator(self.args, accelerator)
        # Its running moments are this trainer's alone, though a preset may serve several.
        self.shaper: Any = copy.deepcopy(shaper) if shaper is not None else RewardShaper()
        self.advantage = advantage or AdvantageEstimator()
        self.loss = loss or PPOMaxLoss()
        require_fitting_parts(self, critic, ptx_dataset, generation_config, sampler)
        self.processing_class = processing_class or load_tokenizer(model)
        self.sampler = sampler or HFSampler.for_tokenizer(
            self.processing_class, generation_config or GenerationConfig(max_new_tokens=512)
        )
        self.prompts = self._feed(train_dataset)
        self.eval_dataset = eval_dataset
        self.ptx = self._feed(ptx_dataset) if ptx_dataset is not None else None

        policy = load_policy(model, peft_config, seed=self.args.seed)
        special = getattr(self.sampler, "effective", None)
        require_vocabulary(policy, self.processing_class, special)
        require_reachable_entropy(self.loss, vocabulary_size(policy))
        self.max_prompt_length = prompt_budget(policy, self.args, self.sampler.max_new_tokens)
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            require_fitting_prompts(data, self.processing_class, self.max_prompt_length, name=name)
        self.rewards = self._reward_set(reward, policy)
        self.ref_model = load_reference(ref_model, policy)
        made = load_critic(critic, policy, self.rewards.same_tokenizer(), seed=self.args.seed)
        actor_critic = ActorCritic(policy, made, self.sampler.temperature)
        set_switches(self.args, actor_critic, self.ref_model)
        self.engine = make_engine(actor_critic, self.args, self.accelerator)
        frozen = (self.ref_model, *self.rewards.models())
        settle(actor_critic, *frozen, device=self.accelerator.device, args=self.args)
        for asked, name in ((policy, "model"), (self.ref_model, "ref_model")):
            with self._at_work(asked):
                announce(asked, name)
        self._collate = SFTCollator(self.processing_class, max_length=policy_context(policy))
        if ptx_dataset is not None:
            self._collate([ptx_dataset[0]])  # or a wrong format would show after the warm-up
        self.generator = torch.Generator().manual_seed(self.args.seed)
        self._ready(callbacks)

    def _ready(self, callbacks: Sequence[TrainerCallback]) -> None:
        """For `Trainer`, once the parts are together."""

    def collect(self, prompts: PromptBatch | None = None) -> Rollout:
        """Draw responses to the next prompts.

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
        """Ask the rewards about every response.

        Args:
            rollout: B responses.

        Returns:
            the rollout with `scores` or `token_scores`, and each reward under
            ``extra["reward/<name>"]``.

        Raises:
            ValueError: where a reward function raises or returns what is not asked for.
        """
        self.model.eval()
        with self._at_work(*self.rewards.models()), self._computing():
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
        """Note what policy, reference and critic say of every token before anything moves.

        What a sampler has noted is kept once it is `confirmed`; whoever changes tokens after
        `collect` drops it: ``replace(rollout, logprobs=None)``.

        Args:
            rollout: B responses; `logprobs` and `entropies` that are there, as the sampler noted
                them, stay.

        Returns:
            the rollout with `logprobs`, `entropies`, `ref_logprobs`, and with `values` and
            `bootstrap` where there is a critic.
        """
        self.model.eval()
        with self._computing():
            rollout = confirmed(rollout, self.model.score, lenient=is_sharded(self.engine.bare))
        noted: dict[str, Tensor] = {}
        groups = split(rollout, self.args.micro_batch_size, self.args.max_tokens)
        with self._at_work(self.ref_model, lend=False):
            for rows in self.engine.in_step(groups):
                self._annotate(rollout, rows, noted)
        return replace(rollout, **noted)  # type: ignore[arg-type]

    def _annotate(self, rollout: Rollout, rows: Tensor, noted: dict[str, Tensor]) -> None:
        part = rollout.select(rows)
        place = rows.to(part.mask.device), rollout.mask.shape
        with self._computing():
            if rollout.logprobs is None:
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
        """Shape scores into rewards, and rewards into advantages and returns.

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
            roles: who learns.
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

    def _respond(self, model: nn.Module, prompts: PromptBatch) -> Rollout:
        self.model.eval()
        with self._at_work(model), self._computing():
            rollout = responses(self.sampler, model, prompts.ids)
        rollout = replace(rollout, columns=prompts.columns)
        if getattr(self.shaper, "score_after_end", False):
            rollout = rollout.with_end_states(self.sampler.max_new_tokens)
        return rollout

    def _at_work(self, *models: nn.Module | None, lend: bool = True) -> Any:
        return at_work(self.model, *models, device=self.accelerator.device, lend=lend)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with fast_products(), self.accelerator.autocast():
            yield

    def _encode(self, records: Dataset, copies: int = 1) -> PromptBatch:
        return prompt_batch(records, self.processing_class, self.max_prompt_length, copies)

    def _feed(self, dataset: Dataset) -> Shuffled:
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
