"""Kill test: runs end by SIGKILL while sampling, updating or saving, and go on as if they had not.

    python tools/kill_runs.py                           # 25 on one process, 25 on two: minutes
    python tools/kill_runs.py --runs 3 --processes 2
    python tools/kill_runs.py --runs 3 --processes 1 --adapters   # policy and critic on one base

A tiny PPO-max run with everything that has a state (critic warm-up, PTX term, running moments,
evaluations, a best checkpoint, a reward that draws from Python's and NumPy's generators) is run
once undisturbed. Then it is run anew, killed at a random instant, and started again with
``train(resume_from_checkpoint=last_checkpoint(...))``: every metric, every completion and the last
weights must be the same to the bit. Figures go to benchmarks/results/kill_runs.json.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import (
    AdvantageEstimator,
    PPOMaxLoss,
    RewardShaper,
    RunningMoments,
    ToyWorld,
    Trainer,
    TrainerConfig,
    last_checkpoint,
)
from mossrlhf.version import versions

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "kill_runs.json"
PHASES = {"sampling": b"s", "updating": b"u", "saving": b"w"}
PATIENCE = 300.0
"""Seconds after which a run that says nothing is taken to hang."""


class Announcing(Trainer):
    """Says by a byte into a pipe what it begins to do."""

    pipe: int | None = None

    def _say(self, phase: str) -> None:
        if self.pipe is not None:
            os.write(self.pipe, PHASES[phase])

    def collect(self, prompts: Any = None) -> Any:
        """Draw responses."""
        self._say("sampling")
        return super().collect(prompts)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Take the optimizer steps."""
        self._say("updating")
        return super().update(*args, **kwargs)

    def save_model(self, output_dir: Any = None) -> None:
        """Write the models, with which a checkpoint begins."""
        self._say("saving")
        super().save_model(output_dir)


def noisy(*, completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that draws from the generators of Python and NumPy."""
    return [len(c) / 20 + random.random() + float(np.random.rand()) for c in completions]


def build(folder: Path, total_steps: int = 5, adapters: bool = False) -> Announcing:
    """A run of a few seconds in which everything that has a state is switched on."""
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    roles = {"peft_config": LoraConfig(**lora), "critic": LoraConfig(**lora)} if adapters else {}
    world = ToyWorld()
    torch.manual_seed(0)
    policy = LlamaForCausalLM(world.model_config(hidden_size=16, num_layers=1))
    return Announcing(
        policy,
        reward=noisy,
        train_dataset=world.prompts(24),
        eval_dataset=world.prompts(8, split="eval"),
        ptx_dataset=world.sft_examples(16),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(max_new_tokens=8),
        shaper=RewardShaper(normalize=True, moments=RunningMoments()),
        advantage=AdvantageEstimator(whiten=True),
        loss=PPOMaxLoss(ptx_coef=0.1),
        args=TrainerConfig(
            output_dir=str(folder),
            total_steps=total_steps,
            critic_pretrain_steps=2,
            rollout_size=8,
            minibatch_size=4,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            eval_steps=2,
            save_steps=1,
            save_total_limit=2,
            metric_for_best_model="reward/score_mean",
            disable_tqdm=True,
        ),
        **roles,
    )


def work(folder: Path, pipe: int | None, adapters: bool) -> None:
    """Start the run in a folder, or go on with it, and leave its end beside it."""
    torch.set_num_threads(1)
    trainer = build(folder / "run", adapters=adapters)
    trainer.pipe = pipe if trainer.accelerator.is_main_process else None
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "run"))
    if trainer.accelerator.is_main_process:
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        save_file(weights, folder / "weights.safetensors")
        history = [
            {name: v for name, v in entry.items() if not name.startswith("time/")}
            for entry in trainer.history
        ]
        (folder / "history.json").write_text(json.dumps(history))
    trainer.accelerator.wait_for_everyone()


def launch(folder: Path, processes: int, adapters: bool) -> tuple[list[int], int]:
    """Fork the processes of a run; return their ids and the pipe's end that hears the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    heard, said = os.pipe()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            if processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in places.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ["ACCELERATE_USE_CPU"] = "true"
            work(folder, said, adapters)
            sys.stdout.flush()
            os._exit(0)  # gloo's threads now and then abort an interpreter that takes its time
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    os.close(said)
    return children, heard


def finish(children: Sequence[int], heard: int) -> list[tuple[float, bytes]]:
    """Hear a run out; return when it began what."""
    said = []
    while byte := os.read(heard, 1):
        said.append((time.perf_counter(), byte))
    os.close(heard)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"the processes of a run ended with {codes}")
    return said


