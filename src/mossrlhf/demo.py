"""``mossrlhf demo``: vanilla PPO, vanilla PPO with a tuned learning rate, and PPO-max, compared.

The three runs share a toy world, whose true preference is known. The true preference is only
logged: its weight among the rewards is 0, and no run depends on it.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from mossrlhf import presets
from mossrlhf.data import PairCollator, prompt_batch
from mossrlhf.models import RewardModel
from mossrlhf.plotting import plot_arms, require_matplotlib
from mossrlhf.reward_modeling.trainer import RewardTrainer
from mossrlhf.sampling import HFSampler
from mossrlhf.serialization import no_progress_bars, write_json
from mossrlhf.sft_trainer import SFTTrainer
from mossrlhf.toyworld import ToyWorld
from mossrlhf.trainer import Trainer
from mossrlhf.version import __version__, versions

Records = Sequence[Mapping[str, Any]]

EXAMPLES = 8000  # demonstrations for SFT; with half of them 2 to 3 % of responses are malformed
PAIRS = 4000  # noisy, for the reward model
PRETRAIN_STEPS = 10  # iterations of critic warm-up in PPO-max
KL_COEFFICIENT = 0.1  # η of PPO-max, the middle one of P1's 0.05, 0.1 and 0.2
SAMPLES = 12  # prompts in samples.md

LEARNING_RATES = {"vanilla_ppo": 1e-3, "vanilla_ppo_tuned": 1e-4, "ppo_max": 1e-3}
"""Of policy and critic: a model of 0.2 M parameters takes large steps. The tuned one was chosen by
the true quality on a separate seed, 10, which is impossible outside a toy world."""

LEAD = """\
{} of the {} held-out prompts, picked at random.
Below each: one response of every model, as it was sampled."""

REPORT = ("curves.png", "samples.md", "summary.json")
"""The files that a job writes at its end."""

FIGURES = (
    ("reward-model score", "reward_score", "reward_model/policy", "{:.2f}"),
    ("true quality", "true_quality", "true_quality/policy", "{:.2f}"),
    ("KL to SFT, nats/seq", "kl_per_sequence", "kl/ref_per_sequence", "{:.1f}"),
    ("length, tokens", "response_length", "response/length_tokens", "{:.1f}"),
    ("perplexity, policy", "perplexity_policy", "perplexity/policy", "{:.2f}"),
    ("perplexity, SFT", "perplexity_sft", "perplexity/ref", "{:.2f}"),
    ("wins against SFT", "win_rate", "{reward}/win_rate", "{:.0%}"),
    ("loses against SFT", "lose_rate", "{reward}/lose_rate", "{:.0%}"),
)
"""Of each run: label in the table, key in ``summary.json``, metric of an evaluation, format."""


@dataclass(frozen=True)
class DemoConfig:
    """Size and folder of the demo."""

    lang: str = "en"  # or "zh"
    seed: int = 0  # of the world, the models and the runs
    output_dir: str = "outputs/demo"
    steps: int = 100  # PPO iterations of each run
    arms: tuple[str, ...] = tuple(LEARNING_RATES)


@dataclass(frozen=True)
class Setup:
    """The world, SFT model and reward model that every PPO run starts from."""

    world: ToyWorld
    policy: LlamaForCausalLM  # the SFT model
    reward_model: RewardModel | Path  # a model, or the folder of one or of an adapter


@dataclass
class Results:
    """Results of the PPO runs of a job, by the name of the run."""

    planned: dict[str, int]  # PPO iterations
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # steps and `FIGURES`
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    responses: dict[str, list[str]] = field(default_factory=dict)  # to the held-out prompts
    seconds: dict[str, float] = field(default_factory=dict)  # by the name of the stage
    saved: list[str] = field(default_factory=lambda: ["reward_model/"])  # folders of models
    interrupted: bool = False  # by Ctrl-C


def main(config: DemoConfig = DemoConfig()) -> dict[str, Any]:
    """Train SFT model, reward model and PPO runs, write the report; return ``summary.json``.

    Ctrl-C during PPO ends that run after its iteration and starts no other; the results so far
    are measured and written.
    """
    require_matplotlib()
    folder = Path(config.output_dir)
    clear_folder(folder, vars(config))
    print(f"mossrlhf {__version__}: the toy world, {config.lang}, seed {config.seed}")
    print("(docs/metrics.md explains the columns of the tables)\n")
    results = Results(planned=dict.fromkeys(config.arms, config.steps))
    setup, facts = prepare(config, folder, results.seconds)
    trainers = {arm: partial(make_trainer, arm, setup, config) for arm in config.arms}
    prompts = held_out(setup.world)
    train_all(trainers, prompts, results, folder)
    return write_report(
        results,
        {"seed": config.seed, "lang": config.lang, **facts},
        prompts,
        folder,
        plot=partial(plot_arms, true_quality="reward/true_quality/mean"),
        winner_by="the true preference",
        title=f"Samples: the toy world, {config.lang}, seed {config.seed}",
    )


def prepare(
    config: DemoConfig, folder: Path, seconds: dict[str, float]
) -> tuple[Setup, dict[str, Any]]:
    """Train the SFT model and the reward model; return them and their quality."""
    world = ToyWorld(lang=config.lang, seed=config.seed)
    print("SFT model      ", end="", flush=True)
    with timed("sft", seconds):
        policy, sft = train_sft(world, folder, EXAMPLES)
    print(
        f"true quality {sft['true_quality']:.2f}, ended {sft['ended']:.0%}, "
        f"well-formed {sft['well_formed']:.0%}"
    )
    print("reward model   ", end="", flush=True)
    with timed("reward_model", seconds):
        reward_model, accuracy = train_reward(world, policy, folder, PAIRS)
    print(f"right on {accuracy:.1%} of fresh pairs")
    save_model(reward_model, world.tokenizer(), folder / "reward_model")
    facts = {"sft": sft, "reward_model": {"accuracy": accuracy}}
    return Setup(world, policy, reward_model), facts


def train_sft(
    world: ToyWorld, folder: Path, examples: int
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train the SFT model of a toy world; return it and the quality of its responses."""
    tokenizer = world.tokenizer()
    torch.manual_seed(world.seed)
    policy = LlamaForCausalLM(world.model_config())
    options: dict[str, Any] = {"num_train_epochs": 4, "per_device_train_batch_size": 32}
    options |= {"learning_rate": 4e-3, "seed": world.seed}
    records = world.sft_examples(examples)
    fine_tune(policy, tokenizer, records, folder / "sft", **options)
    prompts = world.prompts(1024, split="eval", seed=1)
    sampler = HFSampler.for_tokenizer(tokenizer, generation_config(world))
    torch.manual_seed(world.seed)
    rollout = sampler(policy, prompt_batch(prompts, tokenizer).ids)
    texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    ended = (~rollout.truncated).tolist()
    quality = [
        world.true_quality(record, text, ended=end)
        for record, text, end in zip(prompts, texts, ended, strict=True)
    ]
    return policy, {
        "true_quality": sum(quality) / len(quality),
        "ended": sum(ended) / len(ended),
        "well_formed": sum(map(world.well_formed, texts)) / len(texts),
    }


