"""What preference pairs alone are good for: a tokenizer, an SFT model and a reward model."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mossrlhf.data import PairCollator, SFTCollator, load_pairs
from mossrlhf.models import RewardModel, language_model_loss
from mossrlhf.recipes.bookkeeping import say
from mossrlhf.recipes.corpus import Corpus, Record, language_records, make_corpus
from mossrlhf.recipes.stages import fine_tune, train_reward_model


@dataclass(frozen=True)
class Pace:
    """How long and how fast a stage before PPO learns.

    Args:
        epochs: over its records.
        learning_rate: at the peak; it falls to 0.
    """

    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class ScratchConfig:
    """What is trained, on what, how large and for how long.

    The numbers were chosen on lines 1 to 1600 of 1900 of HH-RLHF's harmless-base; all are ours.

    Args:
        file: preference pairs, in any format that `mossrlhf.data.load_pairs` reads.
        lang: "en" or "zh", for the dialogue template; None to look at the text.
        seed: of models, orders and samples.
        output_dir: where results go.
        held_out: pairs at the end of the file to measure on, a sixth of the file at most.
        vocabulary: tokens.
        hidden_size: D of the Llama.
        layers: of it.
        language_length: tokens of a dialogue that the language model reads.
        pair_length: tokens of prompt and response that the reward model reads.
        turn_length: tokens of the last human turn; of a longer one the end is kept.
        language: pace over all training dialogues, before SFT.
        sft: over the chosen responses.
        reward: over the training pairs.
        response_length: most tokens of a response in PPO.
        rollout_size: responses of a PPO iteration.
        steps: PPO iterations.
        critic_steps: iterations in which the critic alone learns, before that.
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


def read_corpus(config: ScratchConfig) -> Corpus:
    """Read the pairs of a file; unusable ones are left out, and a line on the console counts them.

    Args:
        config: the file, the number held out, the lengths.

    Source: ours.
    """
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        pairs = load_pairs(config.file, skip_bad=True)
    for note in notes:
        say(str(note.message))
    return make_corpus(
        pairs, config.held_out, config.vocabulary, config.turn_length, lang=config.lang
    )


def train_policy(
    corpus: Corpus, config: ScratchConfig
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train a language model on all training dialogues, then on the chosen responses.

    Args:
        corpus: its training part is learned from, its held-out part measured on.
        config: sizes, epochs, learning rates.

    Returns:
        the SFT model; its ``perplexity`` on the held-out chosen responses.

    Source: P1 §4.1; the stage before it stands in for pre-training.
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
            _alike(records, collate),
            folder / name,
            max_length=length,
            **_options(pace, config.seed),
        )
    loss = _loss(model, [_chosen(pair) for pair in corpus.held_out], collate)
    return model, {"perplexity": exp(loss)}


def train_judge(
    corpus: Corpus,
    policy: LlamaForCausalLM,
    config: ScratchConfig,
    pairs: list[Record] | None = None,
    **trainer_options: Any,
) -> tuple[RewardModel, dict[str, float]]:
    """Train the reward model, from the SFT model's backbone.

    Args:
        corpus: its training pairs are learned from, the held-out ones measured on.
        policy: the SFT model, which is copied.
        config: epochs and learning rate.
        pairs: to learn from in place of all of the training pairs.
        trainer_options: of `RewardTrainer`: its loss, columns of margins and α.

    Returns:
        the reward model; its ``accuracy`` on the held-out pairs and the binomial
        ``standard_error`` of it, ``loss``, ``margin``, ``score_mean`` and ``score_std``.

    Source: P1 §4.2.
    """
    collate = PairCollator(corpus.tokenizer, max_length=config.pair_length)
    model, metrics = train_reward_model(
        policy,
        corpus.tokenizer,
        _alike(corpus.train if pairs is None else pairs, collate),
        _alike(corpus.held_out, collate),
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


def _alike(records: list[Record], collate: Callable[..., Mapping[str, Tensor]]) -> list[Record]:
    """Give records the column whose length transformers groups them by."""
    return [{**record, "input_ids": collate([record])["input_ids"][0]} for record in records]


@torch.no_grad()
def _loss(model: LlamaForCausalLM, records: list[Record], collate: SFTCollator) -> float:
    """Return the mean loss over the tokens of responses, nats."""
    total, count = 0.0, 0
    for start in range(0, len(records), 32):
        loss, tokens = language_model_loss(model, collate(records[start : start + 32]))
        total, count = total + float(loss), count + int(tokens)
    return total / count
