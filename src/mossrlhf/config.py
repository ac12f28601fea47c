"""`TrainerConfig`: length of the run, sizes of batches, learning rates, logging, checkpoints."""

import math
from dataclasses import dataclass, field

from mossrlhf.options import check_range, strict, suggest

SCHEDULES = (
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "inverse_sqrt", "linear",
    "polynomial",
)  # fmt: skip
"""Schedules of transformers that need only a warm-up and a number of steps."""


@strict
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a run of `Trainer`; its other arguments define the objective.

    Names that mean the same as in `transformers.TrainingArguments` are spelled the same.

    Args:
        output_dir: folder of checkpoints, tables and figures.
        seed: of sampling and of the order of prompts and minibatches.
        learning_rate: of the policy (P1 and MOSS-RLHF: 5e-7).
        critic_learning_rate: of the critic (P1: 1.65e-6, MOSS-RLHF: 1.5e-6).
        lr_scheduler_type: one of `SCHEDULES`; "inverse_sqrt" is MOSS-RLHF's.
        warmup_steps: optimizer steps of linear warm-up; below 1 a fraction (P1, MOSS-RLHF: 0.1).
        adam_beta1: Adam's β₁ (P1, MOSS-RLHF).
        adam_beta2: Adam's β₂ (P1, MOSS-RLHF).
        adam_epsilon: Adam's ε (MOSS-RLHF).
        weight_decay: of AdamW.
        max_grad_norm: bound on the gradient norms of policy and critic, each; None for none.
        clip_grad_jointly: whether to clip the joint norm of policy and critic, as in MOSS-RLHF.
        total_steps: PPO iterations: rollouts with the optimizer steps that follow.
        rollout_size: responses per rollout, over all processes (P1: 128).
        minibatch_size: responses per optimizer step, over all processes (P1: 32).
        num_ppo_epochs: epochs over each rollout.
        samples_per_prompt: responses sampled per prompt, for group baselines.
        micro_batch_size: responses at a time on a process; None for all. Only speed and memory.
        max_tokens: padded tokens at a time on a process; None for no bound. Only speed and memory.
        max_prompt_length: tokens; longer dialogues lose old turns. None: what fits the context.
        critic_pretrain_steps: iterations of critic warm-up, before step 1.
        bootstrap_truncated: whether the critic's value replaces the rest of a truncated response.
        offload_frozen: whether reference and reward models are kept on the CPU between uses.
        bf16: whether to compute in bfloat16 (autocast; parameters stay float32).
        gradient_checkpointing: whether to recompute activations in the backward pass.
        disable_dropout: whether to disable dropout in all models.
        logging_steps: iterations between lines of the log.
        eval_steps: iterations between evaluations; None for none.
        save_steps: iterations between checkpoints; None for only the last and the best.
        save_total_limit: checkpoints kept beside the best; None for all.
        metric_for_best_model: metric that selects the best checkpoint; None for no best.
        greater_is_better: False if a lower value of that metric is better.
        report_to: trackers of accelerate ("tensorboard", "wandb", …).
        run_name: for the trackers.
        disable_tqdm: whether to print neither progress bar nor table.
        ddp_timeout: seconds to wait for other processes; more than the slowest operation of one.
        collapse_kl: nats per sequence beyond which, with few distinct bigrams, the policy counts
            as collapsed.
        max_kl: nats per sequence at which training stops; None for never.

    Raises:
        ValueError: if a number is out of range, or sizes do not divide.
        TypeError: if an option is unknown, with a suggestion.

    Source: P1 App. B and MOSS-RLHF's scripts, where marked.
    """

    _argument_group_name = "the run"  # the heading of its options in an HfArgumentParser

    output_dir: str = "outputs"
    seed: int = 0
    learning_rate: float = 5e-7
    critic_learning_rate: float = 1.5e-6
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    clip_grad_jointly: bool = False
    total_steps: int = 1000
    rollout_size: int = 128
    minibatch_size: int = 32
    num_ppo_epochs: int = 1
    samples_per_prompt: int = 1
    micro_batch_size: int | None = None
    max_tokens: int | None = None
    max_prompt_length: int | None = None
    critic_pretrain_steps: int = 0
    bootstrap_truncated: bool = False
    offload_frozen: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    disable_dropout: bool = True
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = 2
    metric_for_best_model: str | None = None
    greater_is_better: bool = True
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None
    disable_tqdm: bool = False
    ddp_timeout: float = 1800.0
    collapse_kl: float = 15.0
    max_kl: float | None = None

    def __post_init__(self) -> None:
        def check(name: str, low: float, above: bool = False) -> None:
            check_range("TrainerConfig", name, getattr(self, name), low, above=above)

        for name in ("learning_rate", "critic_learning_rate", "weight_decay", "warmup_steps"):
            check(name, 0)
            if math.isinf(getattr(self, name)):
                raise ValueError(f"TrainerConfig({name}=): got inf, expected a finite number")
        for name in ("adam_epsilon", "max_grad_norm", "collapse_kl", "max_kl", "ddp_timeout"):
            check(name, 0, above=True)
        for name in ("total_steps", "critic_pretrain_steps"):
            check(name, 0)
        for name in ("adam_beta1", "adam_beta2"):
            check_range("TrainerConfig", name, getattr(self, name), 0, 1)
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(
                f"TrainerConfig(lr_scheduler_type={self.lr_scheduler_type!r}): expected one of "
                f"{', '.join(SCHEDULES)}{suggest(self.lr_scheduler_type, list(SCHEDULES))}"
            )
        counts = "rollout_size minibatch_size num_ppo_epochs samples_per_prompt micro_batch_size "
        counts += "max_tokens max_prompt_length logging_steps eval_steps save_steps"
        for name in counts.split():
            check(name, 1)
        check_range("TrainerConfig", "save_total_limit", self.save_total_limit, 1)
        check_range("TrainerConfig", "seed", self.seed, 0, 2**32 - 1)
        counts += " total_steps critic_pretrain_steps save_total_limit seed"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and not float(value).is_integer():
                raise ValueError(f"TrainerConfig({name}=): got {value}, expected a whole number")
        if self.rollout_size % self.samples_per_prompt:
            raise ValueError(
                f"TrainerConfig(rollout_size={self.rollout_size}, samples_per_prompt="
                f"{self.samples_per_prompt}): the rollout must hold whole groups; make "
                "rollout_size a multiple of samples_per_prompt"
            )
        if self.minibatch_size > self.rollout_size:
            raise ValueError(
                f"TrainerConfig(minibatch_size={self.minibatch_size}, rollout_size="
                f"{self.rollout_size}): a minibatch cannot hold more responses than the rollout; "
                "lower minibatch_size"
            )
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", [self.report_to])

    # Attributes of `TrainingArguments` that callbacks of transformers read.

    @property
    def eval_strategy(self) -> str:
        """When the trainer evaluates: "steps" or "no"."""
        return "no" if self.eval_steps is None else "steps"

    @property
    def save_strategy(self) -> str:
        """When the trainer saves: "steps" or "no"."""
        return "no" if self.save_steps is None else "steps"

    @property
    def load_best_model_at_end(self) -> bool:
        """False: the trainer keeps its last models; the best are in their checkpoint."""
        return False

    def require_shareable(self, processes: int) -> None:
        """Refuse sizes that a number of processes cannot share evenly.

        Args:
            processes: how many there are.

        Raises:
            ValueError: if a rollout or minibatch does not divide evenly.
        """
        whole = {
            "rollout_size": processes * self.samples_per_prompt,
            "minibatch_size": processes,
        }
        for name, group in whole.items():
            if getattr(self, name) % group:
                raise ValueError(
                    f"TrainerConfig({name}={getattr(self, name)}): {processes} processes with "
                    f"{self.samples_per_prompt} samples per prompt cannot share it evenly; make "
                    f"it a multiple of {group}"
                )

    def optimizer_steps(self, pretraining: bool = False) -> int:
        """Return the optimizer steps of a whole run.

        Args:
            pretraining: whether to count those of the critic's warm-up as well.
        """
        per_rollout = -(-self.rollout_size // self.minibatch_size) * self.num_ppo_epochs
        iterations = self.total_steps + (self.critic_pretrain_steps if pretraining else 0)
        return iterations * per_rollout
