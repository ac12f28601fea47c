"""Part II on pairs with label noise that is known: which methods help, and what strength tells.

In the toy world a share of the labels is flipped at random; an ensemble of reward models measures
the strength of every pair; each method alone, and all of them, make something of the noisy pairs,
and a model of that is asked about held-out pairs in their true order. What the ensemble contradicts
is flipped and measured anew, for `ROUNDS` in all: with fewer wrong labels it sees more of the rest.

::

    python benchmarks/preference_noise.py run --seeds 0 1 2
    python benchmarks/preference_noise.py table

The settings were chosen on seeds 10 and 11, which are not among those reported.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
import transformers
from part_two import Method, Record, Records, between, columns, run_seeds, spread, treated
from torch import Tensor

from mossrlhf import (
    AdaptiveMargin,
    FlipLabels,
    PreferenceStrength,
    RewardModel,
    RewardTrainer,
    SmoothLabels,
    ToyWorld,
)
from mossrlhf.data import PairCollator
from mossrlhf.demo import fine_tune, training_arguments
from mossrlhf.reward_modeling.scoring import pair_margins

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "preference_noise.json"
PAGE = ROOT / "docs" / "reward_modeling.md"
MARKS = ("<!-- written by: benchmarks/preference_noise.py table -->\n", "<!-- end -->\n")

Pace = Mapping[str, Any]

PAIRS, HELD_OUT, NOISE = 8000, 1000, 0.3
CLEAR = 2.0
"""By how much the true qualities of a pair's responses differ at least, on a scale of -4 to 4."""

MODELS, FOLDS, ROUNDS = 6, 2, 3
JUDGED: Pace = {"learning_rate": 1e-3, "num_train_epochs": 8}
"""How the models that are compared learn: at a pace that serves clean labels, to the end."""

SOONER: Pace = {"learning_rate": 1e-3, "num_train_epochs": 4}
"""And half as long: the remedy that costs nothing."""

MEMBER: Pace = {
    "learning_rate": 5e-4,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 64,
}
"""How those of the ensemble learn: in large batches, stopped before they know labels by heart."""

FLIP = FlipLabels()
SMOOTH = SmoothLabels()
MARGIN = AdaptiveMargin(scale=0.5)
ALONE: dict[str, tuple[Method, ...]] = {
    "none": (),
    "flipping": (FLIP,),
    "smoothing": (SMOOTH,),
    "margin": (MARGIN,),
}
"""Arms that go by the strengths of the first round."""

IN_ROUNDS: dict[str, tuple[Method, ...]] = {
    "flipping in rounds": (FLIP,),
    "all three": (FLIP, SMOOTH, MARGIN),
}
"""Arms that go by those of the last, in which most wrong labels have been flipped already."""

LABELS = {
    "clean": "labels without noise",
    "none": "the noisy labels",
    "sooner": "the noisy labels, for half as long",
    "all three": "flipping in rounds, smoothing and margin",
}


class Study:
    """One seed: an SFT model, pairs with and without noise, and reward models of them.

    Args:
        seed: of the noise, the models and their training.
        folder: of logs.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        world = ToyWorld()
        self.tokenizer = world.tokenizer()
        torch.manual_seed(seed)
        self.policy = transformers.LlamaForCausalLM(world.model_config())
        fine_tune(
            self.policy,
            self.tokenizer,
            world.sft_examples(2000, seed=seed),
            folder,
            learning_rate=4e-3,
            num_train_epochs=4,
            per_device_train_batch_size=32,
            seed=seed,
        )
        self.clean = truly_ordered(world.pairs(3 * PAIRS, seed=seed))[:PAIRS]
        self.noisy = with_noise(self.clean, NOISE, seed)
        held_out = truly_ordered(world.pairs(3 * HELD_OUT, split="eval", seed=seed))
        self.held_out = held_out[:HELD_OUT]

    def member(self, records: Records, seed: int) -> RewardModel:
        """Train one of the ensemble."""
        return self.train(records, seed, MEMBER)

    def train(self, records: Records, seed: int, pace: Pace = JUDGED) -> RewardModel:
        """Train a reward model with whatever columns the records have."""
        trainer = RewardTrainer(
            RewardModel.from_language_model(self.policy),
            training_arguments(
                self.folder,
                per_device_eval_batch_size=128,
                seed=seed,
                **{"per_device_train_batch_size": 16, **pace},
            ),
            processing_class=self.tokenizer,
            train_dataset=list(records),
            data_collator=PairCollator(self.tokenizer),
            **columns(records),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return trainer.reward_model

    def accuracy(self, model: RewardModel) -> float:
        """Return how often a model is right about held-out pairs in their true order."""
        margins = pair_margins(model, self.held_out, PairCollator(self.tokenizer), 128)
        return ((margins > 0).double() + 0.5 * (margins == 0)).mean().item()

    def measure(self, records: Records, turn: int) -> PreferenceStrength:
        """Measure strengths by a new ensemble."""
        return PreferenceStrength.measure(
            self.member, records, PairCollator(self.tokenizer), models=MODELS, folds=FOLDS,
            seed=100 * self.seed + 1000 * turn, batch_size=128,
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Measure the strengths, then train and ask each arm."""
        strength = self.measure(self.noisy, 0)
        annotated = strength.annotate(self.noisy)
        wrong = torch.tensor([pair["wrong"] for pair in self.noisy])
        found: dict[str, Any] = {
            "auc": auc(-strength.mean[wrong], -strength.mean[~wrong]),
            "flipped": describe(FLIP(annotated)),
        }
        self.ask(found, "none", self.noisy)
        self.ask(found, "clean", self.clean)
        self.ask(found, "sooner", self.noisy, SOONER)
        last = annotated
        left = []
        for turn in range(1, ROUNDS):
            flipped = FLIP(last)
            left.append(share_of_wrong(flipped))
            last = self.measure(flipped, turn).annotate(flipped)
        found["wrong_labels_left"] = [*left, share_of_wrong(FLIP(last))]
        for name, methods in IN_ROUNDS.items():
            self.ask(found, name, treated(last, methods))
        for name, methods in ALONE.items():
            if name not in found:
                self.ask(found, name, treated(annotated, methods))
        return found

    def ask(self, found: dict[str, Any], name: str, records: Records, pace: Pace = JUDGED) -> None:
        """Train a model and note how often it is right."""
        found[name] = self.accuracy(self.train(records, self.seed, pace))
        print(f"  {name:24} {found[name]:.3f}", flush=True)


