"""Checkpoints: numbers in JSON, tensors in safetensors, nothing pickled; written aside, renamed."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

STATE = "trainer_state.json"
"""The file that is written last and read first; a folder without it is no checkpoint."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Lend a folder to write to, which takes its final name once everything is in it.

    Args:
        path: the final name; what stands there is replaced.

    Raises:
        OSError: where it could not be written whole; nothing of it is left, and what stood there
            still does.

    Source: ours; a half-written folder is never mistaken for a finished one.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        finished = [found.name for found in checkpoints(path.parent)]
        raise OSError(
            f"output_dir: {path.name} could not be written to {str(path.parent)!r} ({error}); "
            f"finished there: {finished}. Free space or choose another folder, and go on with "
            "train(resume_from_checkpoint=)"
        ) from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and plain numbers.

    Args:
        optimizer: any of torch's.

    Returns:
        tensors for safetensors, and what goes into JSON.

    Source: ours.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"slots": plain, "groups": state["param_groups"]}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what `pack_optimizer` took out.

    Args:
        optimizer: over the same parameters.
        tensors: by name.
        plain: the rest.

    Source: ours.
    """
    slots: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in plain["slots"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = [dict(group) for group in plain["groups"]]
    for group in groups:
        group["betas"] = tuple(group["betas"]) if "betas" in group else None
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of this process's generators: torch's as tensors, Python's as JSON.

    Source: ours.
    """
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, numbers, gauss = random.getstate()
    return tensors, {"python": [version, list(numbers), gauss]}


def set_random_state(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned.

    Args:
        tensors: of torch.
        plain: of Python.

    Source: ours.
    """
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; an empty mapping writes an empty file of that kind.

    Args:
        tensors: by name.
        path: the file.

    Source: ours.
    """
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: where it is not whole.

    Source: ours.
    """
    try:
        return dict(load_file(str(path)))
    except SafetensorError as error:
        raise ValueError(
            f"resume_from_checkpoint: {str(path)!r} is damaged ({error}); copy it again, or go on "
            "from an earlier checkpoint"
        ) from error


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, each once however many names share it.

    Args:
        model: the `ActorCritic`, unwrapped.

    Source: ours.
    """
    return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained parameters back in place.

    Args:
        model: the `ActorCritic`, unwrapped.
        tensors: as `trained_tensors` returned them.

    Raises:
        ValueError: where names or shapes are not this model's; it names them.

    Source: ours.
    """
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    odd = sorted(set(own) ^ set(tensors))
    odd += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if odd:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint was made by another model; {len(odd)} "
            f"parameters differ, {odd[:3]} among them. Build the trainer with the same models"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write plain data, readable by people.

    Args:
        data: what JSON can hold.
        path: the file.

    Source: ours.
    """
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Args:
        path: the file.

    Source: ours.
    """
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, oldest first.

    Args:
        folder: an output directory.

    Source: ours.
    """
    for old in folder.glob(".checkpoint-*.old"):
        # Its replacement was about to take its name when the process ended.
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            old.rename(path)
    # Folders called checkpoint-old and the like are somebody's own.
    named = (p for p in folder.glob("checkpoint-*") if p.name[len("checkpoint-") :].isdecimal())
    found = [p for p in named if (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def prune(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond a number, never the best.

    Args:
        folder: an output directory.
        keep: how many to keep beside the best; None for all.
        best: the one that stays whatever its age.

    Source: ours.
    """
    if keep is None:
        return
    others = [path for path in checkpoints(folder) if path != best]
    for path in others[:-keep]:
        shutil.rmtree(path)


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints after a step into a folder of their own: they are of another run.

    Left where they are, the newest by number would be theirs, to be resumed from and to be kept.

    Args:
        folder: an output directory.
        step: the last one that belongs to the run; -1 where none does.

    Returns:
        where they are now; None where there were none.

    Source: ours.
    """
    foreign = [p for p in checkpoints(folder) if int(p.name.rpartition("-")[2]) > step]
    if not foreign:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    there = folder / f"earlier-{number}"
    there.mkdir()
    for path in [*foreign, *([folder / "completions.jsonl"] if step < 0 else [])]:
        if path.exists():
            path.rename(there / path.name)
    return there


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every model that is written.

    Source: ours.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def require_writable(folder: Path) -> None:
    """Refuse an output directory that cannot be written to, before anything is computed.

    Args:
        folder: made where absent.

    Raises:
        OSError: where it cannot be written to; it says what to do.

    Source: ours.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output_dir: {str(folder)!r} cannot be written to ({error}); choose another folder, "
            "or free space"
        ) from error
