"""Seconds and peak memory of a PPO iteration: rollout, scores, annotation, optimizer steps.

    python benchmarks/ppo_iteration.py                          # "wide": a vocabulary of 32,000
    python benchmarks/ppo_iteration.py --vocab 512 --hidden 128 --layers 2 --prompt 24 \
        --response 32 --rollouts 64                             # "tiny"

A Llama of random weights answers prompts that mean nothing, and hardly ever ends by itself. Policy,
critic, reference and reward model are four models; there are epochs × minibatches optimizer steps.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from mossrlhf import Trainer, presets
from mossrlhf.models import RewardModel

SHAPE = dict(vocab=32000, hidden=256, layers=4, prompt=64, response=128, rollouts=16)
STAGES = ("collect", "score", "annotate", "estimate", "update")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {**SHAPE, "minibatches": 2, "epochs": 2, "iters": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


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
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def make_trainer(args: argparse.Namespace, folder: str, watch: Stopwatch) -> Trainer:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    policy = LlamaForCausalLM(LlamaConfig(**shape))
    reward = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=1))
    ids = torch.randint(3, args.vocab, (args.rollouts * args.iters, args.prompt))
    prompts = [{"prompt": " ".join(map(str, row))} for row in ids.tolist()]
    preset = presets.trl_ppo(
        output_dir=folder,
        rollout_size=args.rollouts,
        minibatch_size=args.rollouts // args.minibatches,
        num_ppo_epochs=args.epochs,
        total_steps=args.iters,
        disable_tqdm=True,
        generation_config=GenerationConfig(max_new_tokens=args.response),
    )
    return Trainer(
        policy,
        reward=reward,
        train_dataset=prompts,
        processing_class=tokenizer(args.vocab),
        callbacks=[watch],
        **preset,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder, watch)
        history = trainer.train()
    stages = {s: round(median(h[f"time/{s}_seconds"] for h in history), 3) for s in STAGES}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(who="mossrlhf", iter_s=[round(x, 3) for x in watch.seconds], median=round(median(watch.seconds), 3), stages=stages, peak_rss_mb=peak)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
