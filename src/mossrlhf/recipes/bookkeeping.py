"""How long the stages of a run took, and which versions ran."""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from mossrlhf.version import __version__


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
        """
        start = time.perf_counter()
        result = work(*args)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on.

    Source: ours.
    """
    names = ("torch", "transformers", "accelerate", "peft")
    return {"mossrlhf": __version__, **{name: version(name) for name in names}}
