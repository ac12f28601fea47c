"""What an optimizer step that was not taken leaves behind: the batch, and whom it suspects."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from mossrlhf.checkpoint import load_tensors, read_json, save_tensors, write_json
from mossrlhf.types import Rollout
from mossrlhf.version import __version__

DESCRIPTION = "fault.json"
"""The file that is written last and read first."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient is not finite; no process has taken the step. Source: ours."""


@dataclass(frozen=True)
class Suspect:
    """A sample of which something is not finite.

    Args:
        term: what: a column of the rollout ("advantages"), or "forward" or "backward" of a role.
        sample: its index in the minibatch of its process; in that of the PTX data for "ptx".
        process: whose minibatch it is.
        prompt: the row of the training set its prompt is; None where that is not known.

    Source: ours.
    """

    term: str
    sample: int
    process: int = 0
    prompt: int | None = None

    def __str__(self) -> str:
        prompt = "" if self.prompt is None else f", prompt {self.prompt} of train_dataset"
        return f"{self.term} of sample {self.sample} is not finite (process {self.process}{prompt})"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A step that was not taken, as one process saw it.

    Args:
        terms: statistics and gradient norms that are not finite, over all processes.
        suspects: samples of this process; where there are none, none is at fault alone.
        rollout: the minibatch of this process, as it came.
        roles: who was to learn.
        loss: what was to be minimized, as it shows itself.
        denominators: by role, what its loss was divided by.
        ptx: the batch of pre-training data, by name; empty where there was none.
        process: which of them this is.

    Source: ours.
    """

    terms: Sequence[str]
    suspects: Sequence[Suspect]
    rollout: Rollout
    roles: Sequence[str]
    loss: str
    denominators: Mapping[str, float]
    ptx: Mapping[str, Tensor] = field(default_factory=dict)
    process: int = 0


def write_fault(fault: Fault, folder: Path) -> Path:
    """Write a fault as JSON and safetensors; an older one of the same name is replaced.

    Each process replaces its own folder; process 0 removes those of processes there are no more,
    as an earlier run on more of them leaves. No folder is touched by two of them.

    Args:
        fault: of this process.
        folder: of the step; each process has a folder of its own in it.

    Returns:
        the folder of the process.

    Raises:
        OSError: where it cannot be written.

    Source: ours.
    """
    path = folder / f"process-{fault.process}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    if fault.process == 0:
        _remove_beyond(folder, _processes())
    rollout, tensors = fault.rollout, {}
    for spec in fields(rollout):
        if isinstance(value := getattr(rollout, spec.name), Tensor):
            tensors[f"rollout.{spec.name}"] = value
    tensors |= {f"extra.{name}": value for name, value in rollout.extra.items()}
    tensors |= {f"ptx.{name}": value for name, value in fault.ptx.items()}
    save_tensors(
        {name: t.detach().cpu() for name, t in tensors.items()}, path / "batch.safetensors"
    )
    plain = {
        "version": __version__,
        "terms": list(fault.terms),
        "suspects": [asdict(suspect) for suspect in fault.suspects],
        "roles": list(fault.roles),
        "loss": fault.loss,
        "denominators": dict(fault.denominators),
        "process": fault.process,
        # What JSON does not know (an image, a date) is for people to read.
        "columns": json.loads(json.dumps(dict(rollout.columns), default=repr)),
    }
    write_json(plain, path / DESCRIPTION)
    return path


def read_fault(folder: str | Path) -> Fault:
    """Read what a run that met a non-finite loss or gradient has left in ``faults/``.

    Args:
        folder: ``<output_dir>/faults/step-<n>/process-<k>``, or the folder above it, of which the
            first process that suspects anything is taken.

    Returns:
        the fault; ``trainer.engine.step(fault.rollout, trainer.loss)`` tries the step again.

    Raises:
        FileNotFoundError: where there is none.

    Source: ours.
    """
    path = Path(folder)
    if not (path / DESCRIPTION).is_file():
        found = sorted(path.glob(f"process-*/{DESCRIPTION}"))
        if not found:
            raise FileNotFoundError(
                f"folder: {str(path)!r} holds no {DESCRIPTION}, nor do folders process-* in it; "
                "name a folder like <output_dir>/faults/step-3"
            )
        suspecting = [file for file in found if read_json(file)["suspects"]]
        path = (suspecting or found)[0].parent
    plain, parts = read_json(path / DESCRIPTION), _by_prefix(path / "batch.safetensors")
    given: dict[str, Any] = dict(parts.get("rollout", {}))
    rollout = Rollout(**given, columns=plain["columns"], extra=parts.get("extra", {}))
    return Fault(
        terms=plain["terms"],
        suspects=[Suspect(**suspect) for suspect in plain["suspects"]],
        rollout=rollout,
        roles=plain["roles"],
        loss=plain["loss"],
        denominators=plain["denominators"],
        ptx=parts.get("ptx", {}),
        process=plain["process"],
    )


def with_prompts(fault: Fault, rows: Sequence[int], dataset: Sequence[Mapping[str, Any]]) -> Fault:
    """Name the prompts of the suspects by their rows in the training set.

    Args:
        fault: of this process.
        rows: which rows this process has drawn last.
        dataset: the training set.

    Source: ours.
    """
    asked = fault.rollout.columns.get("prompt")
    known = [(row, dict(dataset[row]).get("prompt")) for row in rows] if asked else []

    def row_of(suspect: Suspect) -> int | None:
        if not asked or suspect.term.startswith("ptx"):
            return None
        return next((row for row, prompt in known if prompt == asked[suspect.sample]), None)

    named = [replace(suspect, prompt=row_of(suspect)) for suspect in fault.suspects]
    return replace(fault, suspects=named)


def _processes() -> int:
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def _remove_beyond(folder: Path, processes: int) -> None:
    for older in folder.glob("process-*"):
        number = older.name.removeprefix("process-")
        if number.isdecimal() and int(number) >= processes:
            shutil.rmtree(older)


def _by_prefix(path: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(path).items():
        prefix, _, rest = name.partition(".")
        parts.setdefault(prefix, {})[rest] = tensor
    return parts
