"""Sampling a token by sums of probabilities, beside sampling as `generate` does.

    python benchmarks/choices.py    # seconds; on a CPU, one thread

Figures go to benchmarks/results/choices.json; docs/performance.md says what they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import Clock, Pass, describe, interleaved, versions
from torch import Tensor
from transformers import GenerationConfig

import mossrlhf
from mossrlhf.sampling.hf import SamplingProcessor

FIGURES = Path(__file__).resolve().parent / "results" / "choices.json"
ROWS, WORDS = 16, 32000
ROUNDS = 21


def drawn(rows: int, words: int) -> dict[str, Pass]:
    """Return passes that sample a token for each row: `generate`'s way, and `HFSampler`'s.

    The second also records the token's log-probability.
    """
    scores, ids = 3 * torch.randn(rows, words), torch.zeros(rows, 1, dtype=torch.long)
    uniform = torch.rand(rows, 1)

    def by_noise() -> Tensor:
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1)

    def by_sums() -> Tensor:
        return SamplingProcessor(GenerationConfig(), uniform)(ids, scores.clone()).argmax(-1)

    return {"by noise": Pass(forward=by_noise), "by sums": Pass(forward=by_sums)}


def timed(passes: Mapping[str, Pass], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, in turn, once warm."""
    for one in passes.values():
        one.forward()
    found = interleaved(passes, rounds, Clock(torch.device("cpu")))
    return {name: figures["forward"] for name, figures in found.items()}


def measure(rows: int = ROWS, words: int = WORDS, rounds: int = ROUNDS) -> Any:
    """Return all figures."""
    torch.manual_seed(0)
    return {
        "benchmark": "choices",
        "command": "python benchmarks/choices.py",
        "device": describe(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "versions": {"mossrlhf": mossrlhf.__version__, **versions()},
        "drawing": {"rows": rows, "words": words, "ms": timed(drawn(rows, words), rounds)},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    FIGURES.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(FIGURES.read_text(encoding="utf-8"))
