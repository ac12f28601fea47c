"""How often the reward model of `--train_from_scratch` is right, and a bag of words beside it.

The last 300 pairs of the file are held out; everything else was fixed before they were looked at::

    python benchmarks/hh_accuracy.py harmless-base.jsonl

With ``--validation`` those 300 are put aside altogether, and the last sixth of the rest is held
out: this is what hyper-parameters were chosen on. With ``--json FILE`` the figures are kept, and
``--table`` writes those of benchmarks/results/hh_accuracy.json into docs/real_data.md.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from part_two import between
from torch import Tensor

from mossrlhf.data import load_pairs
from mossrlhf.version import versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from support.corpus import make_corpus
from support.from_scratch import ScratchConfig, train_reward, train_sft

ROOT = Path(__file__).resolve().parent.parent
Pairs = Sequence[Mapping[str, Any]]

SIDES = ("chosen", "rejected")
FIGURES = ROOT / "benchmarks" / "results" / "hh_accuracy.json"
PAGE = ROOT / "docs" / "real_data.md"
MARKS = ("<!-- written by: python benchmarks/hh_accuracy.py --table -->\n", "<!-- end -->\n")


def main(argv: list[str] | None = None) -> None:
    """Train on each seed, and print a table; or write the page's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="preference pairs")
    parser.add_argument("--table", action="store_true", help="write the page, train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", action="store_true", help="spare the last 300 pairs")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    if args.table == (args.file is not None):
        parser.error("give either a file of preference pairs, to train on, or --table")
    if args.table:
        figures = json.loads(FIGURES.read_text(encoding="utf-8"))
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Train on each seed, print the accuracies, keep them."""
    transformers.utils.logging.disable_progress_bar()
    pairs = load_pairs(args.file, skip_bad=True)
    config = ScratchConfig(file=args.file)
    pairs = pairs[: -config.held_out] if args.validation else pairs
    corpus = make_corpus(pairs, config.held_out, config.vocabulary, config.turn_length, config.lang)
    figures = {"bag of words": bag_of_words(corpus.train, corpus.held_out)}
    count = len(corpus.held_out)
    print(f"{len(corpus.train)} pairs to learn from, {count} held out\n")
    print(row("bag of words", figures["bag of words"], count))
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            config = ScratchConfig(file=args.file, seed=seed, output_dir=folder)
            policy, _ = train_sft(corpus, config)
            accuracy = train_reward(corpus, policy, config)[1]["accuracy"]
        figures[f"seed {seed}"] = accuracy
        print(row(f"reward model, seed {seed}", accuracy, count), flush=True)
    accuracies = [figures[f"seed {seed}"] for seed in args.seeds]
    figures["mean"] = mean(accuracies)
    print(row("reward model, mean", figures["mean"], count))
    if len(accuracies) > 1:
        spread = stdev(accuracies) / sqrt(len(accuracies))
        print(f"\nThe standard error is that of {count} pairs, which the seeds share;")
        print(f"between the seeds, the standard error of the mean is {spread:.3f}.")
    if args.json:
        how = {
            "command": f"python benchmarks/hh_accuracy.py {Path(args.file).name}",
            "versions": versions(),
        }
        Path(args.json).write_text(json.dumps({**how, **figures}, indent=1) + "\n")


def with_table(page: str, figures: Mapping[str, Any]) -> str:
    """Put the figures into a page, between the marks.

    Args:
        page: Markdown with both `MARKS`.
        figures: as ``--json`` keeps them, of `ScratchConfig.held_out` pairs.

    Returns:
        the page.
    """
    count = ScratchConfig.held_out
    seeds = {name: value for name, value in figures.items() if name.startswith("seed ")}
    rows = {f"reward model, {name}": value for name, value in seeds.items()}
    rows |= {"reward model, mean of the seeds": mean(seeds.values())}
    rows |= {"bag of words, logistic regression": figures["bag of words"]}
    lines = ["", "| | right on the held-out pairs |", "| --- | --- |"]
    for name, value in rows.items():
        lines.append(f"| {name} | {value:.3f} ± {binomial_error(value, count):.3f} |")
    spread = stdev(seeds.values()) / sqrt(len(seeds))
    lines += [
        "",
        f"± is the binomial standard error of {count} pairs, which all rows share; between the",
        f"seeds, the standard error of the mean is {spread:.3f}.",
        "",
    ]
    return between(page, MARKS, lines)


def binomial_error(accuracy: float, count: int) -> float:
    """Return the standard error of a share of `count` pairs."""
    return sqrt(accuracy * (1 - accuracy) / count)


def row(name: str, accuracy: float, count: int) -> str:
    """Lay out an accuracy with its binomial standard error."""
    return f"{name:24} {accuracy:.3f} ± {binomial_error(accuracy, count):.3f}"


def bag_of_words(train: Pairs, held_out: Pairs, rare: int = 5, l2: float = 30.0) -> float:
    """Fit a logistic regression on which words and bigrams the two responses have.

    Args:
        train: pairs to fit.
        held_out: pairs to be right on.
        rare: words in fewer responses are left out.
        l2: weight of ½·‖w‖², chosen by five-fold cross-validation on the first 1,600 lines.

    Returns:
        accuracy on the held-out pairs; ties count half.
    """
    counts = Counter(word for pair in train for side in SIDES for word in words(pair[side]))
    columns = {word: i for i, word in enumerate(w for w, c in counts.items() if c >= rare)}
    inputs, unseen = differences(train, columns), differences(held_out, columns)
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = -torch.nn.functional.logsigmoid(inputs @ weights).sum()
        total = nll + 0.5 * l2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    margins = unseen @ weights.detach()
    return ((margins > 0).float() + 0.5 * (margins == 0)).mean().item()


def words(text: str) -> set[str]:
    """Return the words and marks of a text, and each two in a row."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())
    return {*found, *map(" ".join, pairwise(found))}


def differences(pairs: Pairs, columns: Mapping[str, int]) -> Tensor:
    """Return ``[P, W]``: 1 where the chosen response alone has a word, −1 where the other has."""
    inputs = torch.zeros(len(pairs), len(columns))
    for pair, vector in zip(pairs, inputs, strict=True):
        for side, sign in zip(SIDES, (1, -1), strict=True):
            for word in words(pair[side]) & columns.keys():
                vector[columns[word]] += sign
    return inputs


if __name__ == "__main__":
    main()
