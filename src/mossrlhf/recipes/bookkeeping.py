"""What every recipe does beside its work: clock, versions, a clean folder, Ctrl-C."""

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mossrlhf.version import __version__

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT, as shells have it."""

REPORT = ("curves.png", "samples.md", "summary.json")
"""What a recipe writes at its end."""


class Clock:
    """Adds up the seconds of named stages.

    Source: ours.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        """Do some work, and note how long it took.

        Args:
            name: of the stage.
            work: the function.
            args: of it.

        Raises:
            KeyboardInterrupt: at Ctrl-C; it names the stage.
        """
        start = time.perf_counter()
        try:
            return work(*args)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(name) from stop
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on.

    Source: ours.
    """
    names = ("torch", "transformers", "accelerate", "peft")
    return {"mossrlhf": __version__, **{name: version(name) for name in names}}


def clear_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Make a folder ready: the settings go in, the report of an earlier run goes out.

    Otherwise a run that is interrupted would leave another run's figures beside its own.

    Args:
        folder: made where absent.
        config: what ``config.json`` is to hold.

    Source: ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in REPORT:
        (folder / name).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print a paragraph in lines of at most 80 characters.

    Args:
        text: of any length.

    Source: ours.
    """
    print(textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False))


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Let Ctrl-C end a command with one line and `INTERRUPTED`, in place of a traceback.

    Source: ours.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        where = f" in the stage {stop}" if str(stop) else ""
        print(f"\nInterrupted{where}: this run leaves no summary.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def exit_if_interrupted(summary: Mapping[str, Any]) -> None:
    """End a command with `INTERRUPTED` where Ctrl-C cut its run short.

    Args:
        summary: what ``summary.json`` holds.

    Raises:
        SystemExit: where it says ``interrupted``.

    Source: ours.
    """
    if summary["interrupted"]:
        raise SystemExit(INTERRUPTED)
