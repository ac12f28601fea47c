"""What a run was made with: noted beside what it has learned, and held to it when it goes on."""

import json
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mossrlhf.models import RewardModel, weights_digest
from mossrlhf.models.lora import is_peft_model

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer

COUNT = frozenset([
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "bootstrap_truncated", "clip_grad_jointly",
    "critic_learning_rate", "disable_dropout", "learning_rate", "lr_scheduler_type",
    "max_grad_norm", "max_prompt_length", "minibatch_size", "num_ppo_epochs", "rollout_size",
    "samples_per_prompt", "seed", "warmup_steps", "weight_decay",
])  # fmt: skip
"""Fields of `TrainerConfig` that change what is learned, and not how long or how it is told."""

OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")


def settings_of(trainer: "Trainer") -> dict[str, Any]:
    """Note what decides over what a run learns.

    Args:
        trainer: built.

    Source: ours.
    """
    noted = {spec.name: getattr(trainer.args, spec.name) for spec in fields(trainer.args)}
    return {
        **{name: value for name, value in noted.items() if name in COUNT},
        "kl_coef": getattr(trainer.shaper, "kl_coef", None),
        "len(train_dataset)": len(trainer.prompts.dataset),
    }


def judges_of(trainer: "Trainer") -> str | None:
    """Tell the reward models from others; all processes ask together, as these may be sharded.

    Args:
        trainer: built; None where no model is among its rewards.

    Source: ours.
    """
    found: dict[str, Tensor] = {}
    for index, model in enumerate(trainer.rewards.models()):
        own = model.own_parameters() if isinstance(model, RewardModel) else model.named_parameters()
        found |= {f"{index}.{name}": parameter for name, parameter in dict(own).items()}
    return weights_digest(found) if found else None


def apply_settings(trainer: "Trainer", before: dict[str, Any]) -> None:
    """Let what the user has changed since a checkpoint win over what it holds, and say so.

    Args:
        trainer: with everything of the checkpoint put in its place.
        before: what `settings_of` noted then.

    Warns:
        UserWarning: for each that has changed.

    Source: ours.
    """
    changed = {n: now for n, now in trainer.run.settings.items() if before.get(n) != now}
    for name, now in changed.items():
        warnings.warn(
            f"resume_from_checkpoint: {name} was {before.get(name)} when the run began and is "
            f"{now} now; from here on it is {now}",
            UserWarning,
            stacklevel=3,
        )
    if "kl_coef" in changed:
        trainer.shaper.kl_coef = changed["kl_coef"]
    for role, name in (("policy", "learning_rate"), ("critic", "critic_learning_rate")):
        if name in changed and role in trainer.engine.schedulers:
            trainer.engine.set_learning_rate(role, changed[name])
    if set(OF_ADAM) & set(changed):
        args = trainer.args
        options = {
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
            "weight_decay": args.weight_decay,
        }
        for optimizer in trainer.engine.optimizers.values():
            for group in optimizer.param_groups:
                group.update(options)


def adapters_of(trainer: "Trainer") -> dict[str, Any]:
    """Say of what make the trained adapters are: what their weights mean depends on it.

    Args:
        trainer: built; nothing is noted where it has no adapters.

    Source: ours.
    """
    if not is_peft_model(trainer.policy):
        return {}
    policy: Any = trainer.policy
    trained = [*policy.active_adapters, getattr(trainer.critic, "adapter", None)]
    return {n: _described(policy.peft_config[n]) for n in trained if n in policy.peft_config}


def require_same_adapters(own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuse adapters of another make.

    Args:
        own: what `adapters_of` says now.
        saved: what it said.

    Raises:
        ValueError: the first difference.

    Source: ours.
    """
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
    """A configuration of PEFT as JSON has it, without what it says of files and versions."""
    passed = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"}
    passed |= {"revision", "task_type"}
    kept = {name: value for name, value in config.to_dict().items() if name not in passed}
    return json.loads(
        json.dumps(kept, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
