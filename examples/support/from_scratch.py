"""Preference pairs to PPO-max: train tokenizer, language model, SFT model, reward model, policy.

The last pairs of the file are held out: neither the tokenizer nor any model learns from them.
"""

import textwrap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf import Trainer, __version__, presets
from mossrlhf.data import PairCollator, SFTCollator, load_pairs
from mossrlhf.demo import (
    Results,
    clear_folder,
    fine_tune,
    measure,
    save_model,
    timed,
    train_all,
    train_reward_model,
    write_report,
)
from mossrlhf.models import RewardModel, language_model_loss
from mossrlhf.plotting import plot_history, require_matplotlib
from support.corpus import Corpus, Record, language_records, make_corpus


@dataclass(frozen=True)
class Pace:
    """Epochs and learning rate of a stage before PPO.

    Args:
        epochs: epochs over its records.
        learning_rate: peak learning rate; it decays to 0.
    """

    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class ScratchConfig:
    """File, sizes and learning rates, chosen on lines 1 to 1600 of 1900 of HH-RLHF's harmless-base.

    Args:
        file: preference pairs, in any format that `mossrlhf.data.load_pairs` reads.
        lang: "en" or "zh", for the dialogue template; None to detect it.
        seed: of models, orders and samples.
        output_dir: folder of the results.
        held_out: pairs at the end of the file to evaluate on, a sixth of the file at most.
        vocabulary: number of tokens.
        hidden_size: D of the Llama.
        layers: number of layers of the Llama.
        language_length: longest dialogue for the language model, in tokens.
        pair_length: longest prompt and response for the reward model, in tokens.
        turn_length: tokens of the last human turn; a longer one loses its beginning.
        language: pace over all training dialogues, before SFT.
        sft: pace over the chosen responses.
        reward: pace over the training pairs.
        response_length: longest response in PPO, in tokens.
        rollout_size: responses per PPO iteration.
        steps: PPO iterations.
        critic_steps: iterations of critic warm-up before that.
        learning_rate: of the policy in PPO.
        critic_learning_rate: of the critic in PPO.
    """

    file: str
    lang: str | None = None
    seed: int = 0
    output_dir: str = "outputs/scratch"
    held_out: int = 300
    vocabulary: int = 2048
    hidden_size: int = 128
    layers: int = 4
    language_length: int = 256
    pair_length: int = 128
    turn_length: int = 64
    language: Pace = Pace(5, 3e-3)
    sft: Pace = Pace(1, 3e-4)
    reward: Pace = Pace(2, 3e-4)
    response_length: int = 48
    rollout_size: int = 64
    steps: int = 24
    critic_steps: int = 10
    learning_rate: float = 1e-4
    critic_learning_rate: float = 3e-4


