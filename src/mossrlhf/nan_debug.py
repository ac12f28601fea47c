"""Save the batch of a step whose loss or gradient is not finite, and find the samples at fault."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, distributed, nn

from mossrlhf.loss import PPOMaxLoss
from mossrlhf.models import ActorCritic
from mossrlhf.serialization import load_tensors, read_json, save_tensors, write_json
from mossrlhf.types import LossOutput, Rollout
from mossrlhf.version import __version__

DESCRIPTION = "fault.json"
"""The file that is written last and read first."""

PLAIN = ("terms", "roles", "loss", "denominators", "process")
"""Fields of a `Fault` that JSON holds as they are."""


class NonFiniteError(FloatingPointError):
    """A gradient or statistic is not finite; no process has taken the step."""


@dataclass(frozen=True)
class Suspect:
    """A sample with a value that is not finite.

    Args:
        term: a column of the rollout ("advantages"), or "forward" or "backward" of a role.
        sample: its index in the minibatch of its process; in that of the PTX data for "ptx".
        process: index of that process.
        prompt: the row of its prompt in the training set; None if that is not known.
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
        suspects: samples of this process; empty if no single sample is at fault.
        rollout: the minibatch of this process, unchanged.
        roles: the roles in training.
        loss: the repr of the loss.
        denominators: the denominator of each role's loss.
        ptx: the batch of pre-training data, by name; empty without one.
        process: index of this process.
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
    """Write a fault as JSON and safetensors to ``<folder>/process-<k>``, and return that folder.

    Process 0 removes folders of processes that only an earlier run had.
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
        **{name: getattr(fault, name) for name in PLAIN},
        "suspects": [asdict(suspect) for suspect in fault.suspects],
        # Values that JSON does not support (an image, a date) are written by their repr.
        "columns": json.loads(json.dumps(dict(rollout.columns), default=repr)),
    }
    write_json(plain, path / DESCRIPTION)
    return path


def read_fault(folder: str | Path) -> Fault:
    """Read the batch of a non-finite loss or gradient that a run has saved in ``faults/``.

    Args:
        folder: ``<output_dir>/faults/step-<n>/process-<k>``, or the folder above it, for the first
            process with suspects.

    Returns:
        the fault; ``trainer.engine.step(fault.rollout, trainer.loss)`` repeats it without PTX.

    Raises:
        FileNotFoundError: if there is no fault in the folder.
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
        **{name: plain[name] for name in PLAIN},
        suspects=[Suspect(**suspect) for suspect in plain["suspects"]],
        rollout=rollout,
        ptx=parts.get("ptx", {}),
    )


def with_prompts(fault: Fault, rows: Sequence[int], dataset: Sequence[Mapping[str, Any]]) -> Fault:
    """Add to each suspect the row of its prompt, among the last `rows` read of the training set."""
    prompts = fault.rollout.columns.get("prompt")
    known = [(row, dict(dataset[row]).get("prompt")) for row in rows] if prompts else []

    def row_of(suspect: Suspect) -> int | None:
        if not prompts or suspect.term.startswith("ptx"):
            return None
        return next((row for row, prompt in known if prompt == prompts[suspect.sample]), None)

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


