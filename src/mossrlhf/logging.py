"""Logging of a run: lines on the console, completions in a file, metrics to trackers."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

COLUMNS: tuple[tuple[str, str, int, int], ...] = (
    ("step", "step", 6, 0),
    ("score", "reward/score_mean", 8, 3),
    ("KL/seq", "kl/ref_per_sequence", 8, 2),
    ("length", "response/length_tokens", 8, 1),
    ("ppl", "perplexity/policy", 8, 2),
    ("ppl ref", "perplexity/ref", 8, 2),
    ("clip", "policy/clip_fraction", 7, 3),
    ("v-loss", "critic/loss", 8, 3),
    ("expl.", "critic/explained_variance", 7, 2),
)
"""Heading, metric, width and decimals of each column on the console: 76 characters in all."""


class ConsoleTable:
    """Prints a line of at most 80 columns per logged step, and a heading `every` few lines."""

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.lines = 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Print the line of a step; a metric that is missing leaves its column blank."""
        if self.lines % self.every == 0:
            tqdm.write(self.heading())
        tqdm.write(self.line(metrics))
        self.lines += 1

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Print one line for each reward of `Trainer.evaluate`."""
        for key, rate in metrics.items():
            name = key.removeprefix("eval/").removesuffix("/win_rate")
            if key == f"eval/{name}/win_rate":
                policy, ref, lost = (
                    metrics[f"eval/{name}/{what}"] for what in ("policy", "ref", "lose_rate")
                )
                tqdm.write(
                    f"  held-out {name}: {policy:.3g}, reference {ref:.3g}; "
                    f"wins {rate:.0%}, loses {lost:.0%}"
                )

    @staticmethod
    def heading() -> str:
        """Return the names of the columns, aligned with them."""
        return " ".join(name.rjust(width) for name, _, width, _ in COLUMNS)

    @staticmethod
    def line(metrics: Mapping[str, float]) -> str:
        """Return the line of a step."""
        cells = [_fit(metrics.get(name), width, digits) for _, name, width, digits in COLUMNS]
        return " ".join(cells)


def _fit(value: float | None, width: int, digits: int) -> str:
    # A number too wide for its column loses digits, so that columns stay aligned.
    forms = (f".{digits}f", ".1e", ".0e")
    texts = [format(float(value), form) for form in forms] if value is not None else [""]
    return next((text for text in texts if len(text) <= width), texts[-1]).rjust(width)


class Trackers:
    """Logs metrics to accelerate's trackers; a failing tracker causes one warning, no error."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._warned: set[str] = set()

    def begin(self, project: str) -> None:
        """Start every tracker under the name of a project."""
        accelerator = self.accelerator
        wanted, begun = list(accelerator.log_with), []
        # One by one: otherwise a tracker that fails keeps the next ones from starting.
        for kind in wanted:
            accelerator.log_with, accelerator.trackers = [kind], []
            try:
                accelerator.init_trackers(project)
                begun += accelerator.trackers
            except Exception as error:
                self._warn(str(getattr(kind, "name", kind)), "could not be started", error)
        accelerator.log_with, accelerator.trackers = wanted, begun

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics under a step."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.log(dict(metrics), step=step)
            except Exception as error:  # an outage may end, so the next step tries again
                self._warn(str(getattr(tracker, "name", tracker)), "took no metrics", error)

    def _warn(self, name: str, what: str, error: Exception) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"report_to: {name} {what} ({type(error).__name__}: {error}); training continues, "
                "and `history` keeps every number. This warning is given once",
                UserWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class Completions:
    """Writes the first `limit` completions of each step to `path`, whose folder is created."""

    path: Path
    limit: int = 8

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps: a run that resumes there writes them again."""
        if not self.path.is_file():
            return
        kept = [row for row in completion_table(self.path) if row["step"] <= step]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text("".join(lines), encoding="utf-8")
        aside.replace(self.path)

    def __call__(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[float]],
    ) -> None:
        """Append the first completions of a step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for i in range(min(self.limit, len(completions))):
                row: dict[str, Any] = {"step": step, "prompt": prompts[i]}
                row["completion"] = completions[i]
                row.update({name: _as_json(column[i]) for name, column in columns.items()})
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _as_json(value: float) -> float | None:
    # NaN is not JSON: readers other than Python's refuse it.
    return round(float(value), 4) if math.isfinite(value) else None


def completion_table(path: Path | str, step: int | None = None) -> list[dict[str, Any]]:
    """Read ``completions.jsonl`` back; lines that are not whole JSON objects are skipped."""
    rows: list[dict[str, Any]] = []
    # `splitlines` would also break at the U+2028 or U+0085 that a completion may hold. A killed run
    # may leave a last line without its end, a machine that was switched off may leave NUL bytes.
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(json.JSONDecodeError):
                row = json.loads(line) if line.endswith("\n") else None
                if isinstance(row, dict) and (step is None or row["step"] == step):
                    rows.append(row)
    return rows
