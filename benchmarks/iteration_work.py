"""The work of a PPO iteration, the same for all peers: shapes, models, prompts, a stopwatch."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

SHAPES: dict[str, dict[str, int]] = {
    "wide": dict(vocab=32000, hidden=256, layers=4, prompt=64, response=128, rollouts=16),
    "tiny": dict(vocab=512, hidden=128, layers=2, prompt=24, response=32, rollouts=64),
}
MINIBATCHES = dict(minibatches=2, epochs=2, iters=3)
OPTIONS = ("packing", "segments")
"""What may be left out: sequences read end to end, letting go of finished responses."""

MEDIAN_LENGTH, SPREAD = 32, 1.0
"""Of log-normal response lengths: the median, in tokens, and the standard deviation of the log."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what it leaves open is of the shape."""
    parser = argparse.ArgumentParser(description="Seconds and peak memory of a PPO iteration.")
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    for name in (*SHAPES["wide"], *MINIBATCHES):
        parser.add_argument(f"--{name}", type=int, default=MINIBATCHES.get(name))
    parser.add_argument("--lengths", choices=("uniform", "log-normal"), default="uniform")
    parser.add_argument("--max-tokens", type=int, help="padded tokens at a time")
    parser.add_argument("--without", choices=OPTIONS, help="leave an option of speed out")
    parser.add_argument("--threads", type=int, help="of torch, in each process")
    parser.add_argument("--processes", type=int, default=1, help="each with a rollout of its own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compare", action="store_true", help="with two peers, in turn")
    parser.add_argument("--peer", help="the Python of TRL's environment")
    parser.add_argument("--rounds", type=int, default=5, help="of a comparison")
    args = parser.parse_args(words)
    for name, value in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def llama(args: argparse.Namespace, **more: Any) -> LlamaConfig:
    """Configure one of the models."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max(1024, args.prompt + args.response),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def prompts(args: argparse.Namespace, count: int) -> Tensor:
    """Draw the token ids of prompts; the last of each may be the length that its answer has."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, args.vocab, (count, args.prompt), generator=generator)
    if args.lengths == "log-normal":
        drawn = torch.randn(count, generator=generator).mul(SPREAD).exp() * MEDIAN_LENGTH
        ids[:, -1] = 3 + drawn.round().clamp(1, args.response).long()
    return ids


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return one whose words are numbers."""
    special = ["<pad>", "<s>", "</s>"]  # no word may begin with one of them
    known = [*special, *map(str, range(len(special), vocab))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos = special
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos
    )


class Stopwatch(TrainerCallback):
    """Seconds from the end of one iteration to that of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note how long it took."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
