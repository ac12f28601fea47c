"""Kernels against their peers: first whether they are right, then how long and how much memory.

    python benchmarks/token_stats.py                      # on the CPU; minutes on two idle cores
    python benchmarks/token_stats.py --device cuda        # on a GPU
    python benchmarks/token_stats.py --quick              # tiny sizes: does everything run?
    python benchmarks/token_stats.py --table              # nothing but the page, from what is kept

Figures go to benchmarks/results/<device>.json, and as tables into docs/performance.md; those of
``--quick`` to outputs/, and into no page. Exits with 1, nothing timed, where a kernel of this
package is further from float64 than its tolerance.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from answers import Answer
from measuring import Clock, Pass, describe, interleaved, nbytes, peak_memory, rates, versions
from peers import PLAIN, Provider, providers, reason
from problems import KINDS, Problem, floors, make
from tables import headline, kept, page_of, tables

import mossrlhf

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
QUICK_RESULTS = ROOT / "outputs" / "token_stats"

SHAPES = {
    "cpu": {"rows": [(512, 32000)], "linear": [(512, 32000, 1024)]},
    "cuda": {
        "rows": [(16384, 32000), (8192, 151936)],
        "linear": [(16384, 32000, 4096), (8192, 151936, 4096)],
    },
    "quick": {"rows": [(24, 515)], "linear": [(24, 515, 32)]},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = {"cpu": 7, "cuda": 15, "quick": 2}

TOLERANCES = {
    (False, torch.float32): {"logprob": 1e-5, "gradient": 1e-6},
    # Logits that are sums of D products are rounded before anyone has seen them.
    (True, torch.float32): {"logprob": 1e-5, "gradient": 5e-6},
    # A gradient in bfloat16 is rounded once or, where it is scaled after, twice.
    (False, torch.bfloat16): {"logprob": 1e-5, "gradient": 4e-3},
    (True, torch.bfloat16): {"logprob": 1e-4, "gradient": 6e-3},
}
"""What is asked of this package, by whether it begins at hidden states, and by type."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, write; or write the page alone."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    if not args.table:
        if args.threads:
            torch.set_num_threads(args.threads)
        wrong = [line for problem in problems(args) for line in check(problem)]
        if wrong:
            print("\n".join(["Not right, so nothing is timed:", *wrong]))
            return 1
        for work in measure(args, words):
            figures = keep(work, describe(torch.device(args.device)), args.out)
        print(tables(figures))
    if args.out == RESULTS:
        PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8"), kept(RESULTS)), encoding="utf-8")
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--rounds", type=int, help="times each provider is timed")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the figures; the page stays as it is")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--without", nargs="+", default=[], metavar="PROVIDER")
    parser.add_argument("--table", action="store_true", help="write the page, measure nothing")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device that this torch can use")
    args.rounds = args.rounds or ROUNDS["quick" if args.quick else args.device]
    args.out = args.out or (QUICK_RESULTS if args.quick else RESULTS)
    return args


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Yield everything that is to be solved, one after the other."""
    shapes = SHAPES["quick" if args.quick else args.device]
    for kind in args.only:
        for shape in shapes["rows" if KINDS[kind].units is None else "linear"]:
            yield make(kind, shape, DTYPES[args.device], torch.device(args.device))


def check(problem: Problem) -> list[str]:
    """Hold this package to float64.

    Args:
        problem: to be solved by each of its providers.

    Returns:
        a line for everything that is further off than `TOLERANCES` allow; none where all is well.
    """
    answer, wrong = Answer(problem), []
    for provider in providers(problem):
        if provider.ours:
            errors = answer.errors(*provider.solve())
            for name, most in TOLERANCES[problem.linear, problem.dtype].items():
                if name in errors and not errors[name] <= most:  # nor is NaN
                    off = f"{name} off by {errors[name]:.2g}, at most {most:.2g}"
                    wrong.append(f"{provider.name}, {headline(summary(problem))}: {off}")
    return wrong


def measure(args: argparse.Namespace, words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure everyone on one problem after the other, and yield what is to be kept."""
    device = torch.device(args.device)
    clock = Clock(device)
    limits = rates(device, clock, args.quick)
    how = {
        "command": " ".join(["python benchmarks/token_stats.py", *without_folder(words)]),
        "quick": args.quick,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "versions": {"mossrlhf": mossrlhf.__version__, **versions()},
        "copy_gb_per_s": limits["copy"] / 1e6,
        "matmul_tflop_per_s": limits["matmul"] / 1e9,
    }
    for problem in problems(args):
        print(f"measuring: {headline(summary(problem))}", file=sys.stderr, flush=True)
        least = floors(problem, limits)
        rows = measured(problem, args, clock, least)
        yield {**summary(problem), "measured": how, "floors_ms": least, "providers": rows}


