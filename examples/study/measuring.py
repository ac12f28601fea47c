"""One run: train an arm in a world, and record its curves and final evaluation."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mossrlhf import Trainer
from mossrlhf.critic_evaluation import CriticEvaluation
from mossrlhf.randomness import temporary_seed
from study.arms import ARMS
from study.plan import LONG, Job, Scale
from study.preparing import Prepared, load

CURVES = {
    "reward/score_mean": "score",
    "reward/score_std": "score_std",
    "reward/true_quality/mean": "true_quality",
    "kl/ref_per_sequence": "kl",
    "response/length_tokens": "length",
    "response/distinct_2": "distinct_2",
    "perplexity/policy": "perplexity_policy",
    "perplexity/ref": "perplexity_sft",
    "policy/entropy_nats_per_token": "entropy",
    "policy/approx_kl_per_token": "approx_kl",
    "policy/clip_fraction": "clip_fraction",
    "policy/grad_norm": "policy_grad_norm",
    "critic/grad_norm": "critic_grad_norm",
    "critic/loss": "value_loss",
    "critic/explained_variance": "explained_variance",
    "advantages/std": "advantages_std",
    "policy/collapsed": "collapsed",
}
"""Of `Trainer.history`, under shorter names: five significant digits of each are kept."""


def run(job: Job, scale: Scale, folder: Path) -> dict[str, Any]:
    """Train and measure.

    Args:
        job: what to run.
        scale: sizes of the study.
        folder: of the world; long runs save checkpoints there, and resume from them.

    Returns:
        curves, figures and seconds.

    Raises:
        RuntimeError: if Ctrl-C ended it early.
    """
    began = time.perf_counter()
    ready = load(job.world, folder)
    arm = ARMS[job.arm]
    home = folder / job.name
    found: dict[str, Any] = {"learning_rate": job.rate, "steps": job.steps}
    with temporary_seed(job.world.seed):
        trainer = assemble(job, ready, scale, home)
        if arm.critic_evaluated:
            trainer.pretrain_critic()
            known = trainer if arm.pretrained else acquainted(job, ready, scale, home)
            found["critic_before"] = values(known, scale)
        # Every run saves a checkpoint at its end or at Ctrl-C; short ones do not resume from it.
        begun = job.arm == LONG and any(home.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=begun or None)
        if trainer.run.interrupted:  # it ends as if it were done, and must not be kept as that
            raise RuntimeError(f"{job.world} {job.name} was interrupted; its record is not kept")
        found["held_out"] = judged(trainer.evaluate())
        if arm.judged_apart:
            found |= {kind: judged(trainer.evaluate(of)) for kind, of in apart(ready, scale)}
        if arm.critic_evaluated:
            found["critic_after"] = values(trainer, scale)
    # Rounded, so that files stay small; a number that overflowed has no place in JSON.
    found["curves"] = curves(trainer.history)
    found["pretraining_value_loss"] = [
        rounded(entry["critic/loss"]) for entry in trainer.history if "pretrain/step" in entry
    ]
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def assemble(job: Job, ready: Prepared, scale: Scale, home: Path) -> Trainer:
    """Return the trainer of an arm.

    Args:
        job: which arm, and at which rate.
        ready: the world.
        scale: sizes of the study.
        home: folder of the run.
    """
    arm = ARMS[job.arm]

    def true_quality(**columns: Any) -> list[float]:
        return ready.world.reward(**columns)

    options: dict[str, Any] = dict(
        output_dir=str(home),
        seed=job.world.seed,
        total_steps=job.steps,
        rollout_size=scale.rollout,
        minibatch_size=scale.minibatch,
        learning_rate=job.rate,
        critic_learning_rate=job.rate,
        logging_steps=job.log,
        save_steps=max(1, job.steps // 10) if job.arm == LONG else None,
        save_total_limit=1,
        disable_tqdm=True,
    )
    return Trainer(
        arm.policy(ready),
        critic=arm.critic(ready),
        reward=[ready.reward_model, (true_quality, 0.0)],  # weight 0: looked at, not trained on
        train_dataset=ready.world.prompts(4000, seed=2),
        eval_dataset=ready.world.prompts(scale.held_out, split="eval", seed=3),
        processing_class=ready.tokenizer,
        generation_config=ready.generation,
        **arm.parts(ready, scale.pretrain, **options),
    )


def acquainted(job: Job, ready: Prepared, scale: Scale, home: Path) -> Trainer:
    """Return a trainer of the same arm that has seen as many rewards as in a critic warm-up.

    Its shaper then normalizes as that of the pre-trained arms does: returns and errors of both are
    in one unit. The trainer of PPO is not changed.
    """
    trainer = assemble(job, ready, scale, home)
    for _ in range(scale.pretrain):
        trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    return trainer


def apart(ready: Prepared, scale: Scale) -> list[tuple[str, list[dict[str, Any]]]]:
    """Held-out prompts with harmless requests, and with harmful ones."""
    topics = ready.world.language.topics
    drawn = ready.world.prompts(20 * scale.held_out, split="eval", seed=4)
    harmful = [record for record in drawn if topics[record["topic"]].harmful]
    helpful = [record for record in drawn if not topics[record["topic"]].harmful]
    return [("helpful", helpful[: scale.held_out]), ("harmless", harmful[: scale.held_out])]


def judged(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of `Trainer.evaluate` that the study uses."""
    kept = {
        "reward_score": "eval/reward_model/policy",
        "reward_win": "eval/reward_model/win_rate",
        "reward_lose": "eval/reward_model/lose_rate",
        "true_quality": "eval/true_quality/policy",
        "win": "eval/true_quality/win_rate",
        "tie": "eval/true_quality/tie_rate",
        "lose": "eval/true_quality/lose_rate",
        "kl": "eval/kl/ref_per_sequence",
        "length": "eval/response/length_tokens",
        "perplexity_policy": "eval/perplexity/policy",
        "perplexity_sft": "eval/perplexity/ref",
    }
    return {short: rounded(metrics[name]) for short, name in kept.items()}


def values(trainer: Trainer, scale: Scale) -> dict[str, Any]:
    """Compare the critic's values with Monte-Carlo continuations."""
    found: CriticEvaluation = trainer.evaluate_critic(
        prompts=scale.states, positions=4, continuations=scale.continuations
    )

    def numbers(part: Any) -> dict[str, Any]:
        return {name: rounded(value) for name, value in part.numbers().items()}

    return {
        **numbers(found.overall),
        "by_position": [numbers(part) for part in found.by_position],
        "values": [rounded(v, 4) for v in found.values.tolist()],
        "returns": [rounded(v, 4) for v in found.returns.tolist()],
    }


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the logged metrics as columns."""
    rows = [entry for entry in history if "step" in entry and "reward/score_mean" in entry]
    kept = {short: [rounded(row.get(name)) for row in rows] for name, short in CURVES.items()}
    return {"step": [row["step"] for row in rows], **kept}


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Round to significant digits; numbers that are not finite become None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def describe(job: Job, found: Mapping[str, Any]) -> str:
    """Return a line for the console, of at most 80 columns."""
    held = found["held_out"]
    lately = any(found["curves"]["collapsed"][-5:])
    return (
        f"{job.world!s:6}{job.name:26}{found['seconds']:5.0f} s  score"
        f"{held['reward_score']:6.2f}  quality{held['true_quality']:6.2f}"
        f"  KL{held['kl']:6.1f}{' !' if lately else ''}"
    )


def write(found: Mapping[str, Any], path: Path) -> None:
    """Write a run's record atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(found))
    half.replace(path)
