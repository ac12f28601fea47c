"""Iterations of ours and of two peers in turn, each in its own process, and the page's tables."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import describe, versions
from part_two import between

import mossrlhf

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).parent
FIGURES = ROOT / "benchmarks" / "results" / "ppo_iteration.json"
PAGE = ROOT / "docs" / "performance.md"
MARKS = ("<!-- written by: benchmarks/ppo_iteration.py --compare -->\n", "<!-- end -->\n")

OURS, TRL, LOOP = "ppo_iteration.py", "trl_iteration.py", "minimal_loop.py"
STAGES = ("collect", "score", "annotate", "estimate", "update")
TINY = ["--shape", "tiny", "--iters", "6"]
MANY = ["--rollouts", "128", "--minibatches", "4", "--iters", "2"]
RAGGED = [OURS, *MANY, "--lengths", "log-normal", "--response", "256"]

WORKS = {
    "wide": {
        "TRL 1.12": "wide, TRL", "minimal loop": "wide, minimal loop", "mossrlhf": "wide",
    },
    "tiny": {
        "TRL 1.12": "tiny, TRL", "minimal loop": "tiny, minimal loop", "mossrlhf": "tiny",
        "mossrlhf, 896 tokens at a time": "tiny, 896 tokens at a time",
    },
}  # fmt: skip
"""By work, who does it, and by which of `RUNS`."""

RUNS: dict[str, Sequence[str]] = {
    "wide, TRL": [TRL],
    "wide, minimal loop": [LOOP],
    "wide": [OURS],
    "tiny, TRL": [TRL, *TINY],
    "tiny, minimal loop": [LOOP, *TINY],
    "tiny": [OURS, *TINY],
    "tiny, 896 tokens at a time": [OURS, *TINY, "--max-tokens", "896"],
    "log-normal lengths": RAGGED,
    "one length": [OURS, *MANY, "--response", "49"],  # their mean
}
"""What is run, by which words."""

ROUNDS = {"log-normal lengths": 3, "one length": 3}
"""Rounds that those take part in which last long; what an option is worth is asked in one."""

WORTH = {
    "no padding": ("log-normal lengths", [*RAGGED, "--without", "packing"]),
    "finished responses leave": ("log-normal lengths", [*RAGGED, "--without", "segments"]),
}
"""What is left out of which run, and by which words."""


def main(args: argparse.Namespace) -> int:
    """Run all in turn, round after round, and write figures and page."""
    if args.peer is None:
        sys.exit("--peer: say which Python has TRL 1.12 (see the head of trl_iteration.py)")
    left_out = {f"without {name}": words for name, (_, words) in WORTH.items()}
    found: dict[str, list[Any]] = {name: [] for name in (*RUNS, *left_out)}
    for turn in range(args.rounds):
        rounds = {**dict.fromkeys(left_out, 1), **ROUNDS}
        for name, (script, *words) in {**RUNS, **left_out}.items():
            if turn >= rounds.get(name, args.rounds):
                continue
            python = args.peer if script == TRL else sys.executable
            found[name].append(run([python, str(HERE / script), *words, "--device", args.device]))
            print(name, json.dumps(found[name][-1]), flush=True)
        keep(args, found)
    return 0


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a command whose last line is JSON."""
    known = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{Path(command[1]).name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep(args: argparse.Namespace, found: Mapping[str, list[Any]]) -> None:
    """Write the figures so far, and the page."""
    device = describe(torch.device(args.device))
    of_devices = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    of_devices[device["slug"]] = {
        "command": "python benchmarks/ppo_iteration.py --compare --peer path/to/trl/bin/python",
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"mossrlhf": mossrlhf.__version__, **versions(), "trl": "1.12.0"},
        "overhead": {work: overhead(found, work, memory_of(device)) for work in WORKS},
        "runs": found,
    }
    FIGURES.write_text(json.dumps(of_devices, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), of_devices), encoding="utf-8")


