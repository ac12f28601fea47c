"""One HTML page about a run, made only from its folder.

The template is `run_report.html.j2`, rendered with autoescape on: names of folders, rewards and
models, prompts and completions are always rendered as text.
"""

import base64
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from mossrlhf.checkpoint.folders import STATE, checkpoints
from mossrlhf.logging import completion_table
from mossrlhf.plotting import plot_arms, plot_history, plot_reward_histograms, png_bytes
from mossrlhf.serialization import read_json
from mossrlhf.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunFolder", "plot_run", "read_run", "run_page", "write_report"]

TRUE_QUALITY = "reward/true_quality/mean"
"""A metric of the toy world, plotted if a run logs it."""

STILL_SHARE, STILL_ITERATIONS = 0.05, 3
"""As in `StillWatch`: the share of weights that must change, and logged iterations in a row."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and the response of each model, by the model's name."""

    prompt: str
    responses: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The contents of a run's folder.

    Args:
        name: of the folder.
        history: `Trainer.history` of the newest checkpoint that can be read.
        completions: rows of ``completions.jsonl``.
        config: ``config.json``.
        settings: of the newest checkpoint that can be read.
        summary: ``summary.json``.
        samples: ``samples.md``.
        faults: names of the batches kept in ``faults/``.
        missing: one sentence for each file that is missing or cannot be read.
        runs: the runs in subfolders, if the folder holds several.
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


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run: one self-contained HTML file.

    Args:
        folder: of a run, or of several runs in subfolders.
        path: the file; None for ``report.html`` in the folder.

    Returns:
        the path of the file.

    Raises:
        FileNotFoundError: if the folder holds no run.
    """
    page = run_page(read_run(folder))
    path = Path(folder) / "report.html" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def plot_run(folder: str | Path, path: str | Path | None = None) -> "Figure":
    """Plot the curves of a run, or of several runs in the same panels, from a folder.

    Args:
        folder: of a run, or of several runs in subfolders.
        path: where to write the figure, in the format of its suffix; None to write no file.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if no checkpoint in the folder has a history.

    Source: P1 figures 4 and 9.
    """
    return _curves(read_run(folder), path)


# ---- reading ------------------------------------------------------------------------------------


def read_run(folder: str | Path) -> RunFolder:
    """Read the folder of a run, or a folder with several runs in subfolders.

    Args:
        folder: `TrainerConfig.output_dir`, or the folder of a recipe or of ``mossrlhf demo``.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"run: {str(folder)!r} is not a folder; pass a run's output_dir, which Trainer.train() "
            "and the recipes write to"
        )
    runs = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    if not _is_run(folder) and not runs and not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"run: {str(folder)!r} and the folders in it have no file of a run "
            "(completions.jsonl, checkpoint-<step>/, summary.json); pass the output_dir of a run "
            "that has logged an iteration"
        )
    return _read(folder, runs)


def _is_run(folder: Path) -> bool:
    nested = folder.name.startswith(("checkpoint-", "earlier-", "."))
    return not nested and bool((folder / "completions.jsonl").is_file() or checkpoints(folder))


def _read(folder: Path, runs: Sequence[Path], inside: bool = False) -> RunFolder:
    missing: list[str] = []
    history, settings = ([], {}) if runs else _read_checkpoint(folder, missing)
    rows = []
    if not runs:
        with suppress(OSError):
            rows = list(filter(_is_complete, completion_table(folder / "completions.jsonl")))
        if not rows:
            missing.append("completions.jsonl: no completions, so no histograms of rewards")
    # Runs in subfolders share the files of the folder above.
    config, summary = (
        {} if inside else _read_object(folder / name, missing)
        for name in ("config.json", "summary.json")
    )
    samples = read_samples(folder / "samples.md")
    if not samples and not inside:
        missing.append("samples.md: no responses to held-out prompts")
    faults = folder / "faults"
    return RunFolder(
        name=folder.resolve().name,
        history=history,
        completions=rows,
        config=config,
        settings=settings,
        summary=summary,
        samples=samples,
        faults=sorted(path.name for path in faults.iterdir()) if faults.is_dir() else [],
        missing=missing,
        runs=[_read(path, [], inside=True) for path in runs],
    )


