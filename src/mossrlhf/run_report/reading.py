"""Whatever a run has left in its folder, and what is missing there."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.serialization import read_json
from mossrlhf.tracking import completion_table


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt with the answers of several models.

    Args:
        prompt: a text.
        answers: a text by the model's name.

    Source: ours.
    """

    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What was found in a run's folder.

    Args:
        name: of the folder.
        history: `Trainer.history`, of the newest checkpoint that can be read.
        completions: rows of ``completions.jsonl``.
        config: of ``config.json``.
        settings: what the newest checkpoint says that the run was made with, its format aside.
        summary: of ``summary.json``.
        samples: of ``samples.md``.
        faults: batches that were kept in ``faults/``, by name.
        missing: what was looked for and is not there, or cannot be read: a sentence each.
        runs: those in subfolders, where the folder holds several.

    Source: ours.
    """

    name: str
    history: Sequence[Mapping[str, Any]] = ()
    completions: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    faults: Sequence[str] = ()
    missing: Sequence[str] = ()
    runs: Sequence["RunFolder"] = ()


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder, or one with the folders of several runs in it.

    Args:
        folder: `TrainerConfig.output_dir`, or the folder of a recipe or of ``mossrlhf demo``.

    Raises:
        FileNotFoundError: where there is no such folder, or nothing that a run leaves in it.

    Source: ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"run: {str(folder)!r} is no folder; pass a run's output_dir, which Trainer.train() "
            "and the recipes write to"
        )
    runs = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    if not _is_run(folder) and not runs and not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"run: {str(folder)!r} holds nothing that a run leaves (completions.jsonl, "
            "checkpoint-<step>/, summary.json), nor do folders in it; pass the output_dir of a run "
            "that has logged an iteration"
        )
    return _read(folder, runs)


def _is_run(folder: Path) -> bool:
    nested = folder.name.startswith(("checkpoint-", "earlier-", "."))
    return not nested and bool((folder / "completions.jsonl").is_file() or checkpoints(folder))


def _read(folder: Path, runs: Sequence[Path], inside: bool = False) -> RunFolder:
    missing: list[str] = []
    history, settings = ([], {}) if runs else _newest(folder, missing)
    rows = []
    if not runs:
        with suppress(OSError):
            rows = [row for row in completion_table(folder / "completions.jsonl") if _whole(row)]
        if not rows:
            missing.append("completions.jsonl: no completions, so no histograms of rewards")
    faults = folder / "faults"
    found: dict[str, Any] = {}
    for name in ("config", "summary"):
        # A run among others shares theirs.
        found[name] = {} if inside else _json(folder / f"{name}.json", missing)
    samples = read_samples(folder / "samples.md")
    if not samples and not inside:
        missing.append("samples.md: no answers to held-out prompts")
    return RunFolder(
        name=folder.resolve().name,
        history=history,
        completions=rows,
        settings=settings,
        samples=samples,
        faults=sorted(path.name for path in faults.iterdir()) if faults.is_dir() else [],
        missing=missing,
        runs=[_read(path, [], inside=True) for path in runs],
        **found,
    )


def _whole(row: Any) -> bool:
    """Whether a row says when it was written, and what: the file may be anybody's."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get("completion"), str)
    )


def _json(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"{path.name}: not there; recipes write it, a plain Trainer does not")
        return {}
    try:
        found = read_json(path)
    except ValueError as error:
        missing.append(f"{path.name}: cannot be read ({error})")
        return {}
    if not isinstance(found, dict):
        missing.append(f"{path.name}: holds {type(found).__name__}, expected an object")
        return {}
    return found


def _newest(folder: Path, missing: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history of the newest checkpoint that can be read, and what it was made with."""
    for path in reversed(checkpoints(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            history = [_numbers(entry) for entry in state["history"] if isinstance(entry, dict)]
            settings = dict(state.get("settings") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            missing.append(f"{path.name}: cannot be read ({type(error).__name__}: {error})")
            continue
        return history, {**settings, "mossrlhf": state.get("version")}
    missing.append("checkpoint-<step>/: none that can be read, so no curves")
    return [], {}


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What of an entry can be drawn and compared: a subclass may log what is no number."""
    return {name: x for name, x in entry.items() if isinstance(x, int | float)}


def read_samples(path: Path) -> list[Sample]:
    """Read back ``samples.md``.

    What models and people said stands behind ``>`` there, so nothing of it can be taken for a
    heading.

    Args:
        path: the file; there may be none.

    Source: ours; the format is that of the recipes.
    """
    if not path.is_file():
        return []
    samples: list[tuple[list[str], dict[str, list[str]]]] = []
    # Not `splitlines`: it would also break at characters that a text may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith("## Prompt "):
            samples.append(([], {}))
        elif samples and line.startswith("**") and line.endswith("**"):
            samples[-1][1][line.strip("*")] = []
        elif samples and line.startswith(">"):
            prompt, answers = samples[-1]
            said = list(answers.values())[-1] if answers else prompt
            said.append(line[1:].removeprefix(" "))
    return [
        Sample(
            prompt="\n".join(prompt),
            answers={name: "\n".join(lines) for name, lines in answers.items()},
        )
        for prompt, answers in samples
    ]
