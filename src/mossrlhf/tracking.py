"""What a run says: lines on the console, tables of completions, numbers to the trackers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("step", "step", "{:>6.0f}"),
    ("score", "reward/score_mean", "{:>8.3f}"),
    ("KL/seq", "kl/ref_per_sequence", "{:>8.2f}"),
    ("length", "response/length_tokens", "{:>8.1f}"),
    ("ppl", "perplexity/policy", "{:>8.2f}"),
    ("ppl ref", "perplexity/ref", "{:>8.2f}"),
    ("clip", "policy/clip_fraction", "{:>7.3f}"),
    ("v-loss", "critic/loss", "{:>8.3f}"),
    ("expl.", "critic/explained_variance", "{:>7.2f}"),
)
"""Heading, metric and format of each column of the console table: 77 characters in all."""


class ConsoleTable:
    """Prints one line per logged step, 80 columns wide, beneath a heading.

    Args:
        every: lines between headings.

    Source: ours.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.lines = 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Print the line of a step.

        Args:
            metrics: by name; what is missing stays blank.
        """
        if self.lines % self.every == 0:
            tqdm.write(self.heading())
        tqdm.write(self.line(metrics))
        self.lines += 1

    @staticmethod
    def heading() -> str:
        """Return the names of the columns, aligned with them."""
        return " ".join(_fit(name, form) for name, _, form in COLUMNS)

    @staticmethod
    def line(metrics: Mapping[str, float]) -> str:
        """Return the line of a step.

        Args:
            metrics: by name.
        """
        cells = []
        for _, name, form in COLUMNS:
            value = metrics.get(name)
            cells.append(_fit("" if value is None else form.format(value).strip(), form))
        return " ".join(cells)


def _fit(text: str, form: str) -> str:
    width = int(form[3 : form.index(".")])
    # A number too wide for its column is given in fewer digits, never spilled over the next.
    return (f"{float(text):.1e}" if len(text) > width else text).rjust(width)


@dataclass(frozen=True)
class Completions:
    """Writes some completions of each step to ``completions.jsonl``, to be read by people.

    Args:
        path: the file; its folder is made.
        limit: completions of a step.

    Source: ours.
    """

    path: Path
    limit: int = 8

    def __call__(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[float]],
    ) -> None:
        """Append the first completions of a step.

        Args:
            step: the iteration.
            prompts: texts.
            completions: texts.
            columns: numbers by name, one for each completion: scores, lengths, KL.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for i in range(min(self.limit, len(completions))):
                row: dict[str, Any] = {"step": step, "prompt": prompts[i]}
                row["completion"] = completions[i]
                row.update({name: round(float(column[i]), 4) for name, column in columns.items()})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def completion_table(path: Path | str, step: int | None = None) -> list[dict[str, Any]]:
    """Read back completions, of one step or of all.

    Args:
        path: ``completions.jsonl``.
        step: the iteration; None for all of them.

    Source: ours.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if step is None or row["step"] == step]
