"""A small world for the algorithms of this folder: an SFT model, prompts, and a reward.

Each other file of this folder has a function ``parts(**options)`` that returns keyword arguments of
`Trainer`, as the presets do; its options are those of `TrainerConfig`. With your own model::

    GRPO("org/model", reward=reward, train_dataset=prompts, **parts(total_steps=200))
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mossrlhf import ToyWorld, Trainer
from mossrlhf.demo import copied, fine_tune

Records = Sequence[Mapping[str, Any]]

OPTIONS: dict[str, Any] = dict(
    total_steps=20,
    rollout_size=64,
    minibatch_size=16,
    learning_rate=2e-3,
    critic_learning_rate=2e-3,
    warmup_steps=0,
    disable_tqdm=True,
)
"""Of `TrainerConfig`, the same for all algorithms; a small model takes large steps."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The SFT model, reward and prompts that an algorithm starts from.

    Args:
        policy: the SFT model.
        tokenizer: its tokenizer.
        reward: a reward function.
        prompts: records to train on.
        held_out: records to evaluate on.
        max_new_tokens: longest response, in tokens.
    """

    policy: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    reward: Callable[..., list[float]]
    prompts: Records
    held_out: Records
    max_new_tokens: int


def fine_tuned(
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    seed: int,
    epochs: int,
) -> LlamaForCausalLM:
    """Train a small Llama on demonstrations, in seconds.

    Args:
        config: of the model.
        tokenizer: its tokenizer.
        records: with ``prompt`` and ``response``.
        seed: of the model and its training.
        epochs: epochs over the records.
    """
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(config)
    options = dict(learning_rate=4e-3, num_train_epochs=epochs, per_device_train_batch_size=32)
    with TemporaryDirectory() as folder:
        fine_tune(policy, tokenizer, records, Path(folder), seed=seed, **options)
    return policy


def dialogues(seed: int = 0) -> Stage:
    """Return dialogues of the toy world, with their true quality as the reward.

    There is no reward model, and so no over-optimization; `make demo` shows that.

    Args:
        seed: of the world and the SFT model.
    """
    world = ToyWorld(lang="en", seed=seed)
    config, tokenizer = world.model_config(hidden_size=48, num_layers=1), world.tokenizer()

    def quality(**columns: Any) -> list[float]:
        return world.reward(**columns)

    return Stage(
        policy=fine_tuned(config, tokenizer, world.sft_examples(2000), seed, epochs=4),
        tokenizer=tokenizer,
        reward=quality,
        prompts=world.prompts(1000, seed=2),
        held_out=world.prompts(200, split="eval", seed=3),
        max_new_tokens=world.max_response_tokens,
    )


def train(
    stage: Stage,
    parts: Callable[..., dict[str, Any]],
    kind: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """Train a copy of a stage's policy.

    Args:
        stage: the start, which is not changed.
        parts: of an algorithm.
        kind: `Trainer`, or the algorithm's subclass of it.
        options: of `TrainerConfig`, in place of `OPTIONS`.
    """
    trainer = kind(
        copied(stage.policy),
        reward=stage.reward,
        train_dataset=stage.prompts,
        eval_dataset=stage.held_out,
        processing_class=stage.tokenizer,
        generation_config=GenerationConfig(max_new_tokens=stage.max_new_tokens),
        **parts(**{**OPTIONS, **options}),
    )
    trainer.train()
    return trainer


def gain(trainer: Trainer) -> tuple[float, float]:
    """Return the mean reward on held-out prompts, before and after.

    Args:
        trainer: from `train`; its reference is the initial policy.
    """
    metrics, name = trainer.evaluate(), trainer.rewards.names[0]
    return metrics[f"eval/{name}/ref"], metrics[f"eval/{name}/policy"]


def main(
    parts: Callable[..., dict[str, Any]],
    kind: type[Trainer] = Trainer,
    stage: Callable[[int], Stage] = dialogues,
    **options: Any,
) -> None:
    """Train from the command line, and print the mean reward before and after.

    Args:
        parts: of an algorithm.
        kind: `Trainer`, or the algorithm's subclass of it.
        stage: function from a seed to the start.
        options: of `TrainerConfig`, in place of `OPTIONS`.
    """
    options = {**OPTIONS, **options, "disable_tqdm": False}
    parser = argparse.ArgumentParser(description="Train in a small world, in seconds on a CPU.")
    for name in ("total_steps", "learning_rate"):
        default = options[name]
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"[{default:g}]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--output_dir", default="outputs/algorithms", help="[%(default)s]")
    options |= vars(parser.parse_args())
    made = stage(options["seed"])
    trainer = train(made, parts, kind, **options)
    before, after = gain(trainer)
    print(f"{made.reward.__name__} on held-out prompts: {before:.2f} before, {after:.2f} after")
