"""Old module names, importable for one release with a `DeprecationWarning`."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "agreement": ("critic_evaluation",),
    "buffer": ("minibatches",),
    "callbacks": ("metrics",),
    "charts": ("plotting",),
    "continuations": ("critic_evaluation",),
    "data.batches": ("data.collate",),
    "data.canonical": ("data.formats",),
    "data.feed": ("data.prompts",),
    "data.fit": ("data.prompts",),
    "data.jsontext": ("data.readers",),
    "data.memory": ("data.collate",),
    "data.records": (
        "data.prompts",
        "data.formats",
    ),
    "data.streams": ("data.readers",),
    "distributed.accelerator": ("distributed.processes",),
    "distributed.offload": ("distributed.sharding",),
    "drawing": ("plotting",),
    "engine": ("optimization",),
    "evaluation": (
        "metrics",
        "randomness",
        "trainer",
    ),
    "faults": ("nan_debug",),
    "fitting": ("validation",),
    "flow": ("run",),
    "frozen": ("distributed.sharding",),
    "functional.advantages": ("functional",),
    "functional.logprobs": ("functional",),
    "functional.losses": ("functional",),
    "functional.reduce": ("functional",),
    "interrupts": ("shutdown",),
    "judging": ("reward_modeling.scoring",),
    "kernels.dispatch": ("kernels.row_stats",),
    "kernels.head": ("kernels.chunked_head",),
    "kernels.linear": ("kernels.chunked_head",),
    "kernels.modules": ("kernels.chunked_head",),
    "kernels.rows": ("kernels.row_stats",),
    "leaving": ("shutdown",),
    "loss.ppo_max": ("loss",),
    "loss.rows": ("loss",),
    "loss.separable": ("loss",),
    "loss.statistics": ("loss",),
    "models.adapters": ("models.lora",),
    "models.beneath": ("models.lora",),
    "models.classifiers": (
        "models.reward_model",
        "models.lora",
    ),
    "models.packing": ("models.backbone",),
    "models.padding": ("models.backbone",),
    "models.quantized": ("models.lora",),
    "models.scoring": ("models.token_logprobs",),
    "models.shared": ("models.shared_base",),
    "models.token_path": ("models.token_logprobs",),
    "monitor": ("metrics",),
    "planning.planner": ("planning",),
    "planning.report": ("planning",),
    "preference": ("reward_modeling.preference_strength",),
    "processes": ("distributed.processes",),
    "recipes.bookkeeping": ("demo",),
    "recipes.toy": ("demo",),
    "recipes.toy_stages": ("demo",),
    "resume": ("checkpoint.save_load",),
    "retention": ("checkpoint.folders",),
    "returned": ("validation",),
    "reward_trainer": ("reward_modeling",),
    "reward_trainer.loader": (
        "reward_modeling.pairs",
        "reward_modeling.trainer",
    ),
    "reward_trainer.pairs": ("reward_modeling.pairs",),
    "reward_trainer.parts": (
        "reward_modeling.trainer",
        "reward_modeling.pairs",
    ),
    "reward_trainer.report": ("reward_modeling.report",),
    "reward_trainer.storage": ("reward_modeling.trainer",),
    "reward_trainer.trainer": ("reward_modeling.trainer",),
    "rewards.model": ("rewards.model_reward",),
    "rewards.patient": ("rewards.retry",),
    "rewards.together": ("rewards.reward_set",),
    "rewinding": ("checkpoint.state",),
    "roles": (
        "loading.policy",
        "loading.critic",
        "loading.tokenizer",
        "distributed.processes",
        "models.lora",
    ),
    "roles.judges": ("loading.critic",),
    "roles.machine": (
        "distributed.processes",
        "loading.policy",
    ),
    "roles.policy": (
        "loading.policy",
        "models.lora",
    ),
    "roles.reading": (
        "loading.tokenizer",
        "models.lora",
    ),
    "run_report.concerns": ("run_report",),
    "run_report.html": ("run_report",),
    "run_report.page": ("run_report",),
    "run_report.reading": ("run_report",),
    "sampling.assembling": ("sampling.base",),
    "sampling.cache": ("sampling.hf",),
    "sampling.configured": ("sampling.base",),
    "sampling.distribution": ("sampling.base",),
    "sampling.draws": ("sampling.hf",),
    "sampling.engines": ("sampling.vllm",),
    "sampling.kv_cache": ("sampling.hf",),
    "sampling.protocol": ("sampling.base",),
    "sampling.segments": ("sampling.hf",),
    "sampling.vllm_engine": ("sampling.vllm",),
    "saved_state": ("checkpoint.state",),
    "settings": ("checkpoint.state",),
    "shaping": ("reward_shaping",),
    "sharding": ("distributed.sharding",),
    "shards": ("serialization",),
    "signature": ("options",),
    "stages": ("trainer",),
    "strict": ("options",),
    "suspects": ("nan_debug",),
    "toyworld.chinese": ("toyworld.language",),
    "toyworld.english": ("toyworld.language",),
    "toyworld.preference": ("toyworld.world",),
    "toyworld.speaker": ("toyworld.world",),
    "tracking": ("logging",),
    "zero": ("distributed.deepspeed",),
}
"""Old module → the modules that its public names are in now."""


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
                    warnings.warn(
                        f"mossrlhf.{old}.{name} is now mossrlhf.{new}.{name}; the old name goes "
                        "with the next release",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return getattr(module, name)
        raise AttributeError(f"module 'mossrlhf.{old}' has no attribute {name!r}")


def register() -> None:
    """Register the old modules with Python's import system; nothing is imported."""
    for old, new in MOVED.items():
        sys.modules.setdefault(f"mossrlhf.{old}", MovedModule(old, new))