def truly_ordered(pairs: Sequence[Record]) -> list[Record]:
    """Put pairs in the order of the true preference; leave out those that are not `CLEAR`."""
    kept = [pair for pair in pairs if abs(pair["true_margin"]) >= CLEAR]
    return [pair if pair["true_margin"] > 0 else turned(pair) for pair in kept]


def turned(pair: Record) -> Record:
    """Exchange the two responses of a pair."""
    sides = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    return {**pair, **sides, "true_margin": -pair["true_margin"]}


def with_noise(pairs: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Turn exactly a share of the pairs, and say in `wrong` which."""
    wrong = set(Random(f"noise/{seed}").sample(range(len(pairs)), round(share * len(pairs))))
    return [(turned(p) if i in wrong else p) | {"wrong": i in wrong} for i, p in enumerate(pairs)]


def describe(records: Records) -> dict[str, float]:
    """Say how many labels were flipped, and how many of those were wrong."""
    flipped = [record for record in records if record["flipped"]]
    right = sum(record["wrong"] for record in flipped)
    wrong = sum(record["wrong"] for record in records)
    return {
        "share": len(flipped) / len(records),
        "precision": right / max(1, len(flipped)),
        "recall": right / max(1, wrong),
    }


def share_of_wrong(records: Records) -> float:
    """Say how many labels are wrong after some have been flipped."""
    return mean(record["wrong"] != record["flipped"] for record in records)


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the probability that one of the first exceeds one of the second; ties are half."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive)
    up_to = torch.searchsorted(order, positive, right=True)
    return ((below + up_to).double() / 2 / len(negative)).mean().item()


def main(argv: list[str] | None = None) -> None:
    """Run seeds and keep their figures, or write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", default=str(FIGURES))
    args = parser.parse_args(argv)
    if args.command == "table":
        figures = json.loads(Path(args.json).read_text(encoding="utf-8"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
        return
    transformers.utils.logging.disable_progress_bar()
    settings = {
        "pairs": PAIRS, "held_out": HELD_OUT, "clear": CLEAR, "noise": NOISE, "models": MODELS,
        "folds": FOLDS, "rounds": ROUNDS, "judged": JUDGED, "sooner": SOONER, "member": MEMBER,
        "methods": [repr(m) for m in (FLIP, SMOOTH, MARGIN)],
    }  # fmt: skip

    def work(seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = Study(seed, Path(folder)).run()
        print(f"  clean {found['clean']:.3f}, AUC {found['auc']:.3f}, {found['flipped']}")
        return found

    command = "python benchmarks/preference_noise.py run --seeds"
    run_seeds(args.seeds, Path(args.json), settings, work, command)


def with_table(page: str, figures: Mapping[str, Any]) -> str:
    """Put the figures into a page, between the marks.

    Args:
        page: Markdown with both `MARKS`.
        figures: as ``run`` keeps them.

    Returns:
        the page.
    """
    seeds = list(figures["seeds"].values())
    arms = ("clean", "none", "sooner", *list(ALONE)[1:], *IN_ROUNDS)
    names = [name for name in arms if name in seeds[0]]
    lines = ["", "| trained on | right on the held-out pairs | of what the noise took |"]
    lines += ["| --- | --- | --- |"]
    for name in names:
        values = [seed[name] for seed in seeds]
        back = [(s[name] - s["none"]) / (s["clean"] - s["none"]) for s in seeds]
        label = LABELS.get(name, name)
        regained = "" if name in ("clean", "none") else f"{mean(back):.0%} ({spread(back, '.0%')})"
        lines.append(f"| {label} | {mean(values):.3f} ({spread(values, '.3f')}) | {regained} |")
    flipped = [seed["flipped"] for seed in seeds]
    settings = figures["settings"]
    lines += [
        "",
        f"Means of {len(seeds)} seeds, and in brackets each of them. {settings['pairs']} pairs,",
        f"{settings['noise']:.0%} of the labels flipped, {settings['models']} models in "
        f"{settings['folds']} folds. Strength separates",
        f"flipped from clean pairs with an AUC of {mean(s['auc'] for s in seeds):.3f} "
        f"({spread([s['auc'] for s in seeds], '.3f')}); of the labels",
        f"that were flipped back {mean(f['precision'] for f in flipped):.0%} were wrong, and "
        f"{mean(f['recall'] for f in flipped):.0%} of the wrong ones were found. After "
        f"{settings['rounds']} rounds {mean(s['wrong_labels_left'][-1] for s in seeds):.1%} of the "
        "labels were",
        "wrong.",
        "",
    ]
    return between(page, MARKS, lines)


if __name__ == "__main__":
    main()