def train_reward(
    world: ToyWorld, policy: LlamaForCausalLM, folder: Path, pairs: int, **options: Any
) -> tuple[RewardModel, float]:
    """Train the reward model of a toy world; return it, and its accuracy on fresh pairs."""
    fresh = [pair for pair in world.pairs(500, split="eval", seed=1) if pair["true_margin"] != 0]
    for pair in fresh:  # without label noise, which would lower the accuracy
        if pair["true_margin"] < 0:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    model, metrics = train_reward_model(
        policy,
        world.tokenizer(),
        world.pairs(pairs),
        fresh,
        folder / "rm",
        per_device_train_batch_size=16,
        per_device_eval_batch_size=128,
        seed=world.seed,
        **{"learning_rate": 1e-3, "num_train_epochs": 2, **options},
    )
    return model, metrics["accuracy"]


def generation_config(world: ToyWorld) -> GenerationConfig:
    """Return the sampling settings: all tokens, and the length of the longest demonstration."""
    return GenerationConfig(max_new_tokens=world.max_response_tokens, do_sample=True)


def training_arguments(folder: str | Path, **options: Any) -> TrainingArguments:
    """Return transformers' arguments for a short stage that saves nothing; Adam's β are P1's."""
    settings = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **settings)


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    folder: str | Path,
    max_length: int | None = None,
    **options: Any,
) -> float:
    """Fine-tune a causal language model in place; return the mean training loss, nats per token.

    ``records`` have ``prompt`` and ``response``; ``options`` are those of
    `transformers.TrainingArguments`; ``max_length`` counts the tokens of prompt and response.
    """
    args = training_arguments(folder, **options)
    trainer = SFTTrainer(model, args, records, tokenizer, max_length=max_length)
    trainer.remove_callback(PrinterCallback)
    output = trainer.train()
    model.eval()
    return float(output.training_loss)


