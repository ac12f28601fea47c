"""What Part II's methods are worth on real pairs: HH-RLHF, by the reward model of `hh_accuracy.py`.

Its split (the last 300 pairs are held out), sizes, epochs and learning rates; the methods' settings
are P2's, or those that the toy world chose, and none was tried here before::

    python benchmarks/hh_part_two.py run harmless-base.jsonl --seeds 0 1 2
    python benchmarks/hh_part_two.py table
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from part_two import Method, Records, between, columns, run_seeds, spread, treated, with_error

from mossrlhf import AdaptiveMargin, FlipLabels, PreferenceStrength, RankingLoss, SmoothLabels
from mossrlhf.data import PairCollator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from support.corpus import Corpus
from support.from_scratch import ScratchConfig, read_corpus, train_reward, train_sft

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "hh_part_two.json"
PAGE = ROOT / "docs" / "reward_modeling.md"
MARKS = ("<!-- written by: benchmarks/hh_part_two.py table -->\n", "<!-- end -->\n")

MODELS, FOLDS = 8, 2
FLIP, SMOOTH, MARGIN = FlipLabels(share=0.1, below=None), SmoothLabels(), AdaptiveMargin(scale=0.5)
ONE_ALPHA = 0.1
ARMS: dict[str, tuple[Method, ...]] = {
    "none": (),
    "flipping the weakest tenth": (FLIP,),
    "one α for all": (),
    "smoothing by strength": (SMOOTH,),
    "adaptive margin": (MARGIN,),
    "all three": (FLIP, SMOOTH, MARGIN),
}


def run(corpus: Corpus, config: ScratchConfig) -> dict[str, Any]:
    """Measure the strengths of one seed, then train and ask each arm."""
    policy, _ = train_sft(corpus, config)

    def member(records: list[dict[str, Any]], seed: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return train_reward(corpus, policy, replace(config, seed=seed), records)[0]

    collator = PairCollator(corpus.tokenizer, max_length=config.pair_length)
    strength = PreferenceStrength.measure(
        member, corpus.train, collator, models=MODELS, folds=FOLDS, seed=100 * (config.seed + 1),
        batch_size=64,
    )  # fmt: skip
    annotated = strength.annotate(corpus.train)
    found: dict[str, Any] = {"agrees": (strength.mean > 0).double().mean().item()}
    for name, methods in ARMS.items():
        records: Records = treated(annotated, methods)
        options: dict[str, Any] = dict(columns(records))
        if name == "one α for all":
            options["loss"] = RankingLoss(label_smoothing=ONE_ALPHA)
        with torch.random.fork_rng(devices=[]):  # each begins as that of `hh_accuracy.py` does
            _, figures = train_reward(corpus, policy, config, list(map(dict, records)), **options)
        found[name] = figures["accuracy"]
        print(f"  {name:28} {found[name]:.3f}", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Run seeds and keep their figures, or write the page's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("file", nargs="?", help="preference pairs, to run on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", default=str(FIGURES))
    args = parser.parse_args(argv)
    kept = Path(args.json)
    if args.command == "table":
        figures = json.loads(kept.read_text(encoding="utf-8"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
        return
    if args.file is None:
        parser.error("run needs a file of preference pairs")
    transformers.utils.logging.disable_progress_bar()
    corpus = read_corpus(ScratchConfig(file=args.file))
    settings = {
        "pairs": len(corpus.train), "held_out": len(corpus.held_out), "models": MODELS,
        "folds": FOLDS, "one_alpha": ONE_ALPHA,
        "methods": [repr(m) for m in (FLIP, SMOOTH, MARGIN)],
    }  # fmt: skip

    def work(seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run(corpus, ScratchConfig(file=args.file, seed=seed, output_dir=folder))

    command = f"python benchmarks/hh_part_two.py run {Path(args.file).name} --seeds"
    run_seeds(args.seeds, kept, settings, work, command)


def with_table(page: str, figures: Mapping[str, Any]) -> str:
    """Put the figures into a page, between the marks.

    Args:
        page: Markdown with both `MARKS`.
        figures: as ``run`` keeps them.

    Returns:
        the page.
    """
    seeds, settings = list(figures["seeds"].values()), figures["settings"]
    lines = ["", "| method | right on the held-out pairs | against none |", "| --- | --- | --- |"]
    for name in ARMS:
        values = [seed[name] for seed in seeds]
        gain = "" if name == "none" else with_error([s[name] - s["none"] for s in seeds], "+.3f")
        lines.append(f"| {name} | {mean(values):.3f} ({spread(values, '.3f')}) | {gain} |")
    accuracy = mean(seed["none"] for seed in seeds)
    error = sqrt(accuracy * (1 - accuracy) / settings["held_out"])
    lines += [
        "",
        f"Means of {len(seeds)} seeds, and in brackets each of them; ± is the standard error "
        "between seeds, of the",
        f"difference. The {settings['held_out']} held-out pairs are the same for all, and alone "
        f"make for one of {error:.3f}. {settings['pairs']} pairs",
        f"were learned from; {settings['models']} models in {settings['folds']} folds agree with "
        f"{mean(s['agrees'] for s in seeds):.0%} of their labels.",
        "",
    ]
    return between(page, MARKS, lines)


if __name__ == "__main__":
    main()