COLUMNS = (
    "sampler_logprobs", "logprobs", "ref_logprobs", "values", "bootstrap", "rewards", "advantages",
    "returns",
)  # fmt: skip
"""Columns of a rollout in the order of their computation: later ones depend on earlier ones."""

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Setups in which every process has all weights, and can run the models without the others."""


def in_columns(minibatch: Rollout) -> list[tuple[str, int]]:
    """Return the first column of a rollout with numbers that are not finite, and their samples.

    The minibatch is the original one, before normalization over its samples.
    """
    for name in COLUMNS:
        value: Tensor | None = getattr(minibatch, name)
        if value is None:
            continue
        broken = ~torch.isfinite(value)
        if value.ndim == 2:
            counts = minibatch.mask if "logprobs" in name else minibatch.mask | minibatch.states
            broken = (broken & counts).any(dim=1)
        if rows := broken.nonzero().flatten().tolist():
            return [(name, row) for row in rows]
    return []


@dataclass(frozen=True, kw_only=True)
class FailedStep:
    """What `diagnose` needs to repeat an optimizer step sample by sample.

    `wrapped` is `model` as accelerate wrapped it, `minibatch` is `given` prepared by the loss, and
    `denominators` are what the roles' losses are divided by.
    """

    model: ActorCritic
    wrapped: nn.Module
    accelerator: Accelerator
    given: Rollout
    minibatch: Rollout
    loss: PPOMaxLoss
    roles: Sequence[str]
    ptx: Mapping[str, Tensor] | None
    denominators: Mapping[str, Tensor]


def diagnose(
    step: FailedStep,
    terms: Sequence[str],
    keep: Callable[[Fault], tuple[str, Sequence[Suspect]]] | None = None,
) -> NonFiniteError:
    """Find the samples at fault and keep the batch; collective, with one error for all processes.

    `keep` stores a `Fault`, and returns a sentence with its folder, and its suspects with prompts.
    """
    process, processes = step.accelerator.process_index, step.accelerator.num_processes
    weights = [n for n, p in step.model.named_parameters() if not _finite(p.detach())]
    found = in_columns(step.given)
    if not found and not weights:
        found = in_models(step)
    fault = Fault(
        terms=terms,
        suspects=[Suspect(term, row, process) for term, row in found],
        rollout=step.given,
        roles=list(step.roles),
        loss=repr(step.loss),
        denominators={role: float(value) for role, value in step.denominators.items()},
        ptx=step.ptx or {},
        process=process,
    )
    kept, suspects = ("", fault.suspects) if keep is None else keep(fault)
    if processes > 1:
        suspects = gather_object(list(suspects))
    return NonFiniteError(
        f"not finite: {', '.join(terms)}; the step was not taken. "
        f"{_described(suspects, weights, len(step.given) * processes)} {kept}"
        "Look for a reward that explodes, a learning rate too high, or half-precision overflow"
    )


def in_models(step: FailedStep) -> list[tuple[str, int]]:
    """Run each sample alone, forward and then backward, and return those that are not finite."""
    if step.accelerator.distributed_type not in WHOLE:
        return []
    for backward in (False, True):
        for role in step.denominators:
            samples = enumerate(_samples(step, role))
            found = [
                row
                for row, (part, share) in samples
                if not _runs_finite(step, role, part, share, backward)
            ]
            if found:
                return [(f"{role} {'backward' if backward else 'forward'}", row) for row in found]
    return []


def _samples(step: FailedStep, role: str) -> Iterator[tuple[Any, Callable[..., LossOutput]]]:
    """Each sample of a role as a micro-batch, with its loss."""
    loss, denominator = step.loss, step.denominators[role]
    if role == "ptx":
        ptx = step.ptx or {}
        for row in range(len(next(iter(ptx.values()), ()))):
            part = {name: value[row : row + 1] for name, value in ptx.items()}
            yield part, partial(loss.ptx, denominator=denominator)
        return
    whole = loss.policy if role == "policy" else loss.critic
    for row in range(len(step.minibatch)):
        sample = step.minibatch.select(torch.tensor([row]))
        yield sample, partial(whole, batch=sample, denominator=denominator)


def _runs_finite(step: FailedStep, role: str, part: Any, share: Any, backward: bool) -> bool:
    extra = {"entropy": step.loss.entropy_coef is not None} if role == "policy" else {}
    # Not through the wrapper: its hooks would wait for other processes.
    with step.accelerator.no_sync(step.wrapped), torch.set_grad_enabled(backward):
        output = step.model(role, part, share, **extra)
        values = [output.loss, *output.stats.values()]
        if backward:
            step.accelerator.backward(output.loss)
            trained = [p for p in step.model.parameters() if p.grad is not None]
            values = [p.grad for p in trained if p.grad is not None]
            for parameter in trained:
                parameter.grad = None
    return all(_finite(value) for value in values)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _described(suspects: Sequence[Suspect], weights: Sequence[str], size: int) -> str:
    if weights:
        return f"The weights themselves are not finite: {', '.join(weights[:3])}."
    if not suspects:
        return (
            "The minibatch itself is finite, so the models' forward or backward is at fault; no "
            "single sample reproduces it."
        )
    shown = "; ".join(str(suspect) for suspect in suspects[:4])
    more = f"; {len(suspects) - 4} more" if len(suspects) > 4 else ""
    spread = len(suspects) >= size > 1
    hint = " All samples at once: one may have spread by a normalization." if spread else ""
    return f"In the minibatch, {shown}{more}.{hint}"
