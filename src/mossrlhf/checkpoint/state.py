"""`RunState`: what changes during a run, and what a checkpoint stores of it."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.config import TrainerConfig
from mossrlhf.data import Shuffled
from mossrlhf.models import RewardModel, weights_digest
from mossrlhf.models.lora import is_adapted
from mossrlhf.optimization import TrainingEngine
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.serialization import CHECKSUM, read_json, require_checksums, with_checksum
from mossrlhf.version import __version__

FORMAT = 1
"""Format of checkpoints: a higher number where older versions cannot read what is written."""

KINDS: dict[str, Any] = {
    "version": str,
    "weights": dict,
    "global_step": int,
    "pretrained": int,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "settings": dict,
    "shaper": dict,
    "prompts": dict,
    "ptx": dict | None,
    "schedulers": dict,
    "optimizers": dict,
    "random": list,
    "scaler": dict | None,
    "watches": dict,
    "callbacks": dict,
    "history": list,
    "adapters": dict,
    "files": dict,
    CHECKSUM: str,
}
"""The entries of a stored state and their types."""


@dataclass(kw_only=True)
class RunState:
    """The parts of a trainer that a run changes, and how far the run has come.

    Args:
        args, accelerator, engine, ref_model, shaper, prompts, ptx, callbacks: the trainer's.
        reward_models: the models among the rewards.
        generator: order of the minibatches.
        save_models: writes the models as transformers loads them into a folder.
        progress: step, history, best metric.
        watches: watches with a memory, by name.
        pretrained: iterations of critic warm-up taken.
        before: `snapshot` at the start of the current iteration; None between iterations.
        updating: whether models may have moved since the start of the current iteration.
        steps_before: optimizer steps taken before the current update.
    """

    args: TrainerConfig
    accelerator: Accelerator
    engine: TrainingEngine
    ref_model: nn.Module | None
    reward_models: Sequence[nn.Module]
    shaper: Any
    prompts: Shuffled
    ptx: Shuffled | None
    generator: torch.Generator
    save_models: Callable[[Path], None]
    callbacks: Sequence[TrainerCallback] = ()
    progress: TrainerState = field(default_factory=TrainerState)
    watches: dict[str, Any] = field(default_factory=dict)
    pretrained: int = 0
    before: dict[str, Any] | None = None
    updating: bool = False
    steps_before: int = 0

    def __post_init__(self) -> None:
        self.settings = settings_of(self)
        self.rewards_checksum = _rewards_checksum(self.reward_models)

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.args.output_dir)

    @property
    def checkpoint(self) -> Path:
        """The folder of a checkpoint of the current step."""
        return self.output_dir / f"checkpoint-{self.progress.global_step}"

    def shaper_state(self) -> dict[str, Any]:
        """Return the shaper's memory; empty for a function without one."""
        state: dict[str, Any] = getattr(self.shaper, "state_dict", dict)()
        return state

    def snapshot(self) -> dict[str, Any]:
        """Return the places in data and random streams and the shaper's moments, for `rewind`."""
        return {
            "prompts": self.prompts.state_dict(),
            "ptx": None if self.ptx is None else self.ptx.state_dict(),
            "shaper": self.shaper_state(),
            "random": random_state(),
            "minibatches": self.generator.get_state(),
        }

    def rewind(self, snapshot: dict[str, Any]) -> None:
        """Restore a `snapshot`; valid only while no optimizer step was taken since."""
        self.load_streams(snapshot)
        set_random_state(*snapshot["random"])
        self.generator.set_state(snapshot["minibatches"])

    def load_streams(self, saved: dict[str, Any]) -> None:
        """Restore the places in the datasets and the shaper's moments."""
        self.prompts.load_state_dict(saved["prompts"])
        if self.ptx is not None and saved["ptx"] is not None:
            self.ptx.load_state_dict(saved["ptx"])
        if saved["shaper"]:
            self.shaper.load_state_dict(saved["shaper"])


# ------------------------------------------------------------------------------ stored state


def read_state(path: Path) -> dict[str, Any]:
    """Read the JSON of a checkpoint, and verify the checksums of its tensors."""
    try:
        return _whole_state(path)
    except ValueError as error:
        what = f"resume_from_checkpoint: {str(path)!r}: {error}. {_alternative(path)}"
        raise ValueError(what) from error


