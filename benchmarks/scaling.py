"""How time and memory of a PPO iteration grow with what is asked of it.

    python benchmarks/scaling.py run --rounds 3            # all points in turn, on an idle machine
    python benchmarks/scaling.py run --only vocabulary     # an axis anew, the others kept
    python benchmarks/scaling.py run --more --rounds 2     # rounds beside those that are kept
    python benchmarks/scaling.py table                     # into docs/performance.md, and a picture
    python benchmarks/scaling.py run --quick               # does it run; its times mean nothing

Each point is `benchmarks/ppo_iteration.py` in processes of its own. All points are measured in
turn, round after round: a slow minute of the machine meets one round of a few points. A point that
several axes share is measured once a round. Figures are kept after every round.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from growth import lines_of, page_of
from growth_picture import draw
from iteration_work import SHAPES
from measuring import describe, pathless, versions

import mossrlhf

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "ppo_iteration.py"
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
QUICK_RESULTS = ROOT / "outputs" / "scaling" / "scaling.json"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "scaling.png"

Options = dict[str, int]
Axes = Mapping[str, Mapping[int, Options]]

MIDDLE: Options = dict(
    vocab=8192, hidden=256, layers=2, prompt=32, response=64, rollouts=16, iters=3
)
SMALLEST: Options = dict(vocab=64, hidden=32, layers=1, prompt=8, response=8, rollouts=4, iters=2)

KEPT = (
    "median", "iter_s", "stages", "response_tokens",
    "peak_rss_mb", "start_rss_mb", "tokenizer_mb",
)  # fmt: skip
"""Of what an iteration says of itself; megabytes there are of 2²⁰ bytes."""


def axes_of(middle: Options, shared: Options, values: Mapping[str, Sequence[int]]) -> Axes:
    """Return the options of every point, by axis and value; several processes share a shape."""
    options = {
        "response": lambda n: dict(response=n, prompt=8),  # short, so that responses are the axis
        "vocabulary": lambda n: dict(vocab=n),
        "rollouts": lambda n: dict(rollouts=n),
        "hidden": lambda n: dict(hidden=n),
        "processes": lambda n: dict(**shared, processes=n, threads=1),
    }
    return {
        name: {n: {**middle, **options[name](n)} for n in numbers}
        for name, numbers in values.items()
    }


AXES = axes_of(
    MIDDLE,
    SHAPES["wide"],
    {
        "response": (32, 64, 128, 256),
        "vocabulary": (8192, 32000, 65536, 151936),
        "rollouts": (4, 8, 16, 32, 64),
        "hidden": (128, 256, 512),
        "processes": (1, 2),
    },
)
QUICK_AXES = axes_of(
    SMALLEST,
    {},
    {
        "response": (8, 16),
        "vocabulary": (64, 128),
        "rollouts": (4, 8),
        "hidden": (32, 64),
        "processes": (1, 2),
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write what was measured; 1 where a point could not be measured."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.what == "table":
        if not args.out.is_file():
            raise SystemExit(f"scaling.py table: no figures in {args.out}; measure first: run")
        figures = json.loads(args.out.read_text(encoding="utf-8"))
        draw(figures, args.picture)
        args.page.write_text(page_of(args.page.read_text(encoding="utf-8"), figures), "utf-8")
        return 0
    figures = run(args)
    print("\n".join(lines_of(figures)))
    if args.quick:
        draw(figures, args.out.with_suffix(".png"))
    return int(any("failed" in point for point in figures["points"].values()))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--rounds", type=int, help="by default 3")
    parser.add_argument("--only", nargs="+", choices=AXES, help="axes to measure")
    parser.add_argument("--more", action="store_true", help="beside the rounds that are kept")
    parser.add_argument("--quick", action="store_true", help="two points an axis, tiny, one round")
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(words)
    if args.what == "table" and (args.rounds or args.only or args.more or args.quick):
        parser.error("table takes --out, --page and --picture alone; it measures nothing")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected 1 or more")
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.out = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all points in turn, round after round, and keep the figures after each round.

    Args:
        args: of the command line.

    Returns:
        the figures: where and how they were taken; "axes", by name the values and the points
        they stand for; "points", by command the options, the "runs", and how it "failed".
    """
    figures = begun(args)
    all_axes = QUICK_AXES if args.quick else AXES
    wanted = [o for name in args.only or all_axes for o in all_axes[name].values()]
    points = {command_of(options): options for options in wanted}
    for number in range(args.rounds):
        for command, options in points.items():
            point = figures["points"].setdefault(command, {"options": options, "runs": []})
            found = alone(options)
            if "failed" in found:
                point["failed"] = found["failed"]
            else:
                point["runs"].append({key: found[key] for key in KEPT if key in found})
            said = found.get("failed") or f"{found['median']} s"
            print(f"round {number + 1} of {args.rounds}: {command}: {said}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


def begun(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures that a run adds to, of all axes or, with ``--only``, of the others.

    Raises:
        SystemExit: where kept figures are to be added to that were taken elsewhere.
    """
    all_axes = QUICK_AXES if args.quick else AXES
    told = [f"--rounds {args.rounds}", *(["--only", *args.only] if args.only else [])]
    told += [word for word in ("more", "quick") if getattr(args, word)]
    told = [f"--{word}" if word in ("more", "quick") else word for word in told]
    how = {
        "benchmark": "scaling",
        "device": describe(torch.device("cpu")),
        "versions": {"mossrlhf": mossrlhf.__version__, **versions()},
        "threads": torch.get_num_threads(),
        "quick": args.quick,
    }
    command = " ".join(["python benchmarks/scaling.py run", *told])
    chosen = {
        name: [{"value": n, "point": command_of(o)} for n, o in all_axes[name].items()]
        for name in args.only or all_axes
    }
    anew = {point["point"] for points in chosen.values() for point in points}
    old: dict[str, Any] = {"axes": {}, "points": {}, "commands": []}
    if (args.only or args.more) and args.out.is_file():
        old = json.loads(args.out.read_text(encoding="utf-8"))
        if differing := [key for key in how if old.get(key) != how[key]]:
            raise SystemExit(
                f"scaling.py: {args.out.name} was taken with another {differing[0]} "
                f"({old.get(differing[0])}, now {how[differing[0]]}); measure everything anew, "
                "without --only and --more, or give another file as --out"
            )
    axes = {**old["axes"], **chosen}
    used = {point["point"] for points in axes.values() for point in points}
    kept = used if args.more else used - anew
    points = {name: one for name, one in old["points"].items() if name in kept}
    for name in anew & points.keys():
        points[name].pop("failed", None)
    return {
        **how,
        "commands": [*old["commands"], command],
        "axes": {name: axes[name] for name in all_axes if name in axes},
        "points": points,
    }


def command_of(options: Options) -> str:
    """Return the command that measures a point."""
    return " ".join(["python benchmarks/ppo_iteration.py", *words_of(options)])


def words_of(options: Options) -> list[str]:
    """Return options as they are given to a command."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def alone(options: Options) -> dict[str, Any]:
    """Measure a point in processes of its own; where it fails, return why."""
    command = [sys.executable, str(SCRIPT), *words_of(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}"}
    if done.returncode:
        return {"failed": pathless((done.stderr.strip().splitlines() or ["no reason given"])[-1])}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
