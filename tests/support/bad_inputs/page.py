"""docs/bad_inputs.md, made of the rows that the tests walk."""

from pathlib import Path

from bad_inputs import ROOMS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "bad_inputs.md"

LEAD = """\
# Bad inputs

What is given, and what it gets: the type of the error and what its message says, or a warning.
Every row is a test, run as users run it; "…" stands for what differs from case to case, and the end
of a message may be left out. This page is made of the tests' own table
(`tests/support/bad_inputs`) by

```bash
PYTHONPATH=src:examples:tests/support python -m bad_inputs
```

and a test refuses a page that is not. Errors come before anything is computed wherever that is
possible: before a model is loaded, before the first rollout, before anything is written. What looks
bad and works is taken, since refusing it would be a fault as well.

`DataError`, `ShardError` and `DiffError` are `ValueError`s. Readers of data name file and line;
with `skip_bad=True` they leave bad records out and count them in one warning.

No pickle is loaded but plain tensors (`weights_only=True`), no code that comes with a model is run
unless you ask transformers for it, and nothing in a record, an index or a checkpoint is used as a
path out of its folder. One file may name another by design: PEFT's `adapter_config.json` says over
which base its adapters were trained, and that base is loaded where you give the adapters alone.
"""


def text() -> str:
    """Return the page."""
    count = sum(len(room.rows) for room in ROOMS)
    parts = [LEAD, f"There are {count} rows.\n"]
    for room in ROOMS:
        lines = [f"## {room.title}", "", "| given | gets |", "| --- | --- |"]
        lines += [f"| {_cell(row.given)} | {_cell(_coded(row.gets))} |" for row in room.rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _coded(gets: str) -> str:
    kind, _, message = gets.partition(": ")
    return f"{f'`{kind}`' if kind[0].isupper() else f'**{kind}**'}: {message}"


def _cell(said: str) -> str:
    return said.replace("|", "\\|").replace("\n", " ")
