"""The main job: vanilla PPO, vanilla PPO with its learning rate tuned, and PPO-max, side by side.

Everything happens in the toy world, where the true preference is known and used for measuring
alone: it has weight 0 among the rewards, and no choice is made by it while anything runs.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from mossrlhf import presets
from mossrlhf.models import RewardModel
from mossrlhf.plotting import plot_arms, require_matplotlib
from mossrlhf.recipes.bookkeeping import Clock, clear_folder, versions
from mossrlhf.recipes.report import Results, answer_texts, write_report
from mossrlhf.recipes.toy_stages import EXAMPLES, PAIRS, generation, train_reward, train_sft
from mossrlhf.serialization import no_progress_bars
from mossrlhf.toyworld import ToyWorld
from mossrlhf.trainer import Trainer
from mossrlhf.version import __version__

LEARNING_RATE = 1e-3
"""Of vanilla PPO and PPO-max alike; a model of 0.2 M parameters takes large steps."""

PRETRAIN_STEPS = 10
"""Iterations in which PPO-max's critic learns alone."""

KL_COEFFICIENT = 0.1
"""η of the PPO-max arm, the middle one of those P1 studies (0.05, 0.1, 0.2)."""

TUNED_LEARNING_RATE = 1e-4
"""Of the second vanilla arm, chosen by the true quality on a seed set aside for it, 10: a choice
that nobody has outside a toy world."""


@dataclass(frozen=True)
class ToyConfig:
    """Size and place of the main job.

    Args:
        lang: "en" or "zh".
        seed: of the world, the models and the runs.
        output_dir: where results go.
        steps: PPO iterations of each arm.
        arms: which of the three to run.
    """

    lang: str = "en"
    seed: int = 0
    output_dir: str = "outputs/demo"
    steps: int = 100
    arms: tuple[str, ...] = ("vanilla_ppo", "vanilla_ppo_tuned", "ppo_max")


@dataclass(frozen=True)
class Stage:
    """What the stages before PPO leave behind.

    Args:
        world: the toy world.
        tokenizer: its tokenizer.
        policy: the SFT model.
        reward_model: trained on noisy pairs; the folder of one, or of an adapter, will do.
    """

    world: ToyWorld
    tokenizer: PreTrainedTokenizerBase
    policy: LlamaForCausalLM
    reward_model: RewardModel | Path