def measured(
    problem: Problem, args: argparse.Namespace, clock: Clock, least: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Let everyone solve a problem: errors first, then memory, then time, in turn.

    Args:
        problem: to be solved.
        args: of the command line.
        clock: of the device.
        least: milliseconds by step that nobody gets below.

    Returns:
        the figures of each provider, or why it is absent.
    """
    everyone = providers(problem, args.without)
    answer = Answer(problem)
    rows = {p.name: attempt(p, partial(of_errors, p, answer)) for p in everyone}
    del answer
    there = [p for p in everyone if "absent" not in rows[p.name]]
    for provider in there:
        rows[provider.name] |= attempt(provider, partial(of_memory, provider))
    there = [p for p in there if "absent" not in rows[p.name]]
    backward = bool(problem.upstream)
    passes = {p.name: Pass(p.run, p.differentiate if backward else None, p.ready) for p in there}
    times = interleaved(passes, args.rounds, clock)
    plain = times.get(PLAIN)
    for name, taken in times.items():
        whole = "both" if backward else "forward"
        rows[name] |= {f"{step}_ms": ms for step, ms in taken.items()}
        rows[name]["speed_over_plain"] = plain[whole] / taken[whole] if plain else None
        rows[name]["percent_of_floor"] = {s: 100 * ms / taken[s] for s, ms in least.items()}
    return list(rows.values())


def attempt(provider: Provider, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a provider's figures, or why there are none; what is ours may not fail."""
    row = {"provider": provider.name, "ours": provider.ours}
    if provider.absent:
        return {**row, "absent": provider.absent}
    try:
        return {**row, **function()}
    except Exception as error:  # whatever another library raises
        if provider.ours:
            raise
        why = reason(error)
    gc.collect()  # what the error held on to
    torch.cuda.empty_cache()
    return {**row, "absent": why}


def summary(problem: Problem) -> dict[str, Any]:
    """Return what a problem is, for the figures."""
    return {
        "kind": problem.kind,
        "title": KINDS[problem.kind].title,
        "shape": list(problem.shape),
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def without_folder(words: Sequence[str]) -> list[str]:
    """Leave ``--out`` out of a command: the folder is of this machine."""
    at = words.index("--out") if "--out" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def of_errors(provider: Provider, answer: Answer) -> dict[str, float]:
    """Return how far a provider is from float64."""
    return {f"{k}_error": v for k, v in answer.errors(*provider.solve()).items()}


def of_memory(provider: Provider) -> dict[str, float]:
    """Return a provider's peak memory in MB beyond its inputs, and beyond gradients returned."""
    provider.ready()
    device = provider.problem.ids.device
    (_, gradients), most = peak_memory(provider.both, device)
    inputs = {x.data_ptr() for x in provider.problem.wrt}
    returned = tuple(g for g in gradients if g.data_ptr() not in inputs)
    return {"peak_mb": most / 1e6, "beyond_gradients_mb": (most - nbytes(returned)) / 1e6}


def keep(work: dict[str, Any], device: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the figures of a problem, beside those of others that the file has already.

    Args:
        work: of `measure`.
        device: what it was measured on.
        folder: of one file for each device.

    Returns:
        all that the file has now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{device['slug']}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["works"] if file.exists() else []
    known = {headline(one): one for one in [*before, work]}
    kinds = list(KINDS)
    order = sorted(known.values(), key=lambda one: (kinds.index(one["kind"]), one["shape"][1]))
    figures = {"benchmark": "token_stats", "device": device, "works": order}
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    sys.exit(main())