def _is_complete(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and isinstance(row.get("completion"), str)


def _read_object(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"{path.name}: not found; recipes write it, a plain Trainer does not")
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


def _read_checkpoint(
    folder: Path, missing: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History and settings of the newest checkpoint that can be read."""
    for path in reversed(checkpoints(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            # A subclass may log other values than numbers.
            history = [
                {name: x for name, x in entry.items() if isinstance(x, int | float)}
                for entry in state["history"]
                if isinstance(entry, dict)
            ]
            settings = dict(state.get("settings") or {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            missing.append(f"{path.name}: cannot be read ({type(error).__name__}: {error})")
            continue
        return history, {**settings, "mossrlhf": state.get("version")}
    missing.append("checkpoint-<step>/: none that can be read, so no curves")
    return [], {}


def read_samples(path: Path) -> list[Sample]:
    """Read ``samples.md``, in which prompts and responses are quoted with ``>``; [] without it."""
    if not path.is_file():
        return []
    samples: list[tuple[list[str], dict[str, list[str]]]] = []
    # `splitlines` would also break at characters that a text may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith("## Prompt "):
            samples.append(([], {}))
        elif samples and line.startswith("**") and line.endswith("**"):
            samples[-1][1][line.strip("*")] = []
        elif samples and line.startswith(">"):
            prompt, responses = samples[-1]
            lines = list(responses.values())[-1] if responses else prompt
            lines.append(line[1:].removeprefix(" "))
    return [
        Sample(
            prompt="\n".join(prompt),
            responses={name: "\n".join(lines) for name, lines in responses.items()},
        )
        for prompt, responses in samples
    ]


# ---- warnings -----------------------------------------------------------------------------------


def run_warnings(run: RunFolder) -> list[str]:
    """Return the warnings about a run and the runs in its subfolders, one sentence each."""
    found = []
    if run.summary.get("interrupted"):
        found.append("The run was interrupted: the page shows the iterations before that.")
    found += _history_warnings([entry for entry in run.history if "step" in entry])
    if run.faults:
        found.append(
            "Steps were skipped, since a loss or gradient was not finite: "
            f"{', '.join(run.faults)} in faults/; mossrlhf.nan_debug.read_fault(folder) returns a "
            "batch."
        )
    return found + [f"{inner.name}: {text}" for inner in run.runs for text in run_warnings(inner)]


def _history_warnings(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    collapsed = [entry["step"] for entry in entries if entry.get("policy/collapsed")]
    if collapsed:
        yield (
            f"Collapse was detected in {len(collapsed)} of the logged iterations, first in "
            f"{collapsed[0]}: the policy is far from the reference, and its responses are "
            "monotonous. Ignore the score there."
        )
    moved = [e for e in entries if "policy/moved_fraction" in e and e.get("policy/learning_rate")]
    groups = groupby(moved, key=lambda entry: entry["policy/moved_fraction"] < STILL_SHARE)
    longest = max((len(list(group)) for still, group in groups if still), default=0)
    if longest >= STILL_ITERATIONS:
        yield (
            f"The policy hardly moved: in {longest} logged iterations in a row under "
            f"{STILL_SHARE:.0%} of its weights changed. Train float32 parameters, or raise "
            "learning_rate."
        )
    odd = sorted({name for entry in entries for name, x in entry.items() if _is_odd(name, x)})
    if odd:
        yield f"Numbers that are not finite were logged: {', '.join(odd)}."
    last: Mapping[str, Any] = next(
        (entry for entry in reversed(entries) if "response/truncated_fraction" in entry), {}
    )
    if (share := last.get("response/truncated_fraction", 0)) > 0.5:
        yield f"In iteration {last['step']} {share:.0%} of the responses reached the length limit."
    explained = last.get("critic/explained_variance")
    if explained is not None and explained <= 0:
        yield (
            f"In iteration {last['step']} the critic explains none of the variance of its targets "
            f"({explained:.2f}): Trainer.evaluate_critic() shows where it is wrong."
        )


def _is_odd(name: str, value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value) and not name.startswith("time/")


# ---- the page -----------------------------------------------------------------------------------


def run_page(run: RunFolder) -> str:
    """Return the page of a run as HTML.

    Args:
        run: by `read_run`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shortened"] = _shortened
    template = files("mossrlhf").joinpath("run_report.html.j2").read_text(encoding="utf-8")
    runs = run.runs or [run]
    of_run = {name: run.summary[name] for name in ("versions", "seconds") if name in run.summary}
    page = environment.from_string(template).render(
        run=run,
        runs=runs,
        version=__version__,
        warnings=run_warnings(run),
        missing=[*run.missing, *(f"{r.name}/{text}" for r in run.runs for text in r.missing)],
        curves=_curves_picture(run),
        histograms=[(inner.name, _histograms(inner)) for inner in runs],
        rollouts=[(inner.name, *_rollouts(inner)) for inner in runs],
        numbers=_last_numbers(runs),
        configuration=_configuration(run),
        environment=_flat(of_run),
    )
    # JSON may hold half of a surrogate pair, which is not a character, and NUL, invalid in HTML.
    return page.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _curves(run: RunFolder, path: str | Path | None = None) -> "Figure":
    histories = {inner.name: inner.history for inner in run.runs if inner.history}
    if len(histories) <= 1:
        return plot_history(next(iter(histories.values()), run.history), path)
    logged = {name for history in histories.values() for entry in history for name in entry}
    return plot_arms(histories, path, true_quality=TRUE_QUALITY if TRUE_QUALITY in logged else None)


def _picture(draw: Callable[[], "Figure"], notes: Iterable[str] = ()) -> dict[str, Any]:
    """A figure as base64, or a note why there is none."""
    try:
        return {"png": base64.b64encode(png_bytes(draw())).decode("ascii"), "notes": notes}
    except (ImportError, ValueError) as error:
        return {"png": None, "notes": [f"There is no figure: {error}"]}


def _curves_picture(run: RunFolder) -> dict[str, Any]:
    if any(inner.history for inner in (run, *run.runs)):
        return _picture(lambda: _curves(run))
    note = (
        "There is no history to plot: no checkpoint that can be read. train() writes one at its "
        "end, and one every save_steps iterations."
    )
    return {"png": None, "notes": [note]}


def _histograms(run: RunFolder) -> dict[str, Any]:
    if not run.completions:
        return {"png": None, "notes": ["There are no completions with rewards."]}
    note = (
        "Rewards in completions.jsonl, which has the first responses of each logged iteration. "
        "The dotted line is their mean."
    )
    return _picture(lambda: plot_reward_histograms(run.completions), [note])


def _rollouts(run: RunFolder) -> tuple[list[int], list[list[tuple[str, str]]]]:
    """Three iterations (first, middle, last), and rows with one response of each."""
    steps = sorted({row["step"] for row in run.completions})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    by_step = [[row for row in run.completions if row["step"] == step] for step in shown]
    rows = [
        [_card(rows[number]) for rows in by_step if number < len(rows)]
        for number in range(max(map(len, by_step), default=0))
    ]
    return shown, rows


def _card(row: Mapping[str, Any]) -> tuple[str, str]:
    rewards = [
        f"{name.removeprefix('reward/')} {value:g}"
        for name, value in row.items()
        if name.startswith("reward/") and isinstance(value, int | float)
    ]
    heading = ": ".join([f"iteration {row['step']}", *([", ".join(rewards)] if rewards else [])])
    return heading, f"{row.get('prompt', '')}\n→ {row['completion']}"


def _last_numbers(runs: Sequence[RunFolder]) -> list[list[Any]]:
    """The last training and evaluation metrics: a row each, a column for each run."""
    columns: list[dict[str, Any]] = []
    for run in runs:
        steps = [entry for entry in run.history if "step" in entry]
        evaluations = [e for e in steps if any(name.startswith("eval/") for name in e)]
        training = [e for e in steps if e not in evaluations]
        last = evaluations[-1:] + training[-1:]
        columns.append({name: value for entry in last for name, value in entry.items()})
    names = sorted({name for column in columns for name in column}, key=lambda n: (n != "step", n))
    return [[name, *(column.get(name) for column in columns)] for name in names]


def _configuration(run: RunFolder) -> list[tuple[str, list[tuple[str, Any]]]]:
    tables = [("config.json", run.config)]
    tables += [(f"{inner.name}, checkpoint", inner.settings) for inner in (run, *run.runs)]
    return [(title, _flat(values)) for title, values in tables if values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values; those in nested dictionaries have dotted names."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _shortened(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
