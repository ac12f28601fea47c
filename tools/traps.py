"""Traps re-opened: mistakes of earlier PPO libraries, each put back once for its test to see.

    python tools/traps.py            # all of them, on two cores: a few minutes
    python tools/traps.py padding    # those with that in their name

``traps.json`` says what each is, what stands in the source and what stood elsewhere, and the test
that must turn red. As with ``mutants.py``, nothing is changed on disk. The exit status is 1 where a
test stays green.
"""

import json
import os
import sys
from pathlib import Path

from faults import SOURCE
from mutants import import_foundations, start

TRAPS = Path(__file__).with_name("traps.json")
SECONDS = 600


def reopened(trap: dict[str, str]) -> tuple[str, str]:
    """Return the source of a file as it stands, and with the trap in it."""
    source = (SOURCE / trap["file"]).read_text(encoding="utf-8")
    found = source.count(trap["before"])
    if found != 1:
        sys.exit(f"{trap['trap']}: {trap['file']} has {trap['before']!r} {found} times, expected 1")
    return source, source.replace(trap["before"], trap["after"])


def passes(trap: dict[str, str], source: str) -> bool:
    """Whether the test of a trap passes on a source of its file."""
    _, status = os.waitpid(start(trap["file"], source, [trap["test"]], SECONDS), 0)
    return status == 0


def main(names: list[str]) -> int:
    """Re-open the traps whose name has one of some words in it, or all."""
    import_foundations()
    green = 0
    for trap in json.loads(TRAPS.read_text(encoding="utf-8")):
        if names and not any(name in trap["trap"] for name in names):
            continue
        closed, opened = reopened(trap)
        # Red for the trap, and for nothing else.
        seen = passes(trap, closed) and not passes(trap, opened)
        green += not seen
        print("red      " if seen else "NOT SEEN ", trap["trap"], flush=True)
        print("         ", trap["test"], flush=True)
    return int(bool(green))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
