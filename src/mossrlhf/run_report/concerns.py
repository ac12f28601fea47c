"""What of a run calls for a second look, by what its folder holds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mossrlhf.run_report.reading import RunFolder

STILL, PATIENCE = 0.05, 3
"""Share of the weights that must change, and logged iterations in a row that they may not: as of
`StillWatch`."""


def concerns(run: RunFolder) -> list[str]:
    """Return what calls for a second look: a sentence each, as plain text.

    Args:
        run: with its subfolders.

    Source: ours; collapse and stillness as in `mossrlhf.monitor`.
    """
    found = [*_of_summary(run), *_of_history(run.history), *_of_faults(run)]
    return found + [f"{inner.name}: {said}" for inner in run.runs for said in concerns(inner)]


def _of_summary(run: RunFolder) -> Iterator[str]:
    if run.summary.get("interrupted"):
        yield "The run was interrupted: what follows is of the iterations before that."


def _of_faults(run: RunFolder) -> Iterator[str]:
    if run.faults:
        yield (
            "Steps were not taken, since a loss or gradient was not finite: "
            f"{', '.join(run.faults)} in faults/; mossrlhf.nan_debug.read_fault(folder) returns a "
            "batch."
        )


def _of_history(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    steps = [entry for entry in history if "step" in entry]
    collapsed = [entry["step"] for entry in steps if entry.get("policy/collapsed")]
    if collapsed:
        yield (
            f"Collapse was detected in {len(collapsed)} of the logged iterations, first in "
            f"{collapsed[0]}: far from the reference and monotonous. The score means nothing there."
        )
    moved = [e for e in steps if "policy/moved_fraction" in e and e.get("policy/learning_rate")]
    runs = groupby(moved, key=lambda entry: entry["policy/moved_fraction"] < STILL)
    longest = max((len(list(entries)) for still, entries in runs if still), default=0)
    if longest >= PATIENCE:
        yield (
            f"The policy hardly moved: in {longest} logged iterations in a row under {STILL:.0%} "
            "of its weights changed. Train float32 parameters, or raise learning_rate."
        )
    broken = sorted({name for entry in steps for name, x in entry.items() if _is_broken(name, x)})
    if broken:
        yield f"Numbers that are not finite were logged: {', '.join(broken)}."
    last: Mapping[str, Any] = next(
        (e for e in reversed(steps) if "response/truncated_fraction" in e), {}
    )
    if last.get("response/truncated_fraction", 0) > 0.5:
        yield (
            f"In iteration {last['step']} {last['response/truncated_fraction']:.0%} of the "
            "responses hit the length limit."
        )
    explained = last.get("critic/explained_variance")
    if explained is not None and explained <= 0:
        yield (
            f"In iteration {last['step']} the critic explains none of the variance of its targets "
            f"({explained:.2f}): Trainer.evaluate_critic() says where it is wrong."
        )


def _is_broken(name: str, value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value) and not name.startswith("time/")
