"""Files of a checkpoint: tensors in safetensors, the rest in JSON, with checksums."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging

from mossrlhf.distributed.sharding import full, put, shape, share_of

CHECKSUM = "crc32"
"""Under which name a state has its own."""


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and plain numbers.

    Where it is sharded, all processes ask for it together, and get all of it.

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
                tensors[f"{index}.{name}"] = full(value.detach()).cpu().contiguous()
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
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = share_of(parameters[int(index)], value)
    groups = [dict(group) for group in plain["groups"]]
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        # How a step is computed is not of the checkpoint, which may be of another release.
        group.update({name: own[name] for name in ("fused", "foreach") if name in own})
        group["betas"] = tuple(group["betas"]) if "betas" in group else None
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


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
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Return length and check sum of every file of tensors in a folder.

    Args:
        folder: of a checkpoint; what is in folders of its own (the models as others load them) is
            not read by a resume, and not sealed.

    Source: ours; safetensors holds no check sum.
    """
    return {path.name: _measure(path) for path in sorted(folder.glob("*.safetensors"))}


def sealed_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with its own check sum beside it.

    Args:
        state: what JSON can hold; a check sum that is in it already is made anew.

    Source: ours.
    """
    data = {name: value for name, value in state.items() if name != CHECKSUM}
    text = json.dumps(data, sort_keys=True, ensure_ascii=False)
    return {**data, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}


def require_sealed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a checkpoint whose files are not what `seal` saw.

    Args:
        folder: of the checkpoint.
        files: what `seal` returned when it was written.

    Raises:
        ValueError: which file, and how it differs.

    Source: ours.
    """
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        found = _measure(path)
        for what in ("bytes", "crc32"):
            if found[what] != expected[what]:
                raise ValueError(
                    f"{name} is damaged (its {what}: {found[what]}, expected {expected[what]})"
                )


def _measure(path: Path) -> dict[str, Any]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"bytes": path.stat().st_size, "crc32": f"{checksum:08x}"}


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
    odd += [n for n in own if n in tensors and shape(own[n]) != tensors[n].shape]
    if odd:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint was made by another model; {len(odd)} "
            f"parameters differ, {odd[:3]} among them. Build the trainer with the same models"
        )
    for name, parameter in own.items():
        put(parameter, tensors[name])


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write plain data, readable by people.

    Args:
        data: what JSON can hold.
        path: the file.

    Source: ours.
    """
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote.

    Args:
        path: the file.

    Raises:
        ValueError: where it is no JSON.

    Source: ours.
    """
    return json.loads(path.read_text(encoding="utf-8"))


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
