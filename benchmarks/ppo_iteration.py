"""Seconds and peak memory of a PPO iteration: rollout, scores, annotation, optimizer steps.

    python benchmarks/ppo_iteration.py                       # "wide": a vocabulary of 32,000
    python benchmarks/ppo_iteration.py --shape tiny
    python benchmarks/ppo_iteration.py --lengths log-normal --rollouts 64
    python benchmarks/ppo_iteration.py --processes 2 --threads 1
    python benchmarks/ppo_iteration.py --device cuda
    python benchmarks/ppo_iteration.py --compare --peer path/to/python   # into docs/performance.md

A Llama of random weights answers prompts that mean nothing, and hardly ever ends by itself. Policy,
critic, reference and reward model are four models; there are epochs × minibatches optimizer steps
an iteration. The last line printed is JSON: seconds of each iteration, their median, the median of
each stage, peak memory of the process, and what share of the time the arithmetic alone would take
at the rate of a large matrix product, measured in the same process.

``--compare`` runs this and two peers in turn, each in its own process: the same work by TRL 1.12
(`benchmarks/trl_iteration.py`), and by the smallest loop in plain torch
(`benchmarks/minimal_loop.py`). TRL needs its own environment, whose Python is ``--peer``:
``pip install torch==2.13.0 trl==1.12.0 datasets``.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from iteration_work import Stopwatch, llama, parse, prompts, tokenizer
from measuring import peak_resident, resident
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LogitsProcessor,
)

from mossrlhf import ModelReward, Trainer, presets
from mossrlhf.models import backbone

STAGES = ("collect", "score", "annotate", "estimate", "update")


def main(argv: Sequence[str] | None = None) -> int:
    """Run iterations, or the processes that do."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    if args.compare:
        import comparing

        return comparing.main(args)
    if args.processes > 1 and "RANK" not in os.environ:
        print(json.dumps(of_several(words, args.processes)))
        return 0
    found = measured(args)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
    return 0


def of_several(words: Sequence[str], processes: int) -> dict[str, Any]:
    """Run the same command on some processes that know of each other; what the first says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running, number = [], str(processes)
    for rank in map(str, range(processes)):
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=number, LOCAL_WORLD_SIZE=number)
        known = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        known["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, __file__, *words]
        running.append(subprocess.Popen(command, env=known, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("a process has failed; see above")
    return json.loads(said[0].splitlines()[-1])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Run iterations in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    start = resident()
    words = tokenizer(args.vocab)
    of_words = resident() - start  # of the benchmark, not of the trainer: it grows with the words
    del words
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder, watch)
        with without(args.without, trainer):
            history = trainer.train()
    peak = peak_resident()  # before the matrix product below, which may take more
    cuda = args.device == "cuda"
    # Without the first, which loads and compiles what the others use.
    seconds, history = median(watch.seconds[1:] or watch.seconds), history[1:] or history
    stages = {s: round(median(h[f"time/{s}_seconds"] for h in history), 6) for s in STAGES}
    tokens = median(h["response/length_tokens"] for h in history) * args.rollouts
    operations = arithmetic(args, tokens / args.rollouts)
    rate = product_rate(torch.device(args.device))
    return {
        "who": "mossrlhf",
        "iter_s": [round(x, 3) for x in watch.seconds],
        "median": round(seconds, 4),
        "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else 0,
        "peak_rss_mb": peak / 2**20,
        "start_rss_mb": start / 2**20,
        "tokenizer_mb": of_words / 2**20,
        "stages": stages,
        "response_tokens": tokens,
        "tera_operations": operations / 1e12,
        "tera_operations_per_second": rate / 1e12,
        "share_of_floor": round(operations / rate / seconds, 3),
    }


def make_trainer(args: argparse.Namespace, folder: str, watch: Stopwatch) -> Trainer:
    """Put four models of random weights together."""
    torch.manual_seed(0)
    policy_class = LlamaForCausalLM if args.lengths == "uniform" else Ending
    policy = policy_class(llama(args))
    reward = LlamaForSequenceClassification(llama(args, num_labels=1))
    rollouts = args.rollouts * args.processes
    ids = prompts(args, rollouts * args.iters).tolist()
    preset = presets.trl_ppo(
        output_dir=folder,
        rollout_size=rollouts,
        minibatch_size=rollouts // args.minibatches,
        num_ppo_epochs=args.epochs,
        total_steps=args.iters,
        disable_tqdm=True,
        bf16=args.device == "cuda",
        max_tokens=args.max_tokens,
        generation_config=GenerationConfig(max_new_tokens=args.response),
    )
    return Trainer(
        policy,
        reward=ModelReward(model=reward, batch_size=16),
        train_dataset=[{"prompt": " ".join(map(str, row))} for row in ids],
        processing_class=tokenizer(args.vocab),
        callbacks=[watch],
        **preset,
    )


@contextmanager
def without(option: str | None, trainer: Trainer) -> Iterator[None]:
    """Leave an option of speed out."""
    if option == "segments":
        object.__setattr__(trainer.sampler, "segment", None)
    known = backbone.can_pack
    if option == "packing":
        backbone.can_pack = lambda model: False
    try:
        yield
    finally:
        backbone.can_pack = known


class Ends(LogitsProcessor):
    """Has every answer end at the length that the last word of its prompt says."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave the end token alone, or none."""
        wanted, drawn = input_ids[:, self.prompt - 1] - 3, input_ids.shape[1] - self.prompt
        last, end = (wanted <= drawn + 1)[:, None], torch.arange(scores.shape[1]) == 2
        return scores.masked_fill(last ^ end.to(last.device), -torch.inf)


class Ending(LlamaForCausalLM):
    """A policy whose answers end where `Ends` says."""

    def generate(self, inputs: Tensor, logits_processor: Any = None, **kwargs: Any) -> Any:
        """Generate."""
        if "past_key_values" not in kwargs:
            self.prompt_length = inputs.shape[1]
        listed = [Ends(self.prompt_length), *(logits_processor or [])]
        return super().generate(inputs, logits_processor=listed, **kwargs)


def arithmetic(args: argparse.Namespace, response: float) -> float:
    """Count the floating-point operations of an iteration, of one process, that must be done.

    Multiplications and additions of matrix products and causal attention; every token is sampled
    once, read once by policy, reference, critic and reward model, and learned from in every epoch
    by policy and critic.

    Args:
        args: shape of the work.
        response: tokens of a response, in the mean.
    """
    d, both = args.hidden, args.prompt + response
    layers = args.layers * 2 * (4 * d**2 + 3 * d * (d * 8 // 3))
    attention = args.layers * 4 * d * (both / 2)
    backbone = both * (layers + attention)
    head = response * 2 * d * args.vocab
    # Sampled, and read by policy and reference; read by critic and reward model.
    forward = 3 * (backbone + head) + 2 * backbone
    learned = 3 * args.epochs * (2 * backbone + head)
    return args.rollouts * (forward + learned)


def product_rate(device: torch.device) -> float:
    """Return the floating-point operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = []
    for _ in range(5):
        with _timed(device, taken):
            torch.mm(a, b.t())
    return 2 * side**3 / median(taken[1:])


@contextmanager
def _timed(device: torch.device, taken: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken.append(time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
