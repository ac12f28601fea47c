"""The toy world over several seeds, as the table of docs/toy_results.md.

    python benchmarks/toy_seeds.py run en:0 en:1 en:2 en:3 en:4 zh:0   # minutes each
    python benchmarks/toy_seeds.py sweep                               # vanilla PPO's learning rate
    python benchmarks/toy_seeds.py table                               # from what the two left

The learning rate of the tuned vanilla arm is chosen on a seed that is not among those of the
table, by the true quality, which favors vanilla PPO: PPO-max's settings are not chosen by it.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from mossrlhf.evaluation import own_randomness
from mossrlhf.recipes import toy
from mossrlhf.recipes.bookkeeping import Clock

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "seeds"
FIGURES = ROOT / "benchmarks" / "results" / "toy_seeds.json"
PAGE = ROOT / "docs" / "toy_results.md"
PICTURE = ROOT / "docs" / "images" / "curves.png"
SWEEP_SEED = 10
RATES = (1e-3, 5e-4, 3e-4, 1e-4, 3e-5)


def run(names: Sequence[str]) -> None:
    """Run the main job for each ``lang:seed``, and keep its figures."""
    for name in names:
        lang, seed = name.split(":")
        config = toy.ToyConfig(lang=lang, seed=int(seed), output_dir=str(FOLDER / f"{lang}{seed}"))
        keep(name, toy.main(config))


def sweep() -> None:
    """Run vanilla PPO at every learning rate on the seed put aside for it."""
    config = toy.ToyConfig(seed=SWEEP_SEED, output_dir=str(FOLDER / "sweep"), arms=())
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    stage, _, _ = toy.prepare(config, Path(config.output_dir), Clock())
    for rate in RATES:
        with own_randomness(SWEEP_SEED):
            here = replace(config, output_dir=str(Path(config.output_dir) / f"{rate:g}"))
            trainer = toy.run("vanilla_ppo", stage, here, learning_rate=rate)
            if trainer.run.interrupted:
                sys.exit(f"learning rate {rate:g} was interrupted: its figures are not kept")
        keep(f"sweep:{rate:g}", toy.measure(trainer))


def keep(name: str, figures: Mapping[str, Any]) -> None:
    """Add figures to the file of them, unless Ctrl-C cut the run short."""
    if figures.get("interrupted"):
        sys.exit(f"{name} was interrupted: its figures are not kept")
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps({**known, name: figures}, indent=1, sort_keys=True) + "\n")


def table() -> None:
    """Write the page."""
    known = json.loads(FIGURES.read_text())
    seeds = {k: v for k, v in known.items() if not k.startswith("sweep")}
    english = [v for k, v in seeds.items() if k.startswith("en")]
    maximal = [v["runs"]["ppo_max"] for v in english]
    below = sum(
        v["runs"]["vanilla_ppo"]["true_quality"] < v["sft"]["true_quality"]
        and v["runs"]["vanilla_ppo"]["collapsed"]
        for v in english
    )
    lines = [
        "# The toy world over seeds",
        "",
        "Written by `benchmarks/toy_seeds.py` from `benchmarks/results/toy_seeds.json`; one run of",
        "`make demo` is one row of each table. Win and lose rates are against the SFT model, on",
        "300 held-out prompts, by the true preference, which nothing is trained or chosen by (but",
        "for the learning rate of the tuned vanilla arm, on a seed of its own, below).",
        "",
        f"PPO-max, English, seeds 0-4: mean win rate {mean(r['win_rate'] for r in maximal):.2f}, "
        f"lowest {min(r['win_rate'] for r in maximal):.2f}; win > lose on "
        f"{sum(r['win_rate'] > r['lose_rate'] for r in maximal)} of {len(maximal)}; "
        f"mean KL {mean(r['kl_per_sequence'] for r in maximal):.1f} nats per sequence. "
        "Vanilla PPO at the same learning rate: collapsed, with less true quality than SFT, "
        f"on {below} of {len(english)}.",
        "",
        "## Before PPO",
        "",
        "| seed | SFT true quality | ended | well-formed | reward model right on fresh pairs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, v in seeds.items():
        sft = v["sft"]
        lines.append(
            f"| {name} | {sft['true_quality']:.2f} | {sft['ended']:.1%} | "
            f"{sft['well_formed']:.1%} | {v['reward_model']['accuracy']:.1%} |"
        )
    for arm in ("vanilla_ppo", "vanilla_ppo_tuned", "ppo_max"):
        lines += ["", f"## {arm} (learning rate {toy.rate(arm):g})", "", *header()]
        lines += [row(name, v["runs"][arm]) for name, v in seeds.items()]
    lines += [
        "",
        "## The learning rate of vanilla PPO",
        "",
        f"Seed {SWEEP_SEED}, one run each; `toy.TUNED_LEARNING_RATE` is the tuned arm's.",
        "",
        *header("learning rate"),
    ]
    sweeps = [k for k in known if k.startswith("sweep")]
    sweeps.sort(key=lambda name: -float(name.split(":")[1]))
    lines += [row(name.split(":")[1], known[name]) for name in sweeps]
    PAGE.write_text("\n".join(lines) + "\n")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FOLDER / "en0" / "curves.png", PICTURE)
    print(PAGE.read_text())


def header(first: str = "seed") -> list[str]:
    """Return the head of a table of runs."""
    names = "score | true quality | KL, nats/seq | length | ppl policy | ppl SFT | win | lose"
    return [f"| {first} | {names} | collapsed |", "| --- " * 10 + "|"]


def row(name: str, run: Mapping[str, Any]) -> str:
    """Return a run as a row."""
    figures = (
        f"{run['reward_score']:.2f} | {run['true_quality']:.2f} | {run['kl_per_sequence']:.1f} | "
        f"{run['response_length']:.1f} | {run['perplexity_policy']:.2f} | "
        f"{run['perplexity_sft']:.4g} | {run['win_rate']:.0%} | {run['lose_rate']:.0%}"
    )
    return f"| {name} | {figures} | {'yes' if run['collapsed'] else 'no'} |"


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["table"]
    {"run": lambda: run(rest), "sweep": sweep, "table": table}[command]()
