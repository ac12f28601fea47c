"""A trainer small enough to be built in every test; conftests import its fixtures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import RewardModel, ToyWorld, Trainer, TrainerConfig

WORLD = ToyWorld(lang="en", seed=0)

SMALL: dict[str, Any] = dict(
    total_steps=2,
    rollout_size=8,
    minibatch_size=4,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    warmup_steps=0,
    disable_tqdm=True,
)


def tiny_policy(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Return a Llama of one layer with random weights."""
    torch.manual_seed(seed)
    config = WORLD.model_config(hidden_size=16, num_layers=1)
    for name, value in options.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).eval()


def tiny_reward_model(seed: int = 1) -> RewardModel:
    """Return a reward model with random weights."""
    model = RewardModel.from_language_model(tiny_policy(seed))
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def build_trainer(folder: Path, *, args: dict[str, Any] | None = None, **parts: Any) -> Trainer:
    """Return a trainer of tiny models; `args` are options of TrainerConfig, the rest its parts."""
    settings: dict[str, Any] = dict(
        reward=tiny_reward_model(),
        train_dataset=WORLD.prompts(40),
        processing_class=WORLD.tokenizer(),
    )
    if "sampler" not in parts:
        settings["generation_config"] = GenerationConfig(max_new_tokens=8)
    settings.update(parts)
    model = settings.pop("model", None) or tiny_policy()
    kind = settings.pop("kind", Trainer)
    config = TrainerConfig(output_dir=str(folder), **{**SMALL, **(args or {})})
    return kind(model, args=config, **settings)


@pytest.fixture(scope="session")
def build() -> Callable[..., Trainer]:
    """Build trainers that write to a given folder."""
    return build_trainer


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    """Build trainers that write below the test's temporary folder."""

    def factory(name: str = "run", **options: Any) -> Trainer:
        return build_trainer(tmp_path / name, **options)

    return factory


@pytest.fixture
def parameters() -> Callable[[torch.nn.Module], torch.Tensor]:
    """Flatten a module's parameters into one vector, for comparison."""

    def flat(module: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()

    return flat


@pytest.fixture
def world() -> ToyWorld:
    """The toy world of these tests."""
    return WORLD


@pytest.fixture
def policy() -> Callable[..., LlamaForCausalLM]:
    """Build tiny policies."""
    return tiny_policy


@pytest.fixture
def reward_model() -> Callable[..., RewardModel]:
    """Build tiny reward models."""
    return tiny_reward_model