def with_tables(page: str, of_devices: Mapping[str, Any]) -> str:
    """Put the figures into the page, between the marks."""
    lines: list[str] = []
    for figures in of_devices.values():
        used, device, runs = figures["versions"], figures["device"], figures["runs"]
        memory = memory_of(device)
        lines += [
            "",
            f"{named(device)}, {figures['threads']} threads; torch {used['torch']}. Medians of "
            f"{len(runs['wide'])} rounds, in which all take their turn.",
            "",
            "| work | by | seconds | × TRL's speed | peak memory, MiB | of TRL's | collect "
            "| score | annotate | update | floor's share |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for work, names in WORKS.items():
            theirs = runs[names["TRL 1.12"]]
            lines += [row([work, who], runs[n], theirs, memory) for who, n in names.items()]
        lines += ["", *overheads(figures["overhead"]), "", *lengths(runs), "", *worth(runs)]
    return between(page, MARKS, [*lines, ""])


def named(device: Mapping[str, Any]) -> str:
    """Return a device's name, with a processor's instructions."""
    return " ".join(filter(None, [device["name"], device.get("instructions")]))


def memory_of(device: Mapping[str, Any]) -> str:
    """Return which figure is a device's peak memory."""
    return "peak_gpu_mb" if device["type"] == "cuda" else "peak_rss_mb"


def row(head: list[str], runs: Sequence[Any], theirs: Sequence[Any], memory: str) -> str:
    """Lay out the runs of one."""
    seconds, peak = middle(runs, "median"), middle(runs, memory)
    faster, leaner = middle(theirs, "median") / seconds, peak / middle(theirs, memory)
    cells = [*head, f"{seconds:.3g}", f"{faster:.2f}", f"{peak:,.0f}", f"{leaner:.2f}"]
    for stage in ("collect", "score", "annotate", "update"):
        found = [run["stages"][stage] for run in runs if "stages" in run]
        cells.append(f"{median(found):.3g}" if found else "")
    cells.append(f"{middle(runs, 'share_of_floor'):.0%}" if "share_of_floor" in runs[0] else "")
    return f"| {' | '.join(cells)} |"


def overhead(runs: Mapping[str, Sequence[Any]], work: str, memory: str) -> dict[str, float]:
    """Return ours over the minimal loop: each stage's time, an iteration's, and peak memory."""
    ours, loop = (runs[WORKS[work][who]] for who in ("mossrlhf", "minimal loop"))

    def seconds(done: Sequence[Any], stage: str) -> float:
        return float(median(run["stages"][stage] for run in done))

    found = {stage: seconds(ours, stage) / seconds(loop, stage) for stage in STAGES}
    found["iteration"] = middle(ours, "median") / middle(loop, "median")
    found["peak memory"] = middle(ours, memory) / middle(loop, memory)
    return {name: round(ratio, 3) for name, ratio in found.items()}


def overheads(by_work: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lay out ours over the minimal loop, by work."""
    names = list(next(iter(by_work.values())))
    return [
        "Ours over the minimal loop, stage by stage:",
        "",
        f"| work | {' | '.join(names)} |",
        "|" + "---|" * (len(names) + 1),
        *(
            f"| {work} | {' | '.join(f'× {ratios[name]:.2f}' for name in names)} |"
            for work, ratios in by_work.items()
        ),
    ]


def lengths(runs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Say what responses of different lengths cost, by the token."""
    cost, of_responses = {}, {}
    for name in ("log-normal lengths", "one length"):
        tokens, seconds = (middle(runs[name], key) for key in ("response_tokens", "median"))
        cost[name], of_responses[name] = seconds / (tokens + 128 * 64), seconds / tokens
    more, alone = (c["log-normal lengths"] / c["one length"] - 1 for c in (cost, of_responses))
    return [
        "Response lengths drawn log-normal (median 32, at most 256) in place of one length, their "
        'mean; 128 responses, otherwise "wide": '
        f"{1e3 * cost['log-normal lengths']:.3g} ms a token of prompt or response against "
        f"{1e3 * cost['one length']:.3g}, that is {more:+.0%} ({alone:+.0%} by tokens of responses "
        f"alone). Medians of {len(runs['one length'])} rounds; of what is left out below, one."
    ]


def worth(runs: Mapping[str, Sequence[Any]]) -> list[str]:
    """Say what each option of speed is worth, by what is slower without it."""
    lines = ["| option | in | time without it | collect | annotate | update |", "|" + "---|" * 6]
    for name, (work, _) in WORTH.items():
        left_out = runs[f"without {name}"]
        cells = [name, work, f"× {middle(left_out, 'median') / middle(runs[work], 'median'):.2f}"]
        for stage in ("collect", "annotate", "update"):
            both = [median(r["stages"][stage] for r in each) for each in (left_out, runs[work])]
            cells.append(f"× {both[0] / both[1]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def middle(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of a figure over rounds."""
    return float(median(run[name] for run in runs))
