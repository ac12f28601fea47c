"""What bad inputs are given to: a folder of one's own, and trainers of tiny models."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import RewardModel, ToyWorld, Trainer, TrainerConfig

WORLD = ToyWorld(lang="en", seed=0)


def brevity(*, completion_ids: list[list[int]]) -> list[float]:
    """A reward in order."""
    return [-float(len(ids)) for ids in completion_ids]


class Shop:
    """A folder, and what is made in it.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def file(self, name: str, content: Any) -> Path:
        """Write bytes, text, or records a line each."""
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @property
    def fresh(self) -> Path:
        """A folder that is not there yet."""
        return self.folder / f"fresh-{next(self._numbers)}"

    def policy(self, **options: Any) -> LlamaForCausalLM:
        """A Llama of one layer."""
        torch.manual_seed(0)
        config = WORLD.model_config(hidden_size=16, num_layers=1)
        for name, value in options.items():
            setattr(config, name, value)
        return LlamaForCausalLM(config).eval()

    def reward_model(self, **options: Any) -> RewardModel:
        """Over the same backbone, with a head that has something to say."""
        model = RewardModel.from_language_model(self.policy(**options))
        torch.nn.init.normal_(model.score.weight)
        return model.eval()

    def trainer(self, *, args: Any = None, **parts: Any) -> Trainer:
        """A trainer in order but for the parts that are given; `args` may be options."""
        if args is None or isinstance(args, dict):
            sizes = dict(
                total_steps=1, rollout_size=8, minibatch_size=4, warmup_steps=0, disable_tqdm=True
            )
            folder = {"output_dir": str(self.fresh)}
            args = TrainerConfig(**{**folder, **sizes, **(args or {})})
        given = dict(
            reward=brevity, train_dataset=WORLD.prompts(12), processing_class=WORLD.tokenizer()
        )
        if "sampler" not in parts:
            given["generation_config"] = GenerationConfig(max_new_tokens=4)
        given.update(parts)
        model = given.pop("model") if "model" in given else self.policy()
        return Trainer(model, args=args, **given)

    def scored(self, reward: Any, **parts: Any) -> Any:
        """What a trainer with this reward makes of a rollout."""
        trainer = self.trainer(reward=reward, **parts)
        return trainer.score(trainer.collect())

    def stepped(self, **parts: Any) -> Any:
        """An iteration of a trainer with these parts."""
        return self.trainer(**parts).train()
