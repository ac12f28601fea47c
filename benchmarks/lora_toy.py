"""PPO-max by adapters alone: four roles on one base, in the toy world, over seeds.

    python benchmarks/lora_toy.py run 0 1 2      # minutes each
    python benchmarks/lora_toy.py table          # into docs/adapters.md

The SFT model is the base; a LoRA adapter of it is the reward model, trained on noisy pairs; the
policy and the critic are two more (the critic starts as a copy of the reward's), and the reference
is the base with all of them off. The settings were tried out on seed 10.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from part_two import between, run_seeds
from peft import LoraConfig

from mossrlhf import ToyWorld, Trainer, demo
from mossrlhf.models import save_adapters

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "lora"
FIGURES = ROOT / "benchmarks" / "results" / "lora_toy.json"
PAGE = ROOT / "docs" / "adapters.md"
MARKS = ("<!-- written by: benchmarks/lora_toy.py table -->\n", "<!-- end -->\n")

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
JUDGED = {"learning_rate": 4e-3, "num_train_epochs": 2}
RATE = 4e-3
"""Of policy and critic: adapters of so small a model take larger steps than all of it."""


def run(seed: int, rate: float = RATE) -> dict[str, Any]:
    """Train SFT model, reward adapter, policy and critic; measure the policy."""
    folder = FOLDER / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    world = ToyWorld(seed=seed)
    policy, _ = demo.train_sft(world, folder, demo.EXAMPLES)
    options = {"trainer_options": {"peft_config": LoraConfig(**LORA)}, **JUDGED}
    reward, accuracy = demo.train_reward(world, policy, folder, demo.PAIRS, **options)
    save_adapters(reward, folder / "reward")
    config = demo.DemoConfig(seed=seed, output_dir=str(folder))
    setup = demo.Setup(world, policy, folder / "reward")
    trainer = demo.make_trainer("ppo_max", setup, config, rate, peft_config=LoraConfig(**LORA))
    trainer.train()
    return {"accuracy": accuracy, "weights": weights(trainer), **demo.measure(trainer)}


def weights(trainer: Trainer) -> dict[str, int]:
    """Count the parameters of all roles, those that are shared once."""
    alone = [trainer.ref_model] if trainer.ref_model is not None else []
    modules = [trainer.model, *alone, *trainer.rewards.models()]
    found = {id(p): p for module in modules for p in module.parameters()}
    total = sum(p.numel() for p in found.values())
    base = sum(p.numel() for p in trainer.policy.get_base_model().parameters())
    return {"base_and_adapters": base, "all_roles": total}


def with_table(page: str, seeds: Mapping[str, Any]) -> str:
    """Put the figures of seeds into the page, between the marks."""
    lines = [
        "| seed | reward model right | wins | loses | true quality | KL, nats per sequence |",
        "|---|---|---|---|---|---|",
    ]
    for seed, row in seeds.items():
        lines.append(
            f"| {seed} | {row['accuracy']:.1%} | {row['win_rate']:.0%} | {row['lose_rate']:.0%} | "
            f"{row['true_quality']:.2f} | {row['kl_per_sequence']:.1f} |"
        )
    return between(page, MARKS, lines)


def main(words: Sequence[str]) -> None:
    """Run seeds, or write the table."""
    if words[0] == "table":
        known = json.loads(FIGURES.read_text(encoding="utf-8"))["seeds"]
        page = with_table(PAGE.read_text(encoding="utf-8"), known)
        PAGE.write_text(page, encoding="utf-8")
        return
    settings = {"lora": LORA, "judged": JUDGED, "rate": RATE}
    seeds = [int(seed) for seed in words[1:]]
    run_seeds(seeds, FIGURES, settings, run, "python benchmarks/lora_toy.py run")


if __name__ == "__main__":
    main(sys.argv[1:])
