"""The state of a saved run, read with care: of a run of this library, whole, of a known version.

What it says is put into counters and names of folders; so a step must be a number, and nothing else
is taken for one.
"""

import json
from pathlib import Path
from typing import Any

from mossrlhf.checkpoint import STATE, checkpoints, read_json
from mossrlhf.version import __version__

KINDS: dict[str, Any] = {
    "version": str,
    "global_step": int,
    "pretrained": int,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "settings": dict,
    "shaper": dict,
    "prompts": dict,
    "ptx": dict | None,
    "schedulers": dict,
    "optimizers": dict,
    "random": list,
    "watches": dict,
    "history": list,
}
"""What a state holds, and of which kind it is."""

OURS = ("version", "shaper", "prompts", "history")
"""By one of these a state is known as this library's: other trainers write files of its name."""


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint.

    Args:
        path: the checkpoint's folder.

    Raises:
        ValueError: where it is damaged, of another library, or of a later version of this one.

    Source: ours.
    """
    file = path / STATE
    try:
        state: Any = read_json(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(state, dict):
        raise _damaged(file, f"it holds a {type(state).__name__}, expected an object")
    lacking = [name for name in KINDS if name not in state]
    if set(OURS) <= set(lacking):
        raise ValueError(
            f"resume_from_checkpoint: {str(file)!r} is not of this library (it lacks "
            f"{lacking[:3]}); "
            "resume it with what it was written by, or load its models by their folders"
        )
    if _numbers(str(state.get("version"))) > _numbers(__version__):
        raise ValueError(
            f"resume_from_checkpoint: {str(path)!r} was written by mossrlhf {state['version']}, "
            f"and this is {__version__}; install that version, or go on from an earlier "
            f"checkpoint{_beside(path)}"
        )
    if lacking:
        raise _damaged(file, f"it lacks {lacking}")
    for name, kind in KINDS.items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise _damaged(file, f"its {name} is {state[name]!r:.60}")
    for name in ("global_step", "pretrained"):
        if state[name] < 0:
            raise _damaged(file, f"its {name} is {state[name]}")
    return state


def _damaged(file: Path, why: str) -> ValueError:
    return ValueError(
        f"resume_from_checkpoint: {str(file)!r} is damaged ({why}); copy it again, or go on from "
        f"an earlier checkpoint{_beside(file.parent)}"
    )


def _beside(path: Path) -> str:
    others = [found.name for found in checkpoints(path.parent) if found.name != path.name]
    return f"; there are {others} beside it" if others else ""


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare; what follows them (rc1, dev0) says little."""
    parts = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        parts.append(int(part))
    return tuple(parts)
