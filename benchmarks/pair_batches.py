"""Batches by token count against batches of as many pairs: padding and speed, on real lengths.

One epoch of the same pairs through the same reward model, forward and backward, in turn::

    python benchmarks/pair_batches.py harmless-base.jsonl
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from mossrlhf import RankingLoss, RewardModel
from mossrlhf.data import PairCollator, TokenBatches, TokenBatchSampler, load_pairs
from mossrlhf.reward_modeling.pairs import PairModel, PairRewards, PairwiseCollator
from mossrlhf.reward_modeling.trainer import GROUPS
from mossrlhf.version import versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from support.corpus import make_corpus

FIGURES = Path(__file__).resolve().parent / "results" / "pair_batches.json"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="preference pairs")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=400, help="of an epoch")
    parser.add_argument("--fixed", type=int, default=8, help="pairs of a batch of fixed size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=str(FIGURES))
    args = parser.parse_args(argv)
    corpus = make_corpus(load_pairs(args.file, skip_bad=True), 300, 2048, 64, "en")
    records = corpus.train[: args.pairs]
    rows = PairwiseCollator(PairCollator(corpus.tokenizer, max_length=args.max_length))
    torch.manual_seed(0)
    order = torch.randperm(len(records)).tolist()
    arms = {
        "fixed": ([order[i : i + args.fixed] for i in range(0, len(order), args.fixed)], 1),
        "by tokens": (token_batches(rows, records, args.max_tokens), 1),
        "by tokens, in groups": (token_batches(rows, records, args.max_tokens), GROUPS),
    }
    found = {name: measured_padding(rows, records, *arm) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):  # in turn, so that a noisy neighbor disturbs all alike
        for name, (batches, groups) in arms.items():
            seconds[name].append(timed(epoch, rows, records, batches, groups))
    base = median(seconds["fixed"])
    for name, figures in found.items():
        figures["speed"] = round(base / median(seconds[name]), 2)
        figures["seconds"] = [round(s, 2) for s in seconds[name]]
        print(f"{name:24} padding {figures['padding']:.1%}  {figures['speed']:.2f} x")
    settings = vars(args) | {"file": Path(args.file).name}
    command = f"python benchmarks/pair_batches.py {settings['file']}"
    kept = {"command": command, "settings": settings, "arms": found}
    del kept["settings"]["json"]
    kept["versions"] = versions() | {"threads": torch.get_num_threads()}
    Path(args.json).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def token_batches(rows: PairwiseCollator, records: Sequence[Any], budget: int) -> list[list[int]]:
    """Cut pairs by token count."""
    return list(TokenBatchSampler(rows.lengths(records), TokenBatches(max_tokens=budget)))


def measured_padding(
    rows: PairwiseCollator, records: Sequence[Any], batches: Iterable[list[int]], groups: int
) -> dict[str, Any]:
    """Return the share of tokens that are padding, and how many batches there are."""
    real = total = count = 0
    for batch in batches:
        lengths = rows([records[i] for i in batch])["attention_mask"].sum(-1).flatten()
        for part in lengths.sort().values.tensor_split(groups):
            total += part.numel() * int(part.max()) if len(part) else 0
        real, count = real + int(lengths.sum()), count + 1
    return {"padding": 1 - real / total, "batches": count}


def epoch(
    rows: PairwiseCollator, records: Sequence[Any], batches: Iterable[list[int]], groups: int
) -> Tensor:
    """Forward and backward of every pair."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    model = PairModel(RewardModel(transformers.LlamaModel(config)), groups=groups)
    for batch in batches:
        given = rows([records[i] for i in batch])
        rewards, nll = model(given["input_ids"], given["attention_mask"])
        zero = torch.zeros_like(nll)
        pairs = PairRewards(*rewards.unbind(1), given["margin"], nll, zero, given["smoothing"])
        RankingLoss()(pairs).loss.backward()
    return model.reward_model.score.weight


def timed(work: Any, *given: Any) -> float:
    """Return the seconds that some work takes."""
    begun = time.perf_counter()
    work(*given)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
