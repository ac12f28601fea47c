"""What `mossrlhf.plan` says of a run's memory, against what one iteration of it takes.

    python benchmarks/memory_plan.py                       # all settings, a process each
    python benchmarks/memory_plan.py --only full-micro-1   # one anew, the others kept
    python benchmarks/memory_plan.py --page                # plan anew, measure nothing

Llamas of random weights answer prompts that mean nothing. Each setting has a process of its own,
where a small run goes before, so that libraries have loaded what they load. Measured on the CPU is
what the process has resident, phase by phase, above what it had before any model was there; memory
that is let go goes back at once (MALLOC_MMAP_THRESHOLD_). On CUDA it is the allocator's own figure.
Weights, gradients and optimizer states are the bytes of all tensors there are as the policy's
optimizer is about to step.
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import describe, forget_peak, pathless, peak_resident, resident, versions
from peft import LoraConfig
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import mossrlhf
from mossrlhf import RewardModel, ToyWorld, Trainer, TrainerConfig
from mossrlhf.models import add_adapters, save_adapters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory_plan.json"
PAGE = ROOT / "docs" / "memory.md"
MARKS = "<!-- memory_plan -->", "<!-- /memory_plan -->"

SMALL = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=8)
LARGE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
UNTIED = dict(tie_word_embeddings=False)

SETTINGS: dict[str, dict[str, Any]] = {
    "full": dict(model=SMALL, args=dict(minibatch_size=4)),
    "full-micro-1": dict(model=SMALL, args=dict(minibatch_size=4, micro_batch_size=1)),
    "full-checkpointing": dict(
        model=SMALL,
        args=dict(minibatch_size=8, micro_batch_size=4, gradient_checkpointing=True),
        prompt=128,
        response=192,
    ),
    "full-untied-max-tokens": dict(
        model=dict(**SMALL, **UNTIED), args=dict(minibatch_size=8, max_tokens=512)
    ),
    "full-reward-model": dict(model=SMALL, args=dict(minibatch_size=4), reward="model"),
    "lora-one-base": dict(model=dict(**LARGE, **UNTIED), args=dict(minibatch_size=4), rank=8),
    "lora-one-base-micro-1": dict(
        model=dict(**LARGE, **UNTIED), args=dict(minibatch_size=4, micro_batch_size=1), rank=8
    ),
    "lora-one-base-checkpointing": dict(
        model=dict(**LARGE, **UNTIED),
        args=dict(minibatch_size=8, gradient_checkpointing=True),
        rank=8,
        prompt=128,
        response=128,
    ),
}
"""Models, `TrainerConfig`, tokens of prompt and response, and the rank of every role's adapter."""

COMMON: dict[str, Any] = dict(rollout_size=8, disable_tqdm=True, critic_learning_rate=1e-6)
PHASES = ("sampling", "scoring", "update")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the settings, or, as the process of one, that one."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.setting:
        print(json.dumps(measured(SETTINGS[args.setting])))
        return 0
    known = json.loads(args.out.read_text("utf-8"))["settings"] if args.out.exists() else {}
    for name in args.only or SETTINGS:
        taken = known[name] if args.page else alone(name)
        known[name] = taken if "absent" in taken else beside(taken, plan_of(SETTINGS[name]))
        print(name, json.dumps(known[name]), flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        figures = {
            "benchmark": "memory_plan",
            "command": "python benchmarks/memory_plan.py",
            "device": describe(device),
            "versions": {"mossrlhf": mossrlhf.__version__, **versions()},
            "settings": {key: known[key] for key in SETTINGS if key in known},
        }
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if args.out == RESULTS:
        PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")
    return 0


def beside(taken: dict[str, Any], planned: mossrlhf.MemoryPlan) -> dict[str, Any]:
    """Put what is planned beside what was measured."""
    sizes = {"steady": planned.steady + planned.rollout, **planned.phases}
    both = {key: {"planned": sizes[key], "measured": taken[key]["measured"]} for key in sizes}
    return {**{key: taken[key] for key in ("base_parameters", "base_bytes")}, **both}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="settings to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for the figures")
    parser.add_argument("--page", action="store_true", help="plan anew, measure nothing")
    parser.add_argument("--setting", choices=SETTINGS, help="measure one, in this process")
    return parser.parse_args(words)


