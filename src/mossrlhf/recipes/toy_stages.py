"""The stages before PPO in the toy world: an SFT model, and a reward model of noisy pairs."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mossrlhf.data import prompt_batch
from mossrlhf.models import RewardModel
from mossrlhf.recipes.stages import fine_tune, train_reward_model
from mossrlhf.sampling import HFSampler
from mossrlhf.toyworld import ToyWorld

EXAMPLES = 8000
"""Demonstrations the SFT model learns from, in four epochs; half of them leave 2 to 3 % of its
answers malformed."""

PAIRS = 4000
"""Noisy pairs the reward model learns from, in two epochs."""


def train_sft(
    world: ToyWorld,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    seed: int,
    examples: int,
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train the SFT model, and say how good its answers are.

    Args:
        world: the toy world.
        tokenizer: its tokenizer.
        folder: of logs.
        seed: of the model and its training.
        examples: demonstrations to learn from.
    """
    torch.manual_seed(seed)
    policy = LlamaForCausalLM(world.model_config())
    fine_tune(
        policy,
        tokenizer,
        world.sft_examples(examples),
        folder / "sft",
        learning_rate=4e-3,
        num_train_epochs=4,
        per_device_train_batch_size=32,
        seed=seed,
    )
    prompts = world.prompts(1024, split="eval", seed=1)
    sampler = HFSampler.for_tokenizer(tokenizer, generation(world))
    torch.manual_seed(seed)
    rollout = sampler(policy, prompt_batch(prompts, tokenizer).ids)
    texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    ended = (~rollout.truncated).tolist()
    quality = [
        world.true_quality(record, text, ended=end)
        for record, text, end in zip(prompts, texts, ended, strict=True)
    ]
    return policy, {
        "true_quality": sum(quality) / len(quality),
        "ended": sum(ended) / len(ended),
        "well_formed": sum(map(world.well_formed, texts)) / len(texts),
    }


def train_reward(
    world: ToyWorld,
    tokenizer: PreTrainedTokenizerBase,
    policy: LlamaForCausalLM,
    folder: Path,
    seed: int,
    pairs: int,
    **options: Any,
) -> tuple[RewardModel, float]:
    """Train the reward model on noisy pairs, and say how often it is right about fresh ones.

    Args:
        world: the toy world.
        tokenizer: its tokenizer.
        policy: the SFT model.
        folder: of logs.
        seed: of its training.
        pairs: noisy pairs to learn from.
        options: of `train_reward_model`, in place of the main job's.
    """
    # Fresh pairs are put in the order of the true preference: the label noise is not the
    # reward model's fault.
    fresh = [_truly_ordered(pair) for pair in world.pairs(500, split="eval", seed=1)]
    fresh = [pair for pair in fresh if pair["true_margin"] > 0]
    model, metrics = train_reward_model(
        policy,
        tokenizer,
        world.pairs(pairs),
        fresh,
        folder / "rm",
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        seed=seed,
        **{"learning_rate": 1e-3, "num_train_epochs": 2, **options},
    )
    return model, metrics["accuracy"]


def _truly_ordered(pair: dict[str, Any]) -> dict[str, Any]:
    if pair["true_margin"] >= 0:
        return pair
    flipped = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    return {**pair, **flipped, "true_margin": -pair["true_margin"]}


def generation(world: ToyWorld) -> GenerationConfig:
    """Return how answers are drawn: as long as the world's longest, nothing cut away.

    Args:
        world: the toy world.
    """
    return GenerationConfig(max_new_tokens=world.max_response_tokens, do_sample=True)
