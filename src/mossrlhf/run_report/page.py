"""The page of a run: warnings, curves, histograms, samples, configuration, environment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mossrlhf.charts import plot_reward_histograms
from mossrlhf.drawing import png_bytes
from mossrlhf.plotting import plot_arms, plot_history
from mossrlhf.run_report.concerns import concerns
from mossrlhf.run_report.html import (
    cards,
    escaped,
    flat,
    paragraphs,
    picture,
    quoted,
    section,
    table,
    whole_page,
)
from mossrlhf.run_report.reading import RunFolder, read_run
from mossrlhf.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUE_QUALITY = "reward/true_quality/mean"
"""Measured in the toy world; drawn where a run logs it."""


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run: one HTML file that needs nothing else, not even a network.

    Args:
        folder: of a run, or of several runs in subfolders.
        path: the file; None for ``report.html`` in the folder.

    Returns:
        where it is.

    Raises:
        FileNotFoundError: where the folder holds nothing that a run leaves.

    Source: ours.
    """
    page = run_page(read_run(folder))
    path = Path(folder) / "report.html" if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def plot_run(folder: str | Path, path: str | Path | None = None) -> "Figure":
    """Draw the curves of a run, or of several runs over each other, from what is in a folder.

    Args:
        folder: of a run, or of several runs in subfolders.
        path: where to write the picture, in the format of its suffix; None for nowhere.

    Returns:
        the figure; a notebook shows it.

    Raises:
        FileNotFoundError: where the folder holds nothing that a run leaves.
        ImportError: without matplotlib; it says what to install.
        ValueError: where no checkpoint in it has a history.

    Source: P1 figures 4 and 9.
    """
    return _curves(read_run(folder), path)


def run_page(run: RunFolder) -> str:
    """Return the page of a run as HTML.

    Args:
        run: by `read_run`.

    Source: ours.
    """
    runs = run.runs or [run]
    warned = concerns(run)
    missing = [*run.missing, *(f"{r.name}/{said}" for r in run.runs for said in r.missing)]
    fine = [] if warned else ["Nothing in these files calls for a second look."]
    sections = {
        "warnings": section(
            "warnings",
            "Warnings",
            paragraphs("warn", warned),
            paragraphs("fine", fine),
            paragraphs("note", [f"Missing: {said}" for said in missing]),
        ),
        "curves": section("curves", "Curves", _drawn_curves(run)),
        "rewards": section("rewards", "Rewards over the steps", *map(_histograms, runs)),
        "samples": section("samples", "Samples", _held_out(run), *map(_rollouts, runs)),
        "numbers": section("numbers", "Last numbers", _numbers(runs)),
        "configuration": section("configuration", "Configuration", _configuration(run)),
        "environment": section("environment", "Environment", _environment(run)),
    }
    said = f"{len(run.runs)} runs: {', '.join(r.name for r in run.runs)}" if run.runs else ""
    lead = f'<p class="note">{escaped(said)}</p>' if said else ""
    return whole_page(f"Run report: {run.name}", lead, sections, __version__)


def _curves(run: RunFolder, path: str | Path | None = None) -> "Figure":
    histories = {inner.name: inner.history for inner in run.runs if inner.history}
    if len(histories) <= 1:
        return plot_history(next(iter(histories.values()), run.history), path)
    logged = {name for history in histories.values() for entry in history for name in entry}
    true = TRUE_QUALITY if TRUE_QUALITY in logged else None
    return plot_arms(histories, path, true_quality=true)


def _drawn_curves(run: RunFolder) -> str:
    if not any(inner.history for inner in (run, *run.runs)):
        said = (
            "There is no history to draw: no checkpoint that can be read. train() leaves one at "
            "its end, and one every save_steps iterations."
        )
        return paragraphs("note", [said])
    try:
        return picture(png_bytes(_curves(run)), "Curves of the run over PPO iterations")
    except (ImportError, ValueError) as error:
        return paragraphs("note", [f"The curves are not drawn: {error}"])


def _histograms(run: RunFolder) -> str:
    if not run.completions:
        return paragraphs("note", [f"{run.name}: there are no completions to take rewards from."])
    head = f"<h3>{escaped(run.name)}</h3>"
    note = (
        "Of the responses in completions.jsonl, which are the first of each logged iteration, not "
        "all of them. The dotted line is their mean."
    )
    try:
        drawn = picture(
            png_bytes(plot_reward_histograms(run.completions)),
            f"Histograms of the rewards of {run.name}, from early to late iterations",
        )
    except (ImportError, ValueError) as error:
        return paragraphs("note", [f"{run.name}: the histograms are not drawn: {error}"])
    return head + paragraphs("note", [note]) + drawn


def _held_out(run: RunFolder) -> str:
    if not run.samples:
        return ""
    parts = ["<h3>Answers to the same prompts</h3>"]
    for sample in run.samples:
        parts += [quoted(sample.prompt), cards(sample.answers)]
    return "\n".join(parts)


def _rollouts(run: RunFolder) -> str:
    """Responses of an early, a middle and a late iteration, side by side."""
    steps = sorted({row["step"] for row in run.completions})
    if not steps:
        return paragraphs("note", [f"{run.name}: there are no completions to show."])
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    by_step = [[row for row in run.completions if row["step"] == step] for step in shown]
    parts = [f"<h3>{escaped(run.name)}: responses of iterations {', '.join(map(str, shown))}</h3>"]
    for number in range(max(map(len, by_step))):
        columns = {
            f"iteration {rows[number]['step']}{_rewards(rows[number])}": _said(rows[number])
            for rows in by_step
            if number < len(rows)
        }
        parts.append(cards(columns))
    return "\n".join(parts)


def _said(row: Mapping[str, Any]) -> str:
    return f"{row.get('prompt', '')}\n→ {row['completion']}"


def _rewards(row: Mapping[str, Any]) -> str:
    found = [
        f"{name.removeprefix('reward/')} {value:g}"
        for name, value in row.items()
        if name.startswith("reward/") and isinstance(value, int | float)
    ]
    return f": {', '.join(found)}" if found else ""


def _numbers(runs: Sequence[RunFolder]) -> str:
    """The last training and evaluation metrics of every run, a column each."""
    last: list[dict[str, Any]] = []
    for run in runs:
        steps = [entry for entry in run.history if "step" in entry]
        training = [e for e in steps if not any(name.startswith("eval/") for name in e)]
        evaluations = [e for e in steps if any(name.startswith("eval/") for name in e)]
        last.append({n: v for e in (evaluations[-1:] + training[-1:]) for n, v in e.items()})
    names = sorted({name for found in last for name in found}, key=lambda n: (n != "step", n))
    if not names:
        return paragraphs("note", ["There is no history to take them from."])
    rows = [[name, *(found.get(name) for found in last)] for name in names]
    return table(["metric", *(run.name for run in runs)], rows)


def _configuration(run: RunFolder) -> str:
    parts = [("config.json", run.config)]
    parts += [(f"{inner.name}, checkpoint", inner.settings) for inner in (run, *run.runs)]
    parts = [(title, values) for title, values in parts if values]
    if not parts:
        return paragraphs("note", ["There is neither config.json nor a checkpoint to read it of."])
    found = (
        f"<h3>{escaped(title)}</h3>" + table(["option", "value"], flat(values))
        for title, values in parts
    )
    return "\n".join(found)


def _environment(run: RunFolder) -> str:
    rows = flat(
        {name: run.summary[name] for name in ("versions", "seconds") if name in run.summary}
    )
    if not rows:
        return paragraphs("note", ["There is no summary.json to read versions and times of."])
    return table(["", ""], rows)
