"""What the studies of Part II share: methods by name, columns, tables in pages."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mossrlhf.version import versions

Record = dict[str, Any]
Records = Sequence[Mapping[str, Any]]
Method = Callable[[Records], list[Record]]


def treated(records: Records, methods: Sequence[Method]) -> Records:
    """Return records as methods make them, one after the other."""
    for method in methods:
        records = method(records)
    return records


def columns(records: Records) -> dict[str, str]:
    """Return the options of `RewardTrainer` for the columns that methods have written."""
    known = {"margin_column": "margin", "smoothing_column": "label_smoothing"}
    return {option: name for option, name in known.items() if name in records[0]}


def run_seeds(
    seeds: Iterable[int],
    path: Path,
    settings: Mapping[str, Any],
    work: Callable[[int], dict[str, Any]],
    command: str,
) -> None:
    """Run seeds, keeping the figures of each; those kept with the same settings are not run again.

    Args:
        seeds: to run.
        path: of the JSON.
        settings: that the figures depend on.
        work: from a seed to its figures.
        command: that runs this, up to the numbers of the seeds.
    """

    def kept() -> dict[str, Any]:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(found["seeds"]) if found.get("settings") == settings else {}

    for seed in seeds:
        if str(seed) in kept():
            print(f"seed {seed} is kept in {path.name}")
            continue
        print(f"seed {seed}", flush=True)
        begun = time.perf_counter()
        found = work(seed)
        found = {**found, "seconds": round(time.perf_counter() - begun)}
        done = {**kept(), str(seed): found}  # read again: other seeds may run beside this one
        done = dict(sorted(done.items(), key=lambda item: int(item[0])))
        figures = {
            "command": " ".join([command, *done]),
            "settings": settings,
            "versions": versions(),
            "seeds": done,
        }
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def between(page: str, marks: tuple[str, str], lines: Sequence[str]) -> str:
    """Put lines into a page, between a mark that it has once and the next end."""
    before, rest = page.split(marks[0])
    _, after = rest.split(marks[1], 1)
    return "".join([before, marks[0], "\n".join(lines), "\n", marks[1], after])


def spread(values: Sequence[float], form: str) -> str:
    """Lay out the values of all seeds."""
    return ", ".join(format(value, form) for value in values)


def with_error(values: Sequence[float], form: str) -> str:
    """Lay out the mean of seeds and its standard error."""
    return f"{mean(values):{form}} ± {stdev(values) / len(values) ** 0.5:{form.lstrip('+')}}"
