"""Rows of the table of bad inputs: what is given, what it gets, and the code that gives it."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bad_inputs.shop import Shop

GAP = "…"
"""Stands in what is promised for any run of characters; the end of a message may be left out."""


@dataclass(frozen=True)
class Row:
    """One bad input.

    Args:
        given: what is given, for people.
        gets: the type of the error and what its message says, with gaps; or "warning", or "taken"
            and why, of what looks bad and is not.
        work: gives it.
    """

    given: str
    gets: str
    work: Callable[[Shop], Any]

    def run(self, shop: Shop) -> str:
        """Give it, and return what came of it in the form of `gets`, whole."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.work(shop)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        told = [warning for warning in caught if issubclass(warning.category, UserWarning)]
        return "\n".join(f"warning: {warning.message}" for warning in told) or "taken"

    def holds(self, outcome: str) -> bool:
        """Whether what came is what the row promises."""
        if self.gets.startswith("taken: "):
            return outcome == "taken"
        parts = map(re.escape, self.gets.split(GAP))
        return re.match(f"{GAP}?{'.*'.join(parts)}", outcome, re.DOTALL) is not None


@dataclass
class Room:
    """The rows on inputs of one kind.

    Args:
        title: of the section.
    """

    title: str
    rows: list[Row] = field(default_factory=list)

    def row(self, given: str, gets: str, work: Callable[[Shop], Any] | None = None) -> Any:
        """Add a row; without `work`, the function below is it."""
        if work is None:
            return lambda function: self.row(given, gets, function)
        self.rows.append(Row(given, gets, work))
        return work
