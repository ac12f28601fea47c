"""Going back to before an iteration in which no model has moved."""

from typing import TYPE_CHECKING, Any

from mossrlhf.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from mossrlhf.trainer import Trainer


def snapshot(trainer: "Trainer") -> dict[str, Any]:
    """Note where the streams of data and random numbers are, and the shaper's moments.

    Args:
        trainer: between two iterations.

    Returns:
        for `restore`, as long as no model has moved.

    Source: ours.
    """
    return {
        "prompts": trainer.prompts.state_dict(),
        "ptx": None if trainer.ptx is None else trainer.ptx.state_dict(),
        "shaper": shaper_state(trainer),
        "random": random_state(),
        "minibatches": trainer.generator.get_state(),
    }


def restore(trainer: "Trainer", noted: dict[str, Any]) -> None:
    """Bring streams and moments back to where `snapshot` noted them.

    Args:
        trainer: the same.
        noted: what `snapshot` returned.

    Source: ours.
    """
    trainer.prompts.load_state_dict(noted["prompts"])
    if trainer.ptx is not None:
        trainer.ptx.load_state_dict(noted["ptx"])
    if noted["shaper"]:
        trainer.shaper.load_state_dict(noted["shaper"])
    set_random_state(*noted["random"])
    trainer.generator.set_state(noted["minibatches"])


def shaper_state(trainer: "Trainer") -> dict[str, Any]:
    """Return what a shaper remembers; nothing where it is a function without a memory.

    Args:
        trainer: whose shaper.

    Source: ours.
    """
    state: dict[str, Any] = getattr(trainer.shaper, "state_dict", dict)()
    return state