def alone(name: str) -> dict[str, Any]:
    """Measure a setting in a process of its own; where it fails, return why."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--setting", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"absent": pathless((done.stderr.strip().splitlines() or ["no reason given"])[-1])}
    return json.loads(done.stdout.splitlines()[-1])


def measured(setting: dict[str, Any]) -> dict[str, Any]:
    """Take one iteration of a setting.

    Args:
        setting: one of `SETTINGS`.

    Returns:
        what was "measured", in bytes: the peak of each phase, the bytes of weights, gradients and
        optimizer states; and the parameters of the base.
    """
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    with tempfile.TemporaryDirectory() as folder:
        warm = {**setting, "model": tiny, "prompt": 16, "response": 4}
        iteration(make_trainer(warm, Path(folder) / "tiny"))
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        known, before = set(storages()), held_now()
        trainer = make_trainer(setting, Path(folder))
        base = trainer.policy.get_base_model() if setting.get("rank") else trainer.policy
        first_step(trainer)
        peaks, steady = iteration(trainer, known)
    own = [p for n, p in base.named_parameters() if "lora_" not in n]
    return {
        "base_parameters": sum(p.numel() for p in own),
        "base_bytes": sum(p.numel() * p.element_size() for p in own),
        "steady": {"measured": steady},
        **{name: {"measured": peaks[name] - before} for name in PHASES},
    }


def plan_of(setting: dict[str, Any]) -> mossrlhf.MemoryPlan:
    """Plan a setting, from its configuration alone."""
    adapters = {}
    if setting.get("rank"):
        adapters = {name: adapter(setting) for name in ("peft_config", "critic", "reward")}
    elif setting.get("reward"):
        adapters = {"reward": config_of(setting)}
    return mossrlhf.plan(
        config_of(setting),
        args=TrainerConfig(**COMMON, **setting["args"]),
        prompt_tokens=setting.get("prompt", 64),
        max_new_tokens=setting.get("response", 64),
        device="cuda" if torch.cuda.is_available() else "cpu",
        **adapters,
    )


def config_of(setting: dict[str, Any]) -> LlamaConfig:
    """Return the policy's configuration."""
    tokenizer = ToyWorld().tokenizer()
    settings = dict(vocab_size=32000, num_attention_heads=8, max_position_embeddings=2048)
    return LlamaConfig(
        **{**settings, "tie_word_embeddings": True, **setting["model"]},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def adapter(setting: dict[str, Any]) -> LoraConfig:
    """Return the adapter of each role."""
    return LoraConfig(r=setting["rank"], target_modules="all-linear", lora_dropout=0.0)


def make_trainer(setting: dict[str, Any], folder: Path) -> Trainer:
    """Put a trainer together, as a user would."""
    world, parts = ToyWorld(), {}
    policy = LlamaForCausalLM(config_of(setting)).eval()
    if setting.get("rank"):
        reward = RewardModel.from_language_model(policy)
        add_adapters(reward, adapter(setting))
        save_adapters(reward, folder / "reward")
        del reward
        parts = {"peft_config": adapter(setting), "critic": adapter(setting)}
    rewards = {"model": lambda: RewardModel(copy.deepcopy(policy.base_model))}
    made = rewards.get(setting.get("reward", ""), lambda: of_length)
    return Trainer(
        policy,
        reward=str(folder / "reward") if setting.get("rank") else made(),
        train_dataset=prompts(world, setting),
        processing_class=world.tokenizer(),
        generation_config=GenerationConfig(
            max_new_tokens=setting.get("response", 64), min_new_tokens=setting.get("response", 64)
        ),
        args=TrainerConfig(output_dir=str(folder), **COMMON, **setting["args"]),
        **parts,
    )


def of_length(completions: list[str], **_: Any) -> list[float]:
    """Reward a response by its letters."""
    return [float(len(text)) for text in completions]


def prompts(world: ToyWorld, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Return prompts of the length of a setting, and one in two a little shorter."""
    tokenizer, wanted = world.tokenizer(), setting.get("prompt", 64)
    words = [word for r in world.prompts(64) for word in r["prompt"][-1]["content"].split()]
    made = []
    for index in range(8):
        length, count = wanted - index % 2 * (wanted // 8), wanted
        while len(tokenizer(text := " ".join(words[:count]))["input_ids"]) > length:
            count -= 1
        made.append({"prompt": text})
    return made


def first_step(trainer: Trainer) -> None:
    """Let the optimizers make their states, on a few tokens."""
    for optimizer in trainer.engine.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def iteration(trainer: Trainer, known: set[int] | None = None) -> tuple[dict[str, int], int]:
    """Run the stages of an iteration, and return the peak of each phase and what is held."""
    held: list[int] = []

    def look(*_: Any) -> None:
        if not held:
            held.append(sum(n for s, n in storages().items() if s not in (known or set())))

    optimizer = trainer.engine.optimizers["critic"]
    getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(look)
    peaks: dict[str, int] = {}

    def phase(name: str, run: Any) -> Any:
        gc.collect()
        start_peak()
        result = run()
        peaks[name] = peak_now()
        return result

    rollout = phase("sampling", trainer.collect)
    rollout = phase("scoring", lambda: trainer.estimate(trainer.annotate(trainer.score(rollout))))
    phase("update", lambda: trainer.update(rollout))
    return peaks, held[0]


def storages() -> dict[int, int]:
    """Return the bytes of every storage that a tensor of this process has, gradients included."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def start_peak() -> None:
    """Let the peak begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif not forget_peak():
        raise RuntimeError("this system does not let a process forget its peak")


def held_now() -> int:
    """Return the bytes there are now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident()


def peak_now() -> int:
    """Return the most bytes there were."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()


HEAD = ("setting", "weights, gradients, optimizer", *PHASES)


def table(figures: dict[str, Any]) -> str:
    """Lay out planned, measured and their ratio, MB."""
    lines = [f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|"]
    for name, one in figures["settings"].items():
        cells = [cell(one[key]) for key in ("steady", *PHASES)]
        size = one["base_parameters"] / 1e6
        lines.append(f"| {name}, {size:.0f}M | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(one: dict[str, int]) -> str:
    """Lay out two figures and their ratio."""
    planned, taken = one["planned"], one["measured"]
    return f"{planned / 1e6:,.0f} / {taken / 1e6:,.0f} = {planned / taken:.2f}"


def page_of(page: str, figures: dict[str, Any]) -> str:
    """Put the table between its marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table(figures)}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    sys.exit(main())
