"""Ours and TRL's iterations in turn, each in a process of its own, and what the page says of it."""

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

WORKS: dict[str, dict[str, Sequence[str]]] = {
    "wide": {
        "mossrlhf": ["ppo_iteration.py"],
        "trl": ["trl_iteration.py"],
    },
    "tiny": {
        "mossrlhf": ["ppo_iteration.py", "--shape", "tiny", "--iters", "6"],
        "trl": ["trl_iteration.py", "--shape", "tiny", "--iters", "6"],
    },
}
"""What is run: by whom, with which words."""


def main(args: argparse.Namespace) -> int:
    """Run all works in turn, round after round, and write figures and page."""
    if args.peer is None:
        sys.exit("--peer: say which Python has TRL 1.12 (see the head of trl_iteration.py)")
    rounds: dict[str, dict[str, list[Any]]] = {w: {who: [] for who in WORKS[w]} for w in WORKS}
    for _ in range(args.rounds):
        for work, players in WORKS.items():
            for who, (script, *words) in players.items():
                python = args.peer if who == "trl" else sys.executable
                found = run([python, str(HERE / script), *words, "--device", args.device])
                rounds[work][who].append(found)
                print(work, json.dumps(found), flush=True)
        keep(args, rounds)
    return 0


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a command whose last line is JSON."""
    known = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{Path(command[1]).name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep(args: argparse.Namespace, rounds: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Write the figures so far, and the page."""
    device = describe(torch.device(args.device))
    of_devices = json.loads(FIGURES.read_text("utf-8")) if FIGURES.exists() else {}
    of_devices[device["slug"]] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"mossrlhf": mossrlhf.__version__, **versions(), "trl": "1.12.0"},
        "works": rounds,
    }
    FIGURES.write_text(json.dumps(of_devices, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), of_devices), encoding="utf-8")


def with_table(page: str, of_devices: Mapping[str, Any]) -> str:
    """Put the figures into the page, between the marks."""
    lines: list[str] = []
    for figures in of_devices.values():
        used, device = figures["versions"], figures["device"]
        lines += [
            "",
            f"{device['name']}, {figures['threads']} threads; torch {used['torch']}. Medians of "
            f"{len(figures['works']['wide']['trl'])} rounds, in which all take their turn.",
            "",
            "| work | by | seconds | × TRL's speed | peak memory, MB | of TRL's | collect "
            "| score | annotate | update | floor's share |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for work, players in figures["works"].items():
            theirs = players["trl"]
            for who, runs in players.items():
                lines.append(row(work, who, runs, theirs, device["type"] == "cuda"))
    return between(page, MARKS, [*lines, ""])


def row(work: str, who: str, runs: Sequence[Any], theirs: Sequence[Any], cuda: bool) -> str:
    """Lay out the runs of one."""
    memory = "peak_gpu_mb" if cuda else "peak_rss_mb"
    seconds, peak = middle(runs, "median"), middle(runs, memory)
    faster, leaner = middle(theirs, "median") / seconds, peak / middle(theirs, memory)
    cells = [work, who, f"{seconds:.3g}", f"{faster:.2f}", f"{peak:,.0f}", f"{leaner:.2f}"]
    for stage in ("collect", "score", "annotate", "update"):
        found = [run["stages"][stage] for run in runs if "stages" in run]
        cells.append(f"{median(found):.3g}" if found else "")
    cells.append(f"{middle(runs, 'share_of_floor'):.0%}" if "share_of_floor" in runs[0] else "")
    return f"| {' | '.join(cells)} |"


def middle(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of a figure over rounds."""
    return float(median(run[name] for run in runs))
