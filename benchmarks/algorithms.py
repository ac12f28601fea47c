"""Do the algorithms of examples/algorithms/ learn? Over seeds, as the table of docs/algorithms.md.

    python benchmarks/algorithms.py run 0 1 2    # minutes each
    python benchmarks/algorithms.py table        # into docs/algorithms.md

Each is run as its own command line runs it; `reference_ratio` also at the learning rate that the
others have.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Any

from part_two import between, run_seeds

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "algorithms.json"
PAGE = ROOT / "docs" / "algorithms.md"
MARKS = ("<!-- written by: benchmarks/algorithms.py table -->\n", "<!-- end -->\n")

TITLES = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce_plus_plus": "REINFORCE++",
    "adaptive_kl": "PPO with adaptive KL",
    "reference_ratio": "importance sampling fixed to the reference",
    "vc_ppo": "VC-PPO",
    "arithmetic": "a verifiable reward: share of right sums",
}
COMMAND = "python benchmarks/algorithms.py run"
SLOWED = "reference_ratio"
FASTER = f"{SLOWED}, full rate"


def arms() -> dict[str, dict[str, Any]]:
    """Return what `toy.train` is given for each row, by name."""
    found = {name: dict(import_module(name).TOY) for name in TITLES}
    rate = import_module("toy").OPTIONS["learning_rate"]
    return {**found, FASTER: {**found[SLOWED], "learning_rate": rate}}


def run(seed: int) -> dict[str, Any]:
    """Train by every algorithm from one SFT model (the sums have their own)."""
    toy = import_module("toy")
    stages: dict[Any, Any] = {}
    found = {}
    for name, options in arms().items():
        make = options.pop("stage", toy.dialogues)
        stages[make] = stages.get(make) or make(seed)
        folder = str(ROOT / "outputs" / "algorithms" / f"{name}-{seed}")
        trainer = toy.train(stages[make], seed=seed, output_dir=folder, **options)
        measured = trainer.evaluate()
        reward = trainer.rewards.names[0]
        found[name] = {
            "before": measured[f"eval/{reward}/ref"],
            "after": measured[f"eval/{reward}/policy"],
            "kl_per_sequence": measured["eval/kl/ref_per_sequence"],
        }
        print(seed, name, json.dumps(found[name]), flush=True)
    return found


def settings() -> dict[str, Any]:
    """Return what the figures depend on: the numbers that each row does not share."""
    own = {
        name: {key: value for key, value in options.items() if isinstance(value, int | float)}
        for name, options in arms().items()
    }
    return {"shared": import_module("toy").OPTIONS, "own": own}


def change(figures: Mapping[str, float]) -> str:
    """Lay out the mean reward before and after, with a minus of full width."""
    return f"{figures['before']:.2f} → {figures['after']:.2f}".replace("-", "−")


def listed(words: Iterable[str]) -> str:
    """Lay out one word for each seed, as a sentence has them."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def with_table(page: str, seeds: Mapping[str, Any]) -> str:
    """Put the figures of seeds into the page: a row each, and what stands about the slowed one."""
    lines = [
        f"| algorithm | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        "| --- " * (1 + len(seeds)) + "|",
    ]
    for name, title in TITLES.items():
        lines.append(f"| {title} | {' | '.join(change(row[name]) for row in seeds.values())} |")
    nats = listed(f"{row[SLOWED]['kl_per_sequence']:.2f}" for row in seeds.values())
    faster = listed(change(row[FASTER]) for row in seeds.values())
    said = (
        f"With the ratio to the reference the policy ends {nats} nats per sequence from where it "
        f"began, and gains least. At the learning rate of the others: {faster}. What it has come "
        "to say ρ times as often is pushed down ρ times as hard, and pushed up no more once ρ is "
        "beyond the clip."
    )
    lines += ["", *wrap(said, 100)]
    return between(page, MARKS, lines)


def main(words: Sequence[str]) -> None:
    """Run seeds, or write the table."""
    if words[0] == "table":
        known = json.loads(FIGURES.read_text(encoding="utf-8"))["seeds"]
        page = with_table(PAGE.read_text(encoding="utf-8"), known)
        PAGE.write_text(page, encoding="utf-8")
        return
    sys.path.insert(0, str(ROOT / "examples" / "algorithms"))
    run_seeds([int(seed) for seed in words[1:]], FIGURES, settings(), run, COMMAND)


if __name__ == "__main__":
    main(sys.argv[1:])