def kill(children: Sequence[int], heard: int, phase: str, count: int, wait: float) -> int:
    """Kill a run some time after it has begun a phase for the nth time; return how many it began.

    Args:
        children: its processes.
        heard: the pipe.
        phase: while what.
        count: for which time.
        wait: seconds after it began.
    """
    begun = 0
    while begun < count and (byte := os.read(heard, 1)):
        begun += byte == PHASES[phase]
    time.sleep(wait)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    os.close(heard)
    return begun


def differences(folder: Path, expected: Path) -> list[str]:
    """Name what of a run is not, to the bit, as in another one."""
    found = []
    for name in ("history.json", "run/completions.jsonl"):
        if (folder / name).read_text() != (expected / name).read_text():
            found.append(name)
    ours, theirs = (load_file(f / "weights.safetensors") for f in (folder, expected))
    for name, weight in theirs.items():
        if not torch.equal(ours[name], weight):
            found.append(name)
    return found


def study(
    runs: int, processes: int, seed: int, folder: Path, adapters: bool = False
) -> dict[str, Any]:
    """Kill a number of runs, and compare each with one that was left alone."""
    whole = folder / "whole"
    said = finish(*launch(whole, processes, adapters))
    ends = [moment for moment, _ in said[1:]] + [said[-1][0]]
    lasting: dict[bytes, list[float]] = {}
    for (moment, byte), end in zip(said, ends, strict=True):
        lasting.setdefault(byte, []).append(end - moment)
    chance = random.Random(seed)
    result: dict[str, Any] = {"runs": runs, "equal": 0, "killed_while": dict.fromkeys(PHASES, 0)}
    result |= {"resumed_from_nothing": 0, "different": []}
    for index in range(runs):
        phase = list(PHASES)[index % len(PHASES)]
        durations = lasting[PHASES[phase]]
        mine = folder / f"run-{index}"
        wait = chance.uniform(0, sum(durations) / len(durations))
        kill(*launch(mine, processes, adapters), phase, chance.randint(1, len(durations)), wait)
        killed = last_checkpoint(mine / "run")
        finish(*launch(mine, processes, adapters))
        result["killed_while"][phase] += 1
        result["resumed_from_nothing"] += killed is None
        odd = differences(mine, whole)
        result["equal"] += not odd
        if odd:
            result["different"].append({"run": index, "phase": phase, "what": odd[:5]})
        after = "the start" if killed is None else killed.name
        print(f"{processes} x run {index}: {phase}, from {after}: {odd[:3] or 'equal'}", flush=True)
    return result


def main(words: Sequence[str] | None = None) -> int:
    """Kill runs as the command line says; 1 where one of them came out differently."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--adapters", action="store_true", help="policy and critic on one base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=str(FIGURES))
    args = parser.parse_args(words)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"no end after {PATIENCE * args.runs:.0f} s"))
    results = {}
    if args.json == str(FIGURES) and FIGURES.is_file():
        results = json.loads(FIGURES.read_text())  # what is not run now is kept
    for processes in args.processes:
        signal.alarm(int(PATIENCE * (args.runs + 1)))
        with tempfile.TemporaryDirectory(prefix="kill-runs-") as folder:
            name = f"{processes} with adapters" if args.adapters else str(processes)
            found = study(args.runs, processes, args.seed, Path(folder), args.adapters)
        command = f"--runs {args.runs} --processes {processes} --seed {args.seed}"
        results[name] = {
            "command": f"python tools/kill_runs.py {command}{' --adapters' * args.adapters}",
            "versions": versions(),
            **found,
        }
    signal.alarm(0)
    Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["different"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
