"""From a file of preference pairs alone: tokenizer, language model, SFT, reward model, PPO-max.

The last pairs of the file are held out: neither the tokenizer nor any model ever learns from them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import presets
from mossrlhf.metrics import rollout_metrics
from mossrlhf.models import RewardModel
from mossrlhf.recipes.bookkeeping import Clock, versions
from mossrlhf.recipes.corpus import Corpus
from mossrlhf.recipes.from_pairs import ScratchConfig, read_corpus, train_judge, train_policy
from mossrlhf.recipes.report import samples_page, summary_table
from mossrlhf.trainer import Trainer
from mossrlhf.version import __version__

__all__ = ["ScratchConfig", "main", "measure", "run_ppo"]


def main(config: ScratchConfig) -> dict[str, Any]:
    """Run the stages one after the other, and write the report.

    Args:
        config: the file, and everything else.

    Returns:
        what ``summary.json`` holds.

    Source: P1 §4 and §5, at a scale of minutes.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    transformers.utils.logging.disable_progress_bar()
    print(f"mossrlhf {__version__}: {config.file} from scratch, seed {config.seed}\n")
    clock = Clock()
    corpus = clock("corpus", read_corpus, config)
    sizes = {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    print(f"pairs          {sizes['train']} to learn from, {sizes['held_out']} held out")
    policy, sft = clock("sft", train_policy, corpus, config)
    print(f"SFT model      perplexity of held-out chosen responses {sft['perplexity']:.1f}")
    reward_model, judged = clock("reward_model", train_judge, corpus, policy, config)
    accuracy, error = judged["accuracy"], judged["standard_error"]
    print(f"reward model   right on {accuracy:.1%} ± {error:.1%} of the held-out pairs")
    for name, model in (("sft", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        corpus.tokenizer.save_pretrained(folder / name)
    print(f"\nppo_max (learning rate {config.learning_rate:g})")
    trainer = clock("ppo_max", run_ppo, corpus, policy, reward_model, config)
    trainer.save_model(folder)
    runs = clock("evaluation", measure, trainer)
    summary = {
        "file": config.file,
        "seed": config.seed,
        "lang": corpus.lang,
        "pairs": sizes,
        "sft": sft,
        "reward_model": judged,
        "runs": runs,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    _draw(trainer, config, folder)
    print("\n" + summary_table(runs))
    won, lost = runs["ppo_max"]["win_rate"], runs["ppo_max"]["lose_rate"]
    print(f"by the reward model, ppo_max wins {won:.0%} and loses {lost:.0%} against SFT")
    print(f"\n{folder}/: curves.png, samples.md, summary.json, policy/, critic/, reward_model/")
    print(f"{sum(clock.seconds.values()):.0f} seconds in all")
    return summary


def run_ppo(
    corpus: Corpus, policy: LlamaForCausalLM, reward_model: RewardModel, config: ScratchConfig
) -> Trainer:
    """Run PPO-max on the training prompts.

    Args:
        corpus: prompts; the held-out ones are for `Trainer.evaluate`.
        policy: the SFT model, trained in place.
        reward_model: what it is trained for.
        config: iterations, learning rates, lengths.

    Source: P1 §5.4.
    """
    parts = presets.ppo_max(
        output_dir=str(Path(config.output_dir) / "ppo_max"),
        seed=config.seed,
        total_steps=config.steps,
        critic_pretrain_steps=config.critic_steps,
        rollout_size=config.rollout_size,
        minibatch_size=config.rollout_size // 4,
        learning_rate=config.learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        max_prompt_length=config.pair_length - config.response_length,
    )
    trainer = Trainer(
        policy,
        reward=reward_model,
        train_dataset=[{"prompt": pair["prompt"]} for pair in corpus.train],
        eval_dataset=[{"prompt": pair["prompt"]} for pair in corpus.held_out],
        processing_class=corpus.tokenizer,
        generation_config=GenerationConfig(max_new_tokens=config.response_length, do_sample=True),
        **parts,
    )
    trainer.train()
    return trainer


def measure(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Compare the policy with the SFT model on the held-out prompts.

    The judge is the reward model that PPO was trained on: there is no other, so its score says
    whether PPO optimizes, not whether people would like the answers.

    Args:
        trainer: after training.

    Returns:
        figures of ``SFT`` and ``ppo_max``.

    Source: P1 §5.5.
    """
    assert trainer.eval_dataset is not None
    assert trainer.run.collapse is not None
    found = trainer.evaluate()
    after = {name.removeprefix("eval/"): value for name, value in found.items()}
    answers = trainer.answer(trainer.eval_dataset, reference=True)
    before = {**after, **rollout_metrics(trainer.annotate(answers), trainer.engine.reduce)}
    return {
        "SFT": {**_figures(before, "ref"), "kl_per_sequence": 0.0},
        "ppo_max": {
            **_figures(after, "policy"),
            "win_rate": after["reward_model/win_rate"],
            "lose_rate": after["reward_model/lose_rate"],
            "collapsed": trainer.run.collapse.lately,
        },
    }


def _figures(metrics: Mapping[str, float], side: str) -> dict[str, Any]:
    return {
        "reward_score": metrics[f"reward_model/{side}"],
        "kl_per_sequence": metrics["kl/ref_per_sequence"],
        "response_length": metrics["response/length_tokens"],
        "perplexity_policy": metrics["perplexity/policy"],
        "perplexity_sft": metrics["perplexity/ref"],
    }


def _draw(trainer: Trainer, config: ScratchConfig, folder: Path) -> None:
    """Write the curves, and answers to held-out prompts."""
    from mossrlhf.plotting import plot_history

    prompts, decode = trainer.eval_dataset, trainer.processing_class.batch_decode
    assert prompts is not None
    sides = {"SFT": True, "PPO-max": False}
    texts = [
        decode(trainer.answer(prompts, reference).completions(), skip_special_tokens=True)
        for reference in sides.values()
    ]
    samples = [
        {"prompt": record["prompt"][-1]["content"], "answers": dict(zip(sides, both, strict=True))}
        for record, *both in zip(prompts, *texts, strict=True)
    ]
    samples_page("Samples", samples, folder / "samples.md", count=12, seed=config.seed)
    plot_history(trainer.history, folder / "curves.png")
