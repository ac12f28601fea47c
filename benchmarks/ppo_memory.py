"""Memory of one PPO update at a large vocabulary, with the kernels and without, on the CPU.

    python benchmarks/ppo_memory.py                  # V = 151,936: gigabytes without the kernels
    python benchmarks/ppo_memory.py --vocab 20000    # a quick look
    python benchmarks/ppo_memory.py --untied         # input and output embeddings of their own

A small Llama, its critic and its reference take one optimizer step on a rollout that nobody drew.
Each path has a process of its own; its peak is the most the process ever had resident, less what
it had once models and rollout were there. Gradients and optimizer states are in it, on both paths.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from measuring import describe, forget_peak, pathless, peak_resident, resident, versions
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import mossrlhf
from mossrlhf import PPOMaxLoss, Rollout, ToyWorld, Trainer, TrainerConfig
from mossrlhf.models import full_logits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ppo_memory.json"
PATHS = ("kernels", "plain")
PROMPT = 16
"""Tokens of each prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both paths, or, as the process of one, that one."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parse(words)
    if args.path:
        print(json.dumps(update(args, args.path)))
        return 0
    figures = {
        "benchmark": "ppo_memory",
        "command": " ".join(["python benchmarks/ppo_memory.py", *shown(words)]),
        "device": describe(torch.device("cpu")),
        "versions": {"mossrlhf": mossrlhf.__version__, **versions()},
        "paths": {path: alone(words, path) for path in PATHS},
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--untied", action="store_true", help="an output head of its own")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of each response")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the figures")
    parser.add_argument("--path", choices=PATHS, help="measure one path, in this process")
    return parser.parse_args(words)


def shown(words: Sequence[str]) -> list[str]:
    """Leave ``--out`` out of a command: the file is of this machine."""
    at = words.index("--out") if "--out" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def alone(words: Sequence[str], path: str) -> dict[str, Any]:
    """Measure a path in a process of its own; where it fails, return why."""
    command = [sys.executable, __file__, *words, "--path", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return {"absent": f"killed by signal {-done.returncode}"}
    if done.returncode:
        return {"absent": pathless((done.stderr.strip().splitlines() or ["no reason given"])[-1])}
    return json.loads(done.stdout.splitlines()[-1])


def update(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Take one PPO update, and return what it took.

    Args:
        args: of the command line.
        path: one of `PATHS`.

    Returns:
        in MB: parameters of all models, gradients and optimizer states of the trained ones, what
        was resident before, and the peak above that; further the seconds, and the metrics of the
        losses and gradient norms, which are to be the same on both paths.

    Raises:
        RuntimeError: where the peak was reached before the update, so that it cannot be seen.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, folder)
        rollout, scores = recorded(args)
        models = (trainer.policy, trainer.critic, trainer.ref_model)
        parameters = sum(nbytes(model) for model in models)
        forgotten = forget_peak()
        before, highest = resident(), peak_resident()
        start = perf_counter()
        with full_logits() if path == "plain" else nullcontext():
            metrics = trainer.step(rollout, scores=scores)
        seconds = perf_counter() - start
        peak = peak_resident()
    if not forgotten and peak <= highest:
        raise RuntimeError("the peak was reached before the update; make the update larger")
    return {
        "path": path,
        "response_tokens": int(rollout.mask.sum()),
        "parameters_mb": parameters / 1e6,
        "gradients_and_optimizer_mb": 3 * sum(nbytes(m) for m in models[:2]) / 1e6,
        "resident_before_mb": before / 1e6,
        "peak_above_mb": (peak - before) / 1e6,
        "seconds": seconds,
        "metrics": {k: v for k, v in sorted(metrics.items()) if k.startswith(("policy", "critic"))},
    }


def make_trainer(args: argparse.Namespace, folder: str) -> Trainer:
    """Put policy, critic and reference together, as `Trainer` does by itself."""
    world = ToyWorld()
    tokenizer = world.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=2 * (PROMPT + args.length),
        tie_word_embeddings=not args.untied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings = TrainerConfig(
        output_dir=folder,
        rollout_size=args.responses,
        minibatch_size=args.responses,
        max_prompt_length=PROMPT,
        disable_tqdm=True,
    )
    return Trainer(
        LlamaForCausalLM(config),
        reward=world.reward,
        train_dataset=world.prompts(args.responses),
        processing_class=tokenizer,
        generation_config=GenerationConfig(max_new_tokens=args.length),
        loss=PPOMaxLoss(entropy_coef=0.01),
        args=settings,
    )


def recorded(args: argparse.Namespace) -> tuple[Rollout, torch.Tensor]:
    """Return responses that nobody drew, all of the same length, and a score for each."""
    torch.manual_seed(1)
    rows, length = args.responses, args.length
    records = ToyWorld().prompts(rows)
    rollout = Rollout(
        input_ids=torch.randint(6, args.vocab, (rows, PROMPT + length)),
        prompt_lengths=torch.full((rows,), PROMPT),
        response_lengths=torch.full((rows,), length),
        truncated=torch.ones(rows, dtype=torch.bool),
        mask=torch.ones(rows, length, dtype=torch.bool),
        columns={key: [record[key] for record in records] for key in ("prompt", "topic")},
    )
    return rollout, torch.randn(rows)


def nbytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters, shared ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
