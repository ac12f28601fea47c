"""The folder of a single run: models, reward model, figures, curves, samples."""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mossrlhf import Trainer
from mossrlhf.demo import LEAD, REPORT, SAMPLES, response_texts, save_model, write_samples
from mossrlhf.logging import completion_table
from mossrlhf.plotting import plot_history
from mossrlhf.rewards import ModelReward
from mossrlhf.serialization import write_json
from mossrlhf.version import versions


def write_run(trainer: Trainer, seconds: Mapping[str, float]) -> None:
    """Write the models and the report of a finished or interrupted run to its folder.

    ``policy/``, ``critic/``, ``reward_model/`` (if the reward is a model), ``summary.json``,
    ``curves.png`` (if matplotlib is installed) and ``samples.md``. Every process must call it; the
    main one writes. ``seconds`` are those of each stage.
    """
    folder, main = trainer.output_dir, trainer.accelerator.is_main_process
    trainer.save_model()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        _save_reward_models(trainer, folder)
        write_json(run_summary(trainer, seconds), folder / "summary.json")
        _plot(trainer, folder / "curves.png")
    _write_samples(trainer, folder / "samples.md")
    if main:
        saved = [name for name in ("policy", "critic", "reward_model") if (folder / name).is_dir()]
        files = [name for name in ("config.json", *REPORT) if (folder / name).exists()]
        print(f"\n{folder}/: {', '.join([*files, *(f'{name}/' for name in saved)])}")


def run_summary(trainer: Trainer, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    ``training`` and ``evaluation`` are the last metrics of each with their ``step``, or None. A
    number that is not finite is None as well, since JSON cannot represent it.
    """

    def last(evaluation: bool) -> dict[str, float | None] | None:
        for entry in reversed(trainer.history):
            evaluates = any(name.startswith("eval/") for name in entry)
            if "step" in entry and evaluates == evaluation:
                return {n: v if math.isfinite(v) else None for n, v in entry.items()}
        return None

    return {
        "interrupted": trainer.run.interrupted,
        "steps": trainer.run.state.global_step,
        "training": last(evaluation=False),
        "evaluation": last(evaluation=True),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": versions(),
    }


def _save_reward_models(trainer: Trainer, folder: Path) -> None:
    rewards = [r for r, _ in trainer.rewards.rewards if isinstance(r, ModelReward)]
    for number, reward in enumerate(rewards, 1):
        name = "reward_model" if number == 1 else f"reward_model_{number}"
        try:
            save_model(reward.model, reward.tokenizer or trainer.processing_class, folder / name)
        except ValueError as error:  # some families have no classifier to be saved as
            print(f"{name}/ is not written: {error}")


def _plot(trainer: Trainer, path: Path) -> None:
    if not trainer.history:
        return
    try:
        plot_history(trainer.history, path)
    except ImportError as error:
        print(f"{path.name} is not written: {error}")


def _write_samples(trainer: Trainer, path: Path) -> None:
    """Write responses to held-out prompts; without such prompts, the last rollout's."""
    accelerator, held_out = trainer.accelerator, trainer.eval_dataset
    if held_out is not None and len(held_out) >= accelerator.num_processes:
        count = min(SAMPLES * accelerator.num_processes, len(held_out))
        chosen = random.Random(trainer.args.seed).sample(range(len(held_out)), count)
        records = [dict(held_out[i]) for i in chosen]
        # Each process generates for its share; only the main one writes its samples.
        policy = response_texts(trainer, records)
        reference = response_texts(trainer, records, reference=True)
        mine = records[accelerator.process_index :: accelerator.num_processes]
        samples = [
            (record["prompt"], {"policy": ours, "reference": theirs})
            for record, ours, theirs in zip(mine, policy, reference, strict=True)
        ]
        lead = LEAD.format(len(samples), len(held_out))
    else:
        file = trainer.run.completions.path
        if not accelerator.is_main_process or not file.is_file():
            return
        rows = completion_table(file)
        rows = [row for row in rows if row["step"] == rows[-1]["step"]]
        samples = [(row["prompt"], {"policy": row["completion"]}) for row in rows]
        lead = f"The first {len(rows)} responses of the rollout of iteration {rows[-1]['step']}."
    if accelerator.is_main_process:
        title = f"Samples after iteration {trainer.run.state.global_step}"
        write_samples(path, title, lead, samples)
