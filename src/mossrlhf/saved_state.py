"""The state of a saved run, read with care: of a run of this library, whole, of a known format.

What it says is put into counters and names of folders; so a step must be a number, and nothing else
is taken for one.
"""

from pathlib import Path
from typing import Any

from mossrlhf.checkpoint import CHECKSUM, read_json, require_sealed, sealed_state
from mossrlhf.retention import STATE, checkpoints
from mossrlhf.version import __version__

FORMAT = 1
"""Of checkpoints: raised where an older version could not read a newer one's."""

KINDS: dict[str, Any] = {
    "version": str,
    "weights": dict,
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
    "scaler": dict | None,
    "watches": dict,
    "callbacks": dict,
    "history": list,
    "adapters": dict,
    "files": dict,
    CHECKSUM: str,
}
"""What a state holds beside its format, and of which kind it is."""


def read_state(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says in plain numbers, having made sure that its tensors are whole.

    Args:
        path: its folder.

    Raises:
        ValueError: where it is damaged, of another library, or of a later format; it says how, and
            names the newest whole checkpoint before it.

    Source: ours.
    """
    try:
        return _whole_state(path)
    except ValueError as error:
        what = f"resume_from_checkpoint: {str(path)!r}: {error}. {_offer(path)}"
        raise ValueError(what) from error


def _whole_state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path / STATE)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{STATE} is damaged ({error})") from error
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise ValueError(f"{STATE} is not of mossrlhf.Trainer")
    if state["format"] > FORMAT:
        raise ValueError(
            f"written by mossrlhf {state.get('version')} in format {state['format']}, and this is "
            f"{__version__}, which reads up to format {FORMAT}; install the newer one"
        )
    for name, kind in KINDS.items():
        if name not in state:
            raise ValueError(f"{STATE} is damaged (it lacks {name!r})")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{STATE} is damaged (its {name} is {state[name]!r:.60})")
    for name in ("global_step", "pretrained"):
        if state[name] < 0:
            raise ValueError(f"{STATE} is damaged (its {name} is {state[name]})")
    # What is read is made into JSON again, as it was when it was written.
    if sealed_state(state)[CHECKSUM] != state[CHECKSUM]:
        raise ValueError(f"{STATE} is damaged (its check sum is of something else)")
    require_sealed(path, state["files"])
    whole: dict[str, Any] = state
    return whole


def _offer(path: Path) -> str:
    """Name the newest whole checkpoint before one that is not."""
    found = checkpoints(path.parent)
    before = found[: found.index(path)] if path in found else found
    for other in reversed(before):
        try:
            _whole_state(other)
        except ValueError:
            continue
        return f"The one before it is whole: resume_from_checkpoint={str(other)!r}"
    return "There is no whole one before it; train from the start"
