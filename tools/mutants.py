"""Mutation check: a fault is put into the numerical code, and the nearest tests must see it.

    python tools/mutants.py                       # everything, on two cores: tens of minutes
    python tools/mutants.py functional.py         # one file, or several
    python tools/mutants.py --list loss.py        # what would be tried
    python tools/mutants.py loss.py:123           # one line

Signs, comparisons, clips, indices, masks, means and sums, detaches: one change at a time
(``faults.py`` has the rules), never on disk. A mutant that no test sees is printed; one that
changes no number is argued for in ``equivalent_mutants.json``. The figures of each file go to
benchmarks/results/mutants.json.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults import ROOT, SOURCE, Mutant, mutants, mutated

ARGUED = ROOT / "tools" / "equivalent_mutants.json"
FIGURES = ROOT / "benchmarks" / "results" / "mutants.json"

FOUNDATIONS = (
    "accelerate", "beartype", "datasets", "hypothesis", "jaxtyping", "peft", "torch._dynamo",
    "transformers.models.llama.modeling_llama", "transformers.trainer",
)  # fmt: skip
"""What sources and tests import of other libraries: seconds of every child otherwise."""

COPIES = tempfile.TemporaryDirectory(prefix="mutants-")

TRAINER = (
    "trainer/test_trl_oracle.py",
    "trainer/test_invariance.py",
    "trainer/test_switches.py",
    "trainer/test_training.py",
)
HEADS = ("kernels/test_chunked_head.py", "kernels/test_chunked_head_sizes.py")
ROWS = (
    "kernels/test_row_stats_gradient.py",
    "kernels/test_row_stats.py",
    "kernels/test_row_stats_limits.py",
    "kernels/test_known_failures.py",
)
NEAREST: dict[str, tuple[str, ...]] = {
    "functional.py": (
        "functional/test_reduce.py",
        "functional/test_logprobs.py",
        "functional/test_advantages.py",
        "functional/test_losses.py",
        "test_advantage.py",
        "test_loss.py",
        "models/test_token_logprobs.py",
    ),
    "kernels/chunked_head.py": HEADS,
    "kernels/row_stats.py": (
        "kernels/test_row_stats_backend.py",
        "kernels/test_row_stats_blocks.py",
        *ROWS,
    ),
    "kernels/triton_rows.py": ROWS,
    "advantage.py": ("test_advantage.py",),
    "critic_evaluation.py": ("test_critic_evaluation.py",),
    "loss.py": ("test_loss.py", *TRAINER),
    "minibatches.py": ("test_minibatches.py", *TRAINER),
    "models/actor_critic.py": ("models/test_actor_critic.py", *TRAINER),
    "models/backbone.py": ("models/test_backbone.py",),
    "models/reward_model.py": ("models/test_reward_model.py", "loading/test_critic.py"),
    "models/token_logprobs.py": (
        "models/test_token_logprobs.py",
        "models/test_actor_critic.py",
        *TRAINER,
    ),
    "optimization.py": ("test_optimization.py", *TRAINER, "distributed/test_two_processes.py"),
    "reward_shaping.py": ("test_reward_shaping.py",),
    "rewards/model_reward.py": ("rewards/test_model_reward.py", "rewards/test_reward_set.py"),
    "rewards/reward_set.py": ("rewards/test_reward_set.py", "rewards/test_model_reward.py"),
    "sampling/base.py": ("sampling/test_base.py", "sampling/test_hf.py"),
    "sampling/continuous.py": ("sampling/test_continuous.py",),
    "sampling/hf.py": ("sampling/test_hf.py", "sampling/test_hf_tokens.py"),
    "sampling/vllm.py": ("sampling/test_vllm.py",),
    "trainer.py": ("trainer/test_stages.py", *TRAINER, "distributed/test_two_processes.py"),
    "types.py": ("test_types.py", "test_minibatches.py", *TRAINER),
}
"""Files to mutate, below src/mossrlhf, and the tests that must see it, below tests, in turn."""


def start(file: str, source: str, tests: Sequence[str], seconds: float) -> int:
    """Run tests in a child process, on a copy of the sources with another text for one file.

    Processes that a test starts see the copy too. Returns the child's id.
    """
    child = os.fork()
    if child:
        return child
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.setpgid(0, 0)  # the alarm ends what tests have started as well
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.alarm(int(seconds) + 1)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    status = 2
    try:
        with tempfile.TemporaryDirectory(dir=COPIES.name) as copy:
            package = Path(copy) / SOURCE.name
            shutil.copytree(SOURCE, package)
            place = package / file
            place.write_text(source, encoding="utf-8")
            for compiled in place.parent.glob(f"__pycache__/{place.stem}.*"):
                compiled.unlink()
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
            options += ["-o", f"pythonpath={copy} {ROOT / 'tests' / 'support'}"]
            # Imported before the fork, for all children at once.
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)]))
    finally:
        os._exit(status)


def import_foundations() -> None:
    """Import once, for every child, what the sources stand on; never the sources."""
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py has it, and before triton as well
    for module in FOUNDATIONS:
        importlib.import_module(module)


def baseline(file: str) -> float:
    """Return how long the tests of a file take on the sources as they are; they must pass."""
    begun = time.monotonic()
    plain = (SOURCE / file).read_text(encoding="utf-8")
    _, status = os.waitpid(start(file, plain, NEAREST[file], 3600), 0)
    if status:
        sys.exit(f"{file}: its tests fail as it stands: {' '.join(NEAREST[file])}")
    return time.monotonic() - begun


def survivors(found: Sequence[Mutant], jobs: int) -> Iterator[Mutant]:
    """Yield the mutants that no test sees, as they are found."""
    limits = {file: 20 + 4 * baseline(file) for file in dict.fromkeys(m.file for m in found)}
    waiting, running, done = list(reversed(found)), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            tests, limit = NEAREST[mutant.file], limits[mutant.file]
            running[start(mutant.file, mutated(mutant), tests, limit)] = mutant
        child, status = os.wait()
        mutant, done = running.pop(child), done + 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(found)}", end="", file=sys.stderr, flush=True)
        if status == 0:
            yield mutant


def load_argued() -> dict[tuple[str, str, str, str, int], str]:
    """Return why some mutants are equivalent."""
    if not ARGUED.exists():
        return {}
    entries = json.loads(ARGUED.read_text(encoding="utf-8"))
    return {
        (e["file"], e["function"], e["before"], e["after"], e.get("nth", 1)): e["why"]
        for e in entries
    }


def figures_of(
    file: str, found: list[Mutant], alive: list[Mutant], argued: Container[Any]
) -> dict[str, Any]:
    """Return what is kept of one file, with a digest of the mutants that it is true of."""
    mine = [mutant for mutant in alive if mutant.file == file]
    equal = [mutant for mutant in mine if mutant.key in argued]
    return {
        "blake2": hashlib.blake2b(repr([m.key for m in found]).encode(), digest_size=8).hexdigest(),
        "mutants": len(found),
        "equivalent": len(equal),
        "killed": len(found) - len(mine),
        "survived": [str(mutant) for mutant in mine if mutant not in equal],
    }


def main(argv: list[str] | None = None) -> int:
    """Try the mutants of some files or of all, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="below src/mossrlhf, with :LINE if wanted")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="say what would be tried")
    args = parser.parse_args(argv)
    wanted = [name.partition(":") for name in args.files] or [(file, "", "") for file in NEAREST]
    found = [
        mutant
        for file, _, line in wanted
        for mutant in mutants(file)
        if not line or mutant.line == int(line)
    ]
    if args.list:
        print("\n".join(map(str, found)), f"\n{len(found)} mutants")
        return 0
    import_foundations()
    argued, alive = load_argued(), []
    for mutant in survivors(found, args.jobs):
        alive.append(mutant)
        if mutant.key not in argued:
            print(f"\rSURVIVED  {mutant}", flush=True)
    figures = {
        file: figures_of(file, [m for m in found if m.file == file], alive, argued)
        for file in dict.fromkeys(mutant.file for mutant in found)
    }
    if not any(line for _, _, line in wanted):
        kept = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
        merged = {**kept, **figures}
        ordered = {file: merged[file] for file in NEAREST if file in merged}
        FIGURES.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    tried, equal = (sum(f[name] for f in figures.values()) for name in ("mutants", "equivalent"))
    killed = sum(f["killed"] for f in figures.values())
    print(
        f"{tried} mutants, {equal} of them argued equivalent; "
        f"{killed} of {tried - equal} killed, {killed / (tried - equal):.1%}"
    )
    return int(killed < tried - equal)


if __name__ == "__main__":
    sys.exit(main())
