"""What a single run leaves in its folder beside the models: figures, curves, samples, reward."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mossrlhf.logging import completion_table
from mossrlhf.plotting import plot_history
from mossrlhf.recipes.bookkeeping import REPORT, versions
from mossrlhf.recipes.report import answer_pairs, dialogue, write_page
from mossrlhf.rewards import ModelReward
from mossrlhf.serialization import no_progress_bars
from mossrlhf.trainer import Trainer

SAMPLES = 12
"""Prompts in ``samples.md``."""


def write_run(trainer: Trainer, seconds: Mapping[str, float]) -> None:
    """Write the models and all that is to be looked at to the folder of a finished run.

    ``policy/``, ``critic/``, ``reward_model/`` (where a model is the reward), ``summary.json``,
    ``curves.png`` (where matplotlib is installed) and ``samples.md``. Every process calls it, the
    main one writes.

    Args:
        trainer: after `Trainer.train`, interrupted or not.
        seconds: each stage took, by its name.

    Source: ours.
    """
    folder, main = trainer.output_dir, trainer.accelerator.is_main_process
    trainer.save_model()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        _save_reward_model(trainer, folder / "reward_model")
        text = json.dumps(run_summary(trainer, seconds), indent=1)
        (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
        _draw(trainer, folder / "curves.png")
    _write_samples(trainer, folder / "samples.md")
    if main:
        saved = [name for name in ("policy", "critic", "reward_model") if (folder / name).is_dir()]
        files = [name for name in ("config.json", *REPORT) if (folder / name).exists()]
        print(f"\n{folder}/: {', '.join([*files, *(f'{name}/' for name in saved)])}")


def run_summary(trainer: Trainer, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what ``summary.json`` holds of a single run.

    Args:
        trainer: after `Trainer.train`.
        seconds: each stage took, by its name.

    Returns:
        ``interrupted``; ``steps`` taken; ``training`` and ``evaluation``, the last metrics of each,
        by name, with the ``step`` they are of (None where there are none; a number that is not
        finite is None as well, for JSON has no word for it); ``seconds``; ``versions``.

    Source: ours.
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


def _save_reward_model(trainer: Trainer, folder: Path) -> None:
    rewards = [r for r, _ in trainer.rewards.rewards if isinstance(r, ModelReward)]
    for number, reward in enumerate(rewards):
        place = folder if number == 0 else folder.with_name(f"{folder.name}_{number + 1}")
        try:
            with no_progress_bars():
                reward.model.save_pretrained(place)  # type: ignore[operator]
        except ValueError as error:  # some families have no classifier to be saved as
            print(f"{place.name}/ is not written: {error}")
            continue
        (reward.tokenizer or trainer.processing_class).save_pretrained(place)


def _draw(trainer: Trainer, path: Path) -> None:
    if not trainer.history:
        return
    try:
        plot_history(trainer.history, path)
    except ImportError as error:
        print(f"{path.name} is not drawn: {error}")


def _write_samples(trainer: Trainer, path: Path) -> None:
    """Let policy and reference answer held-out prompts; without any, quote the last rollout."""
    accelerator, held_out = trainer.accelerator, trainer.eval_dataset
    title = f"Samples after iteration {trainer.run.state.global_step}"
    if held_out is not None and len(held_out) >= accelerator.num_processes:
        count = min(SAMPLES * accelerator.num_processes, len(held_out))
        places = random.Random(trainer.args.seed).sample(range(len(held_out)), count)
        records = [dict(held_out[place]) for place in places]
        # Each process answers its share; the main one, whose share is as good as any, writes.
        answers = answer_pairs(trainer, records)
        mine = records[accelerator.process_index :: accelerator.num_processes]
        samples = [
            {"prompt": dialogue(record["prompt"]), "answers": pair}
            for record, pair in zip(mine, answers, strict=True)
        ]
        lead = [
            f"{len(samples)} of the {len(held_out)} held-out prompts, drawn at random, not chosen.",
            "Beneath each stands one answer of both models, as it was sampled.",
        ]
    else:
        file = trainer.run.completions.path
        if not accelerator.is_main_process or not file.is_file():
            return
        rows = completion_table(file)
        rows = [row for row in rows if row["step"] == rows[-1]["step"]]
        samples = [
            {"prompt": row["prompt"], "answers": {"policy": row["completion"]}} for row in rows
        ]
        lead = [f"The first {len(rows)} responses of the rollout of iteration {rows[-1]['step']}."]
    if accelerator.is_main_process:
        write_page(title, lead, samples, path)
