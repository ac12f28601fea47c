"""The initial models of a world: SFT model, reward model, and a model without SFT."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from mossrlhf import RewardModel, ToyWorld, Trainer, presets
from mossrlhf.demo import copied, fine_tune, generation_config, train_reward, train_sft
from mossrlhf.serialization import no_progress_bars
from study.plan import Scale, World

FACTS = "facts.json"


@dataclass(frozen=True)
class Prepared:
    """A world that is ready for PPO.

    Args:
        world: the toy world.
        tokenizer: its tokenizer.
        policy: the SFT model.
        base: a language model of the same texts, without training on responses to prompts.
        reward_model: trained on noisy pairs.
        facts: their evaluation on held-out prompts.
    """

    world: ToyWorld
    tokenizer: PreTrainedTokenizerBase
    policy: LlamaForCausalLM
    base: LlamaForCausalLM
    reward_model: RewardModel
    facts: Mapping[str, Any]

    @property
    def entropy(self) -> float:
        """Mean entropy of the SFT model over its own responses, nats per token."""
        return float(self.facts["sft"]["entropy"])

    @property
    def generation(self) -> GenerationConfig:
        """The sampling settings."""
        return generation_config(self.world)


def prepare(place: World, scale: Scale, folder: Path) -> None:
    """Train a world's three models, save them to a folder, and return their evaluation.

    Args:
        place: the world.
        scale: sizes of the study.
        folder: of this world.
    """
    if (folder / FACTS).exists():
        return
    world = ToyWorld(lang=place.lang, seed=place.seed)
    tokenizer = world.tokenizer()
    policy, sft = train_sft(world, folder, scale.examples)
    reward_model, accuracy = train_reward(world, policy, folder, scale.pairs)
    base = without_sft(world, tokenizer, folder, place.seed, scale.examples)
    with no_progress_bars():
        policy.save_pretrained(folder / "sft_model")
        base.save_pretrained(folder / "language_model")
        reward_model.save_pretrained(folder / "reward_model")
    ready = Prepared(world, tokenizer, policy, base, reward_model, {})
    facts = {
        "sft": {**held_out(ready, policy, scale), **sft},
        "language_model": held_out(ready, base, scale),
        "reward_model": {"accuracy": accuracy},
        "fixed_answers": fixed_answers(world, scale),
    }
    # Written last: if it exists, everything does.
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def load(place: World, folder: Path) -> Prepared:
    """Load the models that `prepare` saved.

    Args:
        place: the world.
        folder: of this world.
    """
    world = ToyWorld(lang=place.lang, seed=place.seed)
    with no_progress_bars():
        return Prepared(
            world,
            world.tokenizer(),
            LlamaForCausalLM.from_pretrained(folder / "sft_model"),
            LlamaForCausalLM.from_pretrained(folder / "language_model"),
            RewardModel.from_pretrained(folder / "reward_model"),
            json.loads((folder / FACTS).read_text()),
        )


def without_sft(
    world: ToyWorld, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int, examples: int
) -> LlamaForCausalLM:
    """Train a language model on demonstrations with shuffled responses.

    It knows words, sentences and the form of a dialogue, but not that a response belongs to a
    prompt, like a pre-trained model before SFT.
    """
    records = world.sft_examples(examples)
    answers = [record["response"] for record in records]
    random.Random(seed).shuffle(answers)
    dealt = [{**r, "response": answer} for r, answer in zip(records, answers, strict=True)]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(world.model_config())
    options = dict(learning_rate=4e-3, num_train_epochs=4, per_device_train_batch_size=32)
    fine_tune(model, tokenizer, dealt, folder / "language", seed=seed, **options)
    return model


def held_out(ready: Prepared, model: LlamaForCausalLM, scale: Scale) -> dict[str, float]:
    """Sample responses to held-out prompts from a model before PPO."""

    def true_quality(**columns: Any) -> list[float]:
        return ready.world.reward(**columns)

    trainer = Trainer(
        copied(model),
        reward=[ready.reward_model, (true_quality, 0.0)],
        train_dataset=ready.world.prompts(scale.rollout),
        eval_dataset=ready.world.prompts(scale.held_out, split="eval", seed=3),
        processing_class=ready.tokenizer,
        generation_config=ready.generation,
        **presets.vanilla_ppo(total_steps=0, seed=ready.world.seed, disable_tqdm=True),
    )
    found = trainer.evaluate()
    perplexity = torch.tensor(found["eval/perplexity/policy"])
    return {
        "reward_score": found["eval/reward_model/policy"],
        "true_quality": found["eval/true_quality/policy"],
        "response_length": found["eval/response/length_tokens"],
        # E[−log π] over the policy's own samples is its entropy, and ln of this perplexity.
        "entropy": float(perplexity.log()),
    }


def fixed_answers(world: ToyWorld, scale: Scale) -> dict[str, float]:
    """True quality of fixed responses, to which a policy might collapse."""
    prompts = world.prompts(scale.held_out, split="eval", seed=3)
    responses = [r["response"] for r in world.sft_examples(20, seed=1)]

    def quality(text: str) -> float:
        return sum(world.true_quality(p, text, ended=True) for p in prompts) / len(prompts)

    return {"empty": quality(""), "best_constant": max(map(quality, responses))}
