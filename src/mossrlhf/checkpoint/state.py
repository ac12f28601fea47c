"""What a checkpoint holds besides models and optimizers: counters, settings, random states."""

import json
import random
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.checkpoint.serialization import CHECKSUM, read_json, require_sealed, sealed_state
from mossrlhf.models import RewardModel, weights_digest
from mossrlhf.roles import is_adapted
from mossrlhf.version import __version__

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of this process's generators: tensors, and what JSON holds.

    Torch's on every device, Python's and NumPy's, which reward functions draw from.

    Source: ours.
    """
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, numbers, gauss = random.getstate()
    mersenne: Any = np.random.get_state()
    kind, keys, *rest = mersenne
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    plain = {"python": [version, list(numbers), gauss], "numpy": [kind, *rest]}
    return tensors, plain


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned.

    Args:
        tensors: of torch and NumPy.
        plain: of Python and NumPy.

    Source: ours.
    """
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, *rest = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))


FORMAT = 1
"""Of checkpoints: raised where an older version could not read a newer one's."""

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
"""What a state holds beside its format, and of which kind it is."""


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says in plain numbers, having made sure that its tensors are whole.

    Args:
        path: its folder.

    Raises:
        ValueError: where it is damaged, of another library, or of a later format; it says how, and
            names the newest whole checkpoint before it.

    Source: ours.
    """
    try:
        return _whole_state(path)
    except ValueError as error:
        what = f"resume_from_checkpoint: {str(path)!r}: {error}. {_offer(path)}"
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
    # What is read is made into JSON again, as it was when it was written.
    if sealed_state(state)[CHECKSUM] != state[CHECKSUM]:
        raise ValueError(f"{STATE} is damaged (its check sum is of something else)")
    require_sealed(path, state["files"])
    whole: dict[str, Any] = state
    return whole


def _offer(path: Path) -> str:
    """Name the newest whole checkpoint before one that is not."""
    found = checkpoints(path.parent)
    before = found[: found.index(path)] if path in found else found
    for other in reversed(before):
        try:
            _whole_state(other)
        except ValueError:
            continue
        return f"The one before it is whole: resume_from_checkpoint={str(other)!r}"
    return "There is no whole one before it; train from the start"


def snapshot(trainer: "Trainer") -> dict[str, Any]:
    """Note where the streams of data and random numbers are, and the shaper's moments.

    Args:
        trainer: between two iterations.

    Returns:
        for `restore`, as long as no model has moved.

    Source: ours.
    """
    return {
        "prompts": trainer.prompts.state_dict(),
        "ptx": None if trainer.ptx is None else trainer.ptx.state_dict(),
        "shaper": shaper_state(trainer),
        "random": random_state(),
        "minibatches": trainer.generator.get_state(),
    }


def restore(trainer: "Trainer", noted: dict[str, Any]) -> None:
    """Bring streams and moments back to where `snapshot` noted them.

    Args:
        trainer: the same.
        noted: what `snapshot` returned.

    Source: ours.
    """
    trainer.prompts.load_state_dict(noted["prompts"])
    if trainer.ptx is not None:
        trainer.ptx.load_state_dict(noted["ptx"])
    if noted["shaper"]:
        trainer.shaper.load_state_dict(noted["shaper"])
    set_random_state(*noted["random"])
    trainer.generator.set_state(noted["minibatches"])


def shaper_state(trainer: "Trainer") -> dict[str, Any]:
    """Return what a shaper remembers; nothing where it is a function without a memory.

    Args:
        trainer: whose shaper.

    Source: ours.
    """
    state: dict[str, Any] = getattr(trainer.shaper, "state_dict", dict)()
    return state


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
    if not is_adapted(trainer.policy):
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
