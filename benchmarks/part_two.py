"""What the studies of Part II share: methods by name, columns, tables in pages."""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

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
