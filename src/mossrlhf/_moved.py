"""Old names, importable for one release with a `DeprecationWarning`."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "agreement": ("critic_evaluation",),
    "buffer": ("minibatches",),
    "charts": ("plotting",),
    "drawing": ("plotting",),
    "evaluation": ("metrics",),
    "faults": ("nan_debug",),
    "frozen": ("distributed.sharding",),
    "functional.advantages": ("functional",),
    "functional.logprobs": ("functional",),
    "functional.losses": ("functional",),
    "functional.reduce": ("functional",),
    "judging": ("reward_modeling.scoring",),
    "kernels.dispatch": ("kernels.row_stats",),
    "loss.ppo_max": ("loss",),
    "monitor": ("metrics",),
    "preference": ("reward_modeling.preference_strength",),
    "processes": ("distributed.processes",),
    "recipes.stages": ("demo",),
    "retention": ("checkpoint.folders",),
    "reward_trainer": (
        "reward_modeling.trainer",
        "reward_modeling.pairs",
        "reward_modeling.report",
    ),
    "roles": ("loading.policy", "loading.critic", "loading.tokenizer", "models.lora"),
    "shaping": ("reward_shaping",),
    "sharding": ("distributed.sharding",),
    "shards": ("serialization",),
    "strict": ("options",),
    "tracking": ("logging",),
}
"""Old module → the modules that its public names are in now."""

RENAMED = {
    "models.as_it_spoke": "models.checkpoint_contexts",
    "models.beside": "models.copy_shared",
    "models.is_over": "models.shares_base",
    "models.speaking_as": "models.active_adapter",
    "models.trained_beneath": "models.trained_base_parameters",
    "models.whole_logits": "models.full_logits",
    "reward_trainer.PairScores": "reward_modeling.pairs.PairRewards",
    "roles.is_adapted": "models.lora.is_peft_model",
    "roles.make_accelerator": "distributed.processes.make_accelerator",
}
"""Old name of a class or function → its new one, where `MOVED` does not lead to it."""


def find_old(old: str, name: str) -> Any:
    """Return what a name of an old module, or an old name of a module, has become."""
    renamed = RENAMED.get(f"{old}.{name}")
    public = [] if name.startswith("_") else MOVED.get(old, ())
    for home in [renamed] if renamed else [f"{new}.{name}" for new in public]:
        place, _, found = home.rpartition(".")
        if hasattr(module := import_module(f"mossrlhf.{place}"), found):
            warnings.warn(
                f"mossrlhf.{old}.{name} is now mossrlhf.{home}; the old name goes with the next "
                "release",
                DeprecationWarning,
                stacklevel=3,
            )
            return getattr(module, found)
    raise AttributeError(f"module 'mossrlhf.{old}' has no attribute {name!r}")


class MovedModule(ModuleType):
    """Stands in for a module that was moved; its names are looked up in the new places."""

    def __init__(self, old: str, new: tuple[str, ...]) -> None:
        super().__init__(f"mossrlhf.{old}", f"Moved to mossrlhf.{new[0]}.")
        self.__path__: list[str] = []  # its submodules are in sys.modules as well

    def __getattr__(self, name: str) -> Any:
        return find_old(self.__name__.removeprefix("mossrlhf."), name)


def register() -> None:
    """Register the old modules with Python's import system; nothing is imported."""
    for old, new in MOVED.items():
        sys.modules.setdefault(f"mossrlhf.{old}", MovedModule(old, new))
