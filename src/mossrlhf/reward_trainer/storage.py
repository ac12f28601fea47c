"""What a folder keeps of a reward model in training: the classifier, adapters, the output head."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME

from mossrlhf.models import (
    SCORE_MOMENTS,
    RewardModel,
    is_adapted,
    load_adapters,
    save_adapters,
)
from mossrlhf.reward_trainer.pairs import PairModel

LM_HEAD = Path("lm_head") / "model.safetensors"
"""Where a folder keeps the output head: out of the way of tools that load a classifier."""

ADAPTER = "adapter"
"""Where it keeps adapters and head alone, as PEFT writes them."""

MOMENTS = "score_moments.json"
"""Where the adapters' folder keeps what the configuration of a whole model does."""


def write(
    model: PairModel,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    resumable_only: bool = False,
) -> None:
    """Write a model in training.

    Args:
        model: unwrapped.
        folder: made where absent.
        state: its weights, where they had to be gathered; None to ask the model.
        resumable_only: whether adapters and head are enough, without the base they are merged in.

    Source: ours.
    """
    reward_model = model.reward_model
    if is_adapted(reward_model):
        save_adapters(reward_model, folder / ADAPTER)
        moments = {name: getattr(model.config, name, None) for name in SCORE_MOMENTS}
        (folder / ADAPTER / MOMENTS).write_text(json.dumps(moments) + "\n", encoding="utf-8")
    if not (is_adapted(reward_model) and resumable_only):
        gathered = None if state is None else _below("reward_model.", state)
        reward_model.save_pretrained(folder, state_dict=gathered)
    if head := _below("lm_head.", model.state_dict() if state is None else state):
        (folder / LM_HEAD).parent.mkdir(parents=True, exist_ok=True)
        save_file(head, folder / LM_HEAD)


def read(model: PairModel, folder: Path) -> None:
    """Load what `write` wrote, every key; transformers would only log what is missing.

    Args:
        model: unwrapped, of the same make.
        folder: where it is.

    Raises:
        ValueError: where something is missing or damaged, or there are adapters on one side only.

    Source: ours.
    """
    adapted = is_adapted(model.reward_model)
    kept = (folder / ADAPTER).is_dir()
    if kept < adapted or kept > max(adapted, (folder / CONFIG_NAME).is_file()):
        has = ("adapters alone", "none") if kept else ("no adapters", "some")
        raise ValueError(
            f"{folder}: it holds {has[0]}, and the model in training has {has[1]}; give "
            "RewardTrainer the peft_config that the checkpoint was trained with"
        )
    if adapted:
        with _named(folder / ADAPTER):
            load_adapters(model.reward_model, folder / ADAPTER)
        with _named(folder / ADAPTER / MOMENTS) as path:
            moments = dict(json.loads(path.read_text(encoding="utf-8")))
    else:
        with _named(folder):
            saved = RewardModel.from_pretrained(folder)
        model.reward_model.load_state_dict(saved.state_dict())
        moments = vars(saved.config)
    set_moments(model.config, moments)
    if model.lm_head is not None:
        with _named(folder / LM_HEAD) as path:
            model.lm_head.load_state_dict(load_file(path))


@contextmanager
def _named(path: Path) -> Iterator[Path]:
    """Say which part of a checkpoint it is that cannot be read."""
    try:
        yield path
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error!s:.200}); it is missing or "
            "damaged, resume from another checkpoint"
        ) from error


def set_moments(config: Any, moments: Mapping[str, Any]) -> None:
    """Note mean and standard deviation of the scores in a model's configuration.

    Args:
        config: of the model.
        moments: by name, beside whatever else; None what is not known.

    Source: ours.
    """
    for name in SCORE_MOMENTS:
        setattr(config, name, moments.get(name))


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