def main(config: ScratchConfig) -> dict[str, Any]:
    """Train all stages, and write the report; return ``summary.json``.

    Ctrl-C during PPO ends it after its iteration; the results so far are evaluated and written.
    Before PPO it leaves only the finished models.

    Raises:
        ImportError: without matplotlib, before anything is trained.
        KeyboardInterrupt: at Ctrl-C before PPO. Its message is the stage.
    """
    require_matplotlib()
    folder = Path(config.output_dir)
    clear_folder(folder, asdict(config))
    print(f"mossrlhf {__version__}: {config.file} from scratch, seed {config.seed}")
    print("(docs/metrics.md explains the columns of the tables)\n")
    results = Results(planned={"ppo_max": config.steps}, saved=["sft/", "reward_model/"])
    with timed("corpus", results.seconds):
        corpus = read_corpus(config)
    sizes = {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    print(f"pairs          {sizes['train']} for training, {sizes['held_out']} held out")
    policy, reward_model, found = prepare(corpus, config, folder, results.seconds)
    trainer = make_trainer(corpus, policy, reward_model, config)
    with timed("evaluation", results.seconds):
        before = measure(trainer)  # the policy still is the SFT model
    names = ("reward_score", "response_length", "perplexity_sft")
    results.runs["SFT"] = {**{name: before[name] for name in names}, "kl_per_sequence": 0.0}
    train_all({"ppo_max": lambda: trainer}, corpus.held_out, results, folder)
    facts = {"file": config.file, "seed": config.seed, "lang": corpus.lang, "pairs": sizes}
    return write_report(
        results,
        {**facts, **found},
        corpus.held_out,
        folder,
        plot=lambda histories, path: plot_history(histories["ppo_max"], path),
        # There is no second reward model: wins only show that PPO optimizes this one.
        winner_by="the reward model of PPO",
        title=f"Samples: {Path(config.file).name}, seed {config.seed}",
    )


def read_corpus(config: ScratchConfig) -> Corpus:
    """Read the file without unusable pairs, and print their number."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        pairs = load_pairs(config.file, skip_bad=True)
    for note in notes:
        text = str(note.message)
        print(textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False))
    return make_corpus(
        pairs, config.held_out, config.vocabulary, config.turn_length, lang=config.lang
    )


def prepare(
    corpus: Corpus, config: ScratchConfig, folder: Path, seconds: dict[str, float]
) -> tuple[LlamaForCausalLM, RewardModel, dict[str, Any]]:
    """Train and save SFT model and reward model; return them and their quality."""
    print("SFT model      ", end="", flush=True)
    with timed("sft", seconds):
        policy, sft = train_sft(corpus, config)
    print(f"perplexity of held-out chosen responses {sft['perplexity']:.1f}")
    save_model(policy, corpus.tokenizer, folder / "sft")
    print("reward model   ", end="", flush=True)
    with timed("reward_model", seconds):
        reward_model, found = train_reward(corpus, policy, config)
    accuracy, error = found["accuracy"], found["standard_error"]
    print(f"right on {accuracy:.1%} ± {error:.1%} of the held-out pairs")
    save_model(reward_model, corpus.tokenizer, folder / "reward_model")
    return policy, reward_model, {"sft": sft, "reward_model": found}


def train_sft(corpus: Corpus, config: ScratchConfig) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train a language model on all training dialogues, then on the chosen responses.

    The first stage stands in for pre-training.

    Returns:
        the SFT model, and its ``perplexity`` on the held-out chosen responses.

    Source: P1 §4.1.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(_architecture(corpus, config))
    folder, length = Path(config.output_dir), config.language_length
    collate = SFTCollator(corpus.tokenizer, max_length=length)
    stages = (
        ("language", language_records(corpus, length), config.language),
        ("sft", [_chosen(pair) for pair in corpus.train], config.sft),
    )
    for name, records, pace in stages:
        fine_tune(
            model,
            corpus.tokenizer,
            _with_lengths(records, collate),
            folder / name,
            max_length=length,
            **_options(pace, config.seed),
        )
    loss = _loss(model, [_chosen(pair) for pair in corpus.held_out], collate)
    return model, {"perplexity": exp(loss)}


def train_reward(
    corpus: Corpus,
    policy: LlamaForCausalLM,
    config: ScratchConfig,
    pairs: list[Record] | None = None,
    **trainer_options: Any,
) -> tuple[RewardModel, dict[str, float]]:
    """Train the reward model, from a copy of the SFT model's backbone.

    Args:
        corpus: its training pairs are learned from, the held-out ones evaluated on.
        policy: the SFT model.
        config: epochs and learning rate.
        pairs: to learn from in place of all training pairs.
        trainer_options: of `RewardTrainer`: its loss, columns of margins and α.

    Returns:
        the reward model; its ``accuracy`` on the held-out pairs with the binomial
        ``standard_error``, ``loss``, ``margin``, ``score_mean`` and ``score_std``.

    Source: P1 §4.2.
    """
    collate = PairCollator(corpus.tokenizer, max_length=config.pair_length)
    model, metrics = train_reward_model(
        policy,
        corpus.tokenizer,
        _with_lengths(corpus.train if pairs is None else pairs, collate),
        _with_lengths(corpus.held_out, collate),
        Path(config.output_dir) / "reward",
        max_length=config.pair_length,
        trainer_options=trainer_options,
        **_options(config.reward, config.seed),
    )
    accuracy = metrics["accuracy"]
    error = sqrt(accuracy * (1 - accuracy) / len(corpus.held_out))
    names = ("loss", "margin", "score_mean", "score_std")
    figures = {name: metrics[name] for name in names}
    return model, {"accuracy": accuracy, "standard_error": error, **figures}


def make_trainer(
    corpus: Corpus, policy: LlamaForCausalLM, reward_model: RewardModel, config: ScratchConfig
) -> Trainer:
    """Return the trainer of PPO-max, P1 §5.4: it trains the SFT model in place."""
    return Trainer(
        policy,
        reward=reward_model,
        train_dataset=[{"prompt": pair["prompt"]} for pair in corpus.train],
        eval_dataset=[{"prompt": pair["prompt"]} for pair in corpus.held_out],
        processing_class=corpus.tokenizer,
        generation_config=GenerationConfig(max_new_tokens=config.response_length, do_sample=True),
        **presets.ppo_max(
            output_dir=str(Path(config.output_dir) / "ppo_max"),
            seed=config.seed,
            total_steps=config.steps,
            critic_pretrain_steps=config.critic_steps,
            rollout_size=config.rollout_size,
            minibatch_size=config.rollout_size // 4,
            learning_rate=config.learning_rate,
            critic_learning_rate=config.critic_learning_rate,
            max_prompt_length=config.pair_length - config.response_length,
        ),
    )


def _architecture(corpus: Corpus, config: ScratchConfig) -> LlamaConfig:
    heads = max(1, config.hidden_size // 32)
    return LlamaConfig(
        vocab_size=len(corpus.tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(config.language_length, config.pair_length),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=corpus.tokenizer.eos_token_id,
        pad_token_id=corpus.tokenizer.pad_token_id,
    )


def _options(pace: Pace, seed: int) -> dict[str, Any]:
    return {
        "learning_rate": pace.learning_rate,
        "num_train_epochs": pace.epochs,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "weight_decay": 0.1,
        "train_sampling_strategy": "group_by_length",
        "seed": seed,
    }


def _chosen(pair: Record) -> Record:
    return {"prompt": pair["prompt"], "response": pair["chosen"]}


def _with_lengths(
    records: list[Record], collate: Callable[..., Mapping[str, Tensor]]
) -> list[Record]:
    """Add the column whose length transformers groups records by."""
    return [{**record, "input_ids": collate([record])["input_ids"][0]} for record in records]


@torch.no_grad()
def _loss(model: LlamaForCausalLM, records: list[Record], collate: SFTCollator) -> float:
    """Return the mean loss over the tokens of responses, nats."""
    total, count = 0.0, 0
    for start in range(0, len(records), 32):
        loss, tokens = language_model_loss(model, collate(records[start : start + 32]))
        total, count = total + float(loss), count + int(tokens)
    return total / count