def main(config: ToyConfig = ToyConfig()) -> dict[str, Any]:
    """Run the three stages and the three arms, and write the report.

    Ctrl-C in an arm ends that arm after its iteration, and the others are not started; what there
    is by then is measured and written. Before the arms there is nothing to write.

    Args:
        config: language, seed, folder.

    Returns:
        what ``summary.json`` holds; ``interrupted`` tells whether it is all that was asked for.

    Raises:
        ImportError: without matplotlib, before anything is trained.
        KeyboardInterrupt: where Ctrl-C came before the arms.

    Source: P1 Figs. 4 and 9, at a scale of minutes.
    """
    require_matplotlib()
    folder = Path(config.output_dir)
    clear_folder(folder, vars(config))
    print(f"mossrlhf {__version__}: the toy world, {config.lang}, seed {config.seed}")
    print("(docs/metrics.md explains the columns of the tables)\n")
    clock = Clock()
    stage, sft, accuracy = prepare(config, folder, clock)
    results = run_arms(config, stage, folder, clock)
    summary = {
        "seed": config.seed,
        "lang": config.lang,
        "interrupted": results.interrupted,
        "sft": sft,
        "reward_model": {"accuracy": accuracy},
        "runs": results.runs,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(
        results,
        _held_out(stage.world),
        folder,
        draw=partial(plot_arms, true_quality="reward/true_quality/mean"),
        judge="the true preference",
        title=f"Samples: the toy world, {config.lang}, seed {config.seed}",
        seed=config.seed,
    )
    print(f"{sum(clock.seconds.values()):.0f} seconds in all")
    return summary


def run_arms(config: ToyConfig, stage: Stage, folder: Path, clock: Clock) -> Results:
    """Train and measure one arm after the other, until Ctrl-C.

    Args:
        config: which arms.
        stage: what the stages before PPO left behind.
        folder: where the models of ``ppo_max`` go.
        clock: of the stages.
    """
    found = Results(asked=dict.fromkeys(config.arms, config.steps))
    try:
        for arm in config.arms:
            print(f"\n{arm} (learning rate {rate(arm):g})")
            trainer = clock(arm, run, arm, stage, config)
            found.interrupted = trainer.run.interrupted
            if found.interrupted:
                print("Measuring what there is; Ctrl-C skips that.")
            found.histories[arm] = trainer.history
            found.runs[arm] = {"steps": trainer.run.state.global_step}
            if arm == "ppo_max":
                trainer.save_model(folder)
                found.saved += ["policy/", "critic/"]
            found.runs[arm] |= clock("evaluation", measure, trainer)
            found.answers.setdefault("SFT", answer_texts(trainer, reference=True))
            found.answers[arm] = answer_texts(trainer)
            if found.interrupted:
                break
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def prepare(config: ToyConfig, folder: Path, clock: Clock) -> tuple[Stage, dict[str, float], float]:
    """Train the SFT model and the reward model, and say how good they are."""
    world = ToyWorld(lang=config.lang, seed=config.seed)
    tokenizer = world.tokenizer()
    print("SFT model      ", end="", flush=True)
    policy, sft = clock("sft", train_sft, world, tokenizer, folder, config.seed, EXAMPLES)
    print(
        f"true quality {sft['true_quality']:.2f}, ended {sft['ended']:.0%}, "
        f"well-formed {sft['well_formed']:.0%}"
    )
    print("reward model   ", end="", flush=True)
    reward_model, accuracy = clock(
        "reward_model", train_reward, world, tokenizer, policy, folder, config.seed, PAIRS
    )
    print(f"right on {accuracy:.1%} of fresh pairs")
    with no_progress_bars():
        reward_model.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")
    return Stage(world, tokenizer, policy, reward_model), sft, accuracy


def rate(arm: str) -> float:
    """Return the learning rate of an arm, policy and critic alike.

    Args:
        arm: its name.
    """
    return TUNED_LEARNING_RATE if arm == "vanilla_ppo_tuned" else LEARNING_RATE


def parts(arm: str, options: dict[str, Any]) -> dict[str, Any]:
    """The components of an arm; the two learning rates are all that differs besides."""
    if arm == "ppo_max":
        chosen = presets.ppo_max(critic_pretrain_steps=PRETRAIN_STEPS, **options)
        return {**chosen, "shaper": replace(chosen["shaper"], kl_coef=KL_COEFFICIENT)}
    return presets.vanilla_ppo(**options)


def run(
    arm: str,
    stage: Stage,
    config: ToyConfig,
    learning_rate: float | None = None,
    **given: Any,
) -> Trainer:
    """Train one arm.

    Args:
        arm: its name.
        stage: what the stages before PPO left behind.
        config: seed, steps, folder.
        learning_rate: of policy and critic; None for the arm's own.
        given: further arguments of `Trainer`.
    """
    learning_rate = learning_rate or rate(arm)
    options = dict(
        output_dir=str(Path(config.output_dir) / arm),
        seed=config.seed,
        total_steps=config.steps,
        rollout_size=64,
        minibatch_size=16,
        learning_rate=learning_rate,
        critic_learning_rate=learning_rate,
        logging_steps=5,
    )

    def true_quality(**columns: Any) -> list[float]:
        return stage.world.reward(**columns)

    trainer = Trainer(
        _copy(stage.policy),
        reward=[stage.reward_model, (true_quality, 0.0)],
        train_dataset=stage.world.prompts(4000, seed=2),
        eval_dataset=_held_out(stage.world),
        processing_class=stage.tokenizer,
        generation_config=generation(stage.world),
        **parts(arm, options),
        **given,
    )
    trainer.train()
    return trainer


def _copy(policy: LlamaForCausalLM) -> LlamaForCausalLM:
    copied = LlamaForCausalLM(policy.config)
    copied.load_state_dict(policy.state_dict())
    return copied


def _held_out(world: ToyWorld) -> list[dict[str, Any]]:
    return world.prompts(300, split="eval", seed=3)


def measure(trainer: Trainer) -> dict[str, Any]:
    """Return the figures of an arm on held-out prompts, against the SFT model.

    Args:
        trainer: of the arm.
    """
    metrics = trainer.evaluate()
    assert trainer.run.collapse is not None
    return {
        "reward_score": metrics["eval/reward_model/policy"],
        "true_quality": metrics["eval/true_quality/policy"],
        "kl_per_sequence": metrics["eval/kl/ref_per_sequence"],
        "response_length": metrics["eval/response/length_tokens"],
        "perplexity_policy": metrics["eval/perplexity/policy"],
        "perplexity_sft": metrics["eval/perplexity/ref"],
        "win_rate": metrics["eval/true_quality/win_rate"],
        "lose_rate": metrics["eval/true_quality/lose_rate"],
        "collapsed": trainer.run.collapse.lately,
    }