def _whole_state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path / STATE)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{STATE} is damaged ({error})") from error
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise ValueError(f"{STATE} is not of mossrlhf.Trainer")
    if state["format"] > FORMAT:
        raise ValueError(
            f"written by mossrlhf {state.get('version')} in format {state['format']}, and this is "
            f"{__version__}, which reads up to format {FORMAT}; install the newer one"
        )
    for name, kind in KINDS.items():
        if name not in state:
            raise ValueError(f"{STATE} is damaged (it lacks {name!r})")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{STATE} is damaged (its {name} is {state[name]!r:.60})")
    for name in ("global_step", "pretrained"):
        if state[name] < 0:
            raise ValueError(f"{STATE} is damaged (its {name} is {state[name]})")
    if with_checksum(state)[CHECKSUM] != state[CHECKSUM]:
        raise ValueError(f"{STATE} is damaged (its checksum does not match)")
    require_checksums(path, state["files"])
    whole: dict[str, Any] = state
    return whole


def _alternative(path: Path) -> str:
    """Name the newest whole checkpoint before a damaged one."""
    found = checkpoints(path.parent)
    before = found[: found.index(path)] if path in found else found
    for other in reversed(before):
        try:
            _whole_state(other)
        except ValueError:
            continue
        return f"The one before it is whole: resume_from_checkpoint={str(other)!r}"
    return "There is no whole one before it; train from the start"


# ---------------------------------------------------------------------------------- settings

SETTINGS = frozenset([
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "bootstrap_truncated", "clip_grad_jointly",
    "critic_learning_rate", "disable_dropout", "learning_rate", "lr_scheduler_type",
    "max_grad_norm", "max_prompt_length", "minibatch_size", "num_ppo_epochs", "rollout_size",
    "samples_per_prompt", "seed", "warmup_steps", "weight_decay",
])  # fmt: skip
"""Fields of `TrainerConfig` that change what is learned, and that resuming compares."""

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")


def settings_of(run: RunState) -> dict[str, Any]:
    """Return the settings that resuming compares, by name."""
    values = {spec.name: getattr(run.args, spec.name) for spec in fields(run.args)}
    return {
        **{name: value for name, value in values.items() if name in SETTINGS},
        "kl_coef": getattr(run.shaper, "kl_coef", None),
        "len(train_dataset)": len(run.prompts.dataset),
    }


def apply_settings(run: RunState, before: dict[str, Any]) -> None:
    """Let settings changed since the checkpoint win over the checkpoint's, with a warning each."""
    changed = {n: now for n, now in run.settings.items() if before.get(n) != now}
    for name, now in changed.items():
        warnings.warn(
            f"resume_from_checkpoint: {name} was {before.get(name)} when the run began and is "
            f"{now} now; from here on it is {now}",
            UserWarning,
            stacklevel=3,
        )
    if "kl_coef" in changed:
        run.shaper.kl_coef = changed["kl_coef"]
    for role, name in (("policy", "learning_rate"), ("critic", "critic_learning_rate")):
        if name in changed and role in run.engine.schedulers:
            run.engine.set_learning_rate(role, changed[name])
    if set(ADAM) & set(changed):
        args = run.args
        options = {
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        for optimizer in run.engine.optimizers.values():
            for group in optimizer.param_groups:
                group.update(options)


# ------------------------------------------------------------- what trained weights stand on


def _rewards_checksum(models: Sequence[nn.Module]) -> str | None:
    """Identify the reward models; collective where they are sharded."""
    found: dict[str, Tensor] = {}
    for index, model in enumerate(models):
        own = model.own_parameters() if isinstance(model, RewardModel) else model.named_parameters()
        found |= {f"{index}.{name}": parameter for name, parameter in dict(own).items()}
    return weights_digest(found) if found else None


def adapters_of(run: RunState) -> dict[str, Any]:
    """Describe the trained adapters' configuration; empty without adapters."""
    model: Any = run.engine.bare
    if not is_adapted(model.policy):
        return {}
    policy = model.policy
    trained = [*policy.active_adapters, getattr(model.critic, "adapter", None)]
    return {n: _described(policy.peft_config[n]) for n in trained if n in policy.peft_config}


def require_same_adapters(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raise ValueError at the first difference between two results of `adapters_of`."""
    for name in sorted({*own, *saved}):
        ours, theirs = own.get(name, {}), saved.get(name, {})
        different = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
        if different:
            key = different[0]
            raise ValueError(
                f"resume_from_checkpoint: the adapter {name!r} was made with {key}="
                f"{theirs.get(key)!r}, this trainer's with {ours.get(key)!r}; pass the "
                "peft_config it was trained with"
            )


def _described(config: Any) -> Any:
    """A PEFT configuration as JSON, without files and versions."""
    skipped = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"}
    skipped |= {"revision", "task_type"}
    kept = {name: value for name, value in config.to_dict().items() if name not in skipped}
    return json.loads(
        json.dumps(kept, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
