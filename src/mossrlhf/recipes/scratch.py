"""From a file of preference pairs alone: tokenizer, language model, SFT, reward model, PPO-max.

The last pairs of the file are held out: neither the tokenizer nor any model ever learns from them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaForCausalLM

from mossrlhf import presets
from mossrlhf.checkpoint import no_progress_bars
from mossrlhf.drawing import require_matplotlib
from mossrlhf.metrics import rollout_metrics
from mossrlhf.models import RewardModel
from mossrlhf.plotting import plot_history
from mossrlhf.recipes.bookkeeping import Clock, clear_folder, versions
from mossrlhf.recipes.corpus import Corpus
from mossrlhf.recipes.from_pairs import ScratchConfig, read_corpus, train_judge, train_policy
from mossrlhf.recipes.report import Results, answer_texts, write_report
from mossrlhf.trainer import Trainer
from mossrlhf.version import __version__

__all__ = ["ScratchConfig", "main", "measure", "run_ppo"]


def main(config: ScratchConfig) -> dict[str, Any]:
    """Run the stages one after the other, and write the report.

    Ctrl-C in PPO ends it after its iteration; what there is by then is measured and written.
    Before PPO there is nothing to write but the models that are finished.

    Args:
        config: the file, and everything else.

    Returns:
        what ``summary.json`` holds; ``interrupted`` tells whether PPO ran to its end.

    Raises:
        ImportError: without matplotlib, before anything is trained.
        KeyboardInterrupt: where Ctrl-C came before PPO.

    Source: P1 §4 and §5, at a scale of minutes.
    """
    require_matplotlib()
    folder = Path(config.output_dir)
    clear_folder(folder, asdict(config))
    print(f"mossrlhf {__version__}: {config.file} from scratch, seed {config.seed}")
    print("(docs/metrics.md explains the columns of the tables)\n")
    clock = Clock()
    corpus = clock("corpus", read_corpus, config)
    sizes = {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    print(f"pairs          {sizes['train']} to learn from, {sizes['held_out']} held out")
    policy, sft, reward_model, judged = _models(corpus, config, folder, clock)
    results = _policy(corpus, policy, reward_model, config, folder, clock)
    summary = {
        "file": config.file,
        "seed": config.seed,
        "lang": corpus.lang,
        "interrupted": results.interrupted,
        "pairs": sizes,
        "sft": sft,
        "reward_model": judged,
        "runs": results.runs,
        "seconds": {name: round(value, 1) for name, value in clock.seconds.items()},
        "versions": versions(),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    write_report(
        results,
        corpus.held_out,
        folder,
        draw=lambda histories, path: plot_history(histories["ppo_max"], path),
        judge="the reward model of PPO",
        title=f"Samples: {Path(config.file).name}, seed {config.seed}",
        seed=config.seed,
    )
    print(f"{sum(clock.seconds.values()):.0f} seconds in all")
    return summary


def _models(
    corpus: Corpus, config: ScratchConfig, folder: Path, clock: Clock
) -> tuple[LlamaForCausalLM, dict[str, float], RewardModel, dict[str, float]]:
    """Train and save what stands before PPO, and say how good it is."""
    print("SFT model      ", end="", flush=True)
    policy, sft = clock("sft", train_policy, corpus, config)
    print(f"perplexity of held-out chosen responses {sft['perplexity']:.1f}")
    _save(policy, corpus, folder / "sft")
    print("reward model   ", end="", flush=True)
    reward_model, judged = clock("reward_model", train_judge, corpus, policy, config)
    accuracy, error = judged["accuracy"], judged["standard_error"]
    print(f"right on {accuracy:.1%} ± {error:.1%} of the held-out pairs")
    _save(reward_model, corpus, folder / "reward_model")
    return policy, sft, reward_model, judged


def _save(model: LlamaForCausalLM | RewardModel, corpus: Corpus, folder: Path) -> None:
    with no_progress_bars():
        model.save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)


def _policy(
    corpus: Corpus,
    policy: LlamaForCausalLM,
    reward_model: RewardModel,
    config: ScratchConfig,
    folder: Path,
    clock: Clock,
) -> Results:
    """Run PPO-max, save and measure what comes of it."""
    found = Results(asked={"ppo_max": config.steps}, saved=["sft/", "reward_model/"])
    print(f"\nppo_max (learning rate {config.learning_rate:g})")
    try:
        trainer = clock("ppo_max", run_ppo, corpus, policy, reward_model, config)
        found.interrupted = trainer.run.interrupted
        if found.interrupted:
            print("Measuring what there is; Ctrl-C skips that.")
        found.histories["ppo_max"] = trainer.history
        found.runs["ppo_max"] = done = {"steps": trainer.run.state.global_step}
        trainer.save_model(folder)
        found.saved += ["policy/", "critic/"]
        figures = clock("evaluation", measure, trainer)
        found.runs = {**figures, "ppo_max": {**done, **figures["ppo_max"]}}
        found.answers["SFT"] = answer_texts(trainer, reference=True)
        found.answers["ppo_max"] = answer_texts(trainer)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


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
    answered = _figures(before, "ref")
    del answered["perplexity_policy"]  # would be the trained policy's, of answers not its own
    return {
        "SFT": {**answered, "kl_per_sequence": 0.0},
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
