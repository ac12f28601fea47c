"""Old names of modules and functions, importable for one release with a `DeprecationWarning`."""

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
    "roles": (
        "loading.policy",
        "loading.critic",
        "loading.tokenizer",
        "models.lora",
        "distributed.processes",
    ),
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
}
"""Old name → new name of what was renamed in its module."""


def renamed(module: str, name: str) -> Any:
    """Look a renamed name up for the ``__getattr__`` of its module, with a warning."""
    old = f"{module.removeprefix('mossrlhf.')}.{name}"
    if old not in RENAMED:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(old, RENAMED[old])
    return getattr(import_module(module), RENAMED[old].rpartition(".")[2])


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"mossrlhf.{old} is now mossrlhf.{new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )


class MovedModule(ModuleType):
    """Stands in for a module that was moved; its names are looked up in the new places."""

    def __init__(self, old: str, new: tuple[str, ...]) -> None:
        super().__init__(f"mossrlhf.{old}", f"Moved to mossrlhf.{new[0]}.")
        self.__path__: list[str] = []  # its submodules are in sys.modules as well

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix("mossrlhf.")
        if not name.startswith("_"):
            for new in MOVED[old]:
                module = import_module(f"mossrlhf.{new}")
                if hasattr(module, name):
                    _warn(f"{old}.{name}", f"{new}.{name}")
                    return getattr(module, name)
        raise AttributeError(f"module 'mossrlhf.{old}' has no attribute {name!r}")


def register() -> None:
    """Register the old modules with Python's import system; nothing is imported."""
    for old, new in MOVED.items():
        sys.modules.setdefault(f"mossrlhf.{old}", MovedModule(old, new))