def train_reward_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Records,
    held_out: Records,
    folder: str | Path,
    max_length: int | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[RewardModel, dict[str, float]]:
    """Train a reward model from a copy of a language model's backbone, and evaluate it.

    ``trainer_options`` are those of `RewardTrainer`, ``options`` those of
    `transformers.TrainingArguments`. Return the model and `RewardTrainer.evaluate`'s metrics.
    """
    trainer = RewardTrainer(
        RewardModel.from_language_model(model),
        training_arguments(folder, **options),
        train_dataset=pairs,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=PairCollator(tokenizer, max_length=max_length),
        **(trainer_options or {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = {k.removeprefix("eval_"): float(v) for k, v in trainer.evaluate().items()}
    return trainer.reward_model.eval(), metrics


def make_trainer(
    arm: str, setup: Setup, config: DemoConfig, learning_rate: float | None = None, **given: Any
) -> Trainer:
    """Return the trainer of an arm; ``given`` are further arguments of `Trainer`."""
    learning_rate = learning_rate or LEARNING_RATES[arm]

    def true_quality(**columns: Any) -> list[float]:
        return setup.world.reward(**columns)

    components = parts(
        arm,
        output_dir=str(Path(config.output_dir) / arm),
        seed=config.seed,
        total_steps=config.steps,
        rollout_size=64,
        minibatch_size=16,
        learning_rate=learning_rate,
        critic_learning_rate=learning_rate,
        logging_steps=5,
    )
    return Trainer(
        copied(setup.policy),
        reward=[setup.reward_model, (true_quality, 0.0)],
        train_dataset=setup.world.prompts(4000, seed=2),
        eval_dataset=held_out(setup.world),
        processing_class=setup.world.tokenizer(),
        generation_config=generation_config(setup.world),
        **components,
        **given,
    )


def copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy with the same weights."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def parts(arm: str, **options: Any) -> dict[str, Any]:
    """Return the components of an arm; ``options`` are those of `TrainerConfig`."""
    if arm == "ppo_max":
        chosen = presets.ppo_max(critic_pretrain_steps=PRETRAIN_STEPS, **options)
        return {**chosen, "shaper": replace(chosen["shaper"], kl_coef=KL_COEFFICIENT)}
    return presets.vanilla_ppo(**options)


def held_out(world: ToyWorld) -> list[dict[str, Any]]:
    """Return the prompts on which the runs are compared."""
    return world.prompts(300, split="eval", seed=3)


def train_all(
    trainers: Mapping[str, Callable[[], Trainer]], prompts: Records, results: Results, folder: Path
) -> None:
    """Train and measure one run after the other, until Ctrl-C; save the models of ``ppo_max``."""
    try:
        for name, make in trainers.items():
            with timed(name, results.seconds):
                trainer = make()
                print(f"\n{name} (learning rate {trainer.args.learning_rate:g})")
                trainer.train()
            results.interrupted = trainer.run.interrupted
            if results.interrupted:
                print("Evaluating the results so far; Ctrl-C skips this.")
            results.histories[name] = trainer.history
            results.runs[name] = {"steps": trainer.run.state.global_step}
            if name == "ppo_max":
                trainer.save_model(folder)
                results.saved += ["policy/", "critic/"]
            with timed("evaluation", results.seconds):
                results.runs[name] |= measure(trainer)
            if "SFT" not in results.responses:
                results.responses["SFT"] = response_texts(trainer, prompts, reference=True)
            results.responses[name] = response_texts(trainer, prompts)
            if results.interrupted:
                break
    except KeyboardInterrupt:
        results.interrupted = True


def measure(trainer: Trainer) -> dict[str, Any]:
    """Return a policy's `FIGURES` on held-out prompts; win rates are by the last reward."""
    metrics, reward = trainer.evaluate(), trainer.rewards.names[-1]
    names = {key: "eval/" + metric.format(reward=reward) for _, key, metric, _ in FIGURES}
    found: dict[str, Any] = {key: metrics[name] for key, name in names.items() if name in metrics}
    if trainer.run.collapse is not None:
        found["collapsed"] = trainer.run.collapse.lately
    return found


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the block's duration to ``seconds[stage]``; let Ctrl-C in it name the stage."""
    start = time.perf_counter()
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(stage) from stop
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def clear_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``; remove the report of an earlier run, which may have other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in REPORT:
        (folder / name).unlink(missing_ok=True)
    write_json(config, folder / "config.json")


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model and its tokenizer to a folder."""
    with no_progress_bars():
        model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def write_report(
    results: Results,
    facts: Mapping[str, Any],
    prompts: Records,
    folder: Path,
    *,
    plot: Callable[[Mapping[str, Any], Path], Any],
    winner_by: str,
    title: str,
) -> dict[str, Any]:
    """Write ``summary.json``, ``curves.png`` and ``samples.md``, and print the table.

    ``facts`` are further entries of ``summary.json``, ``seed`` included; ``plot`` plots the
    histories to a file; ``winner_by`` names the reward of the win rates. Return the summary.
    """
    summary = {
        **facts,
        "interrupted": results.interrupted,
        "runs": results.runs,
        "seconds": {name: round(value, 1) for name, value in results.seconds.items()},
        "versions": versions(),
    }
    write_json(summary, folder / "summary.json")
    started = {name: h for name, h in results.histories.items() if any("step" in e for e in h)}
    if started:
        plot(started, folder / "curves.png")
    if results.responses:
        count = min(SAMPLES, len(prompts))
        chosen = random.Random(facts["seed"]).sample(range(len(prompts)), count)
        samples = [
            (prompts[i]["prompt"], {name: texts[i] for name, texts in results.responses.items()})
            for i in chosen
        ]
        lead = LEAD.format(len(samples), len(prompts))
        write_samples(folder / "samples.md", title, lead, samples)
    if measured := {name: run for name, run in results.runs.items() if "reward_score" in run}:
        print("\n" + summary_table(measured))
        print(f"Wins and losses: {len(prompts)} held-out prompts, by {winner_by}.")
    if results.interrupted:
        print("\nINTERRUPTED; PPO iterations done:")
        for name, steps in results.planned.items():
            print(f"  {name}: {results.runs.get(name, {}).get('steps', 0)} of {steps}")
    files = [name for name in REPORT if (folder / name).exists()]
    print(f"\n{folder}/: {', '.join([*files, *results.saved])}")
    print(f"{sum(results.seconds.values()):.0f} seconds in all")
    return summary


def summary_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a table with a column for each run; up to three runs fit into 80 characters."""

    def line(label: str, cells: Iterable[str]) -> str:
        return label.ljust(21) + "".join(cell.rjust(18) for cell in cells)

    lines = [line("", runs)]
    for label, key, _, form in FIGURES:
        if any(key in run for run in runs.values()):
            lines.append(line(label, (_cell(run.get(key), form) for run in runs.values())))
    flags = {None: "", True: "yes", False: "no"}
    lines.append(line("collapsed", (flags[run.get("collapsed")] for run in runs.values())))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    text = "" if value is None else form.format(value)
    return text if text.strip("-0.%") else text.lstrip("-")  # no sign before 0.0


def response_texts(trainer: Trainer, prompts: Records, reference: bool = False) -> list[str]:
    """Return the policy's or the reference's responses to this process's share of prompts."""
    ids = trainer.respond(prompts, reference).completions()
    return list(trainer.processing_class.batch_decode(ids, skip_special_tokens=True))


def write_samples(
    path: Path, title: str, lead: str, samples: Sequence[tuple[Any, Mapping[str, str]]]
) -> None:
    """Write prompts and responses, by model, as `run_report.read_samples` reads them."""
    lines = [f"# {title}", "", lead]
    for number, (prompt, responses) in enumerate(samples, 1):
        lines += ["", f"## Prompt {number}", "", *_quoted(prompt_text(prompt))]
        for name, response in responses.items():
            lines += ["", f"**{name}**", "", *_quoted(response)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Return a prompt as text: the string itself, a single turn's content, or all turns."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    speakers = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = ((speakers.get(turn["role"], turn["role"]), turn["content"]) for turn in prompt)
    return "\n\n".join(f"{speaker}: {content}" for speaker, content in turns)


def _quoted(text: str) -> list[str]:
    return [f"> {line}".rstrip() for line in text.strip().splitlines() or ["(empty)"]]
