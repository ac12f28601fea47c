r"""Train a reward model on preference pairs, and report its accuracy.

Without arguments: in the toy world, a minute or two, in outputs/reward_model:

    python examples/train_reward_model.py

With your own SFT model and pairs (JSON, JSONL or a hub name, in any of
the formats that `mossrlhf.data` reads), alone or under `accelerate launch`:

    python examples/train_reward_model.py --model_name_or_path path/to/sft \
        --dataset pairs.jsonl --lm_coef 1 [--lora_r 16]

With Part II's methods (arXiv 2401.06080) for noisy labels: an ensemble first
measures the strength of every preference, and writes strength.json:

    python examples/train_reward_model.py ... --ensemble 6 --flip --margin
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from support.options import option_parser, read_options
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from mossrlhf import (
    AdaptiveMargin,
    FlipLabels,
    PreferenceStrength,
    RankingLoss,
    RewardModel,
    RewardTrainer,
    SmoothLabels,
    ToyWorld,
)
from mossrlhf.data import PairCollator, load_pairs, set_dialogue_template


@dataclass(frozen=True)
class Inputs:
    """Model and data.

    Args:
        model_name_or_path: the SFT model, a folder or hub name; without it, the toy world.
        dataset: preference pairs, a JSON or JSONL file or a hub name.
        held_out: number of pairs, the last ones, that are kept for the report.
        skip_bad: whether to skip unusable records with a warning, instead of an error.
        lang: the dialogue template of the tokenizer, "en" or "zh".
        output_dir: folder of model, tokenizer, reward_report.json and reward_report.png.
    """

    _argument_group_name = "model and data"

    model_name_or_path: str | None = None
    dataset: str | None = None
    held_out: int = 300
    skip_bad: bool = False
    lang: str | None = None
    output_dir: str = "outputs/reward_model"


@dataclass(frozen=True)
class Training:
    """Settings of the training.

    Args:
        learning_rate: peak learning rate; P1, at 7B: 5e-6.
        epochs: epochs over the pairs.
        batch_size: pairs per optimizer step and process.
        max_length: tokens of prompt and response; none for no limit.
        lm_coef: β of the language-model loss on chosen responses; P1: 1.
        centering_coef: λ of (r_w + r_l)².
        lora_r: rank of LoRA adapters on all linear layers; without it all weights are trained.
        bf16: whether to compute in bfloat16.
        seed: of the order of the pairs.
    """

    _argument_group_name = "training"

    learning_rate: float = 5e-6
    epochs: float = 1.0
    batch_size: int = 16
    max_length: int | None = 1024
    lm_coef: float | None = None
    centering_coef: float | None = None
    lora_r: int | None = None
    bf16: bool = False
    seed: int = 0


@dataclass(frozen=True)
class PartTwo:
    """Methods for noisy labels.

    Args:
        ensemble: number of reward models that measure the strength of every preference.
        folds: folds of the pairs; each model is evaluated on the one it was not trained on. 1: all
            models on all pairs, as in P2.
        flip: whether to flip the labels that the ensemble contradicts.
        smooth: whether to smooth each label by its probability of being wrong.
        margin: whether to use the strength as the margin of the loss.
    """

    _argument_group_name = "Part II"

    ensemble: int | None = None
    folds: int = 2
    flip: bool = False
    smooth: bool = False
    margin: bool = False


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Parse the command line, train, write model and report."""
    defaults = (Inputs(), Training(), PartTwo())
    given = read_options(option_parser(str(__doc__), defaults), argv or sys.argv[1:])
    inputs, training, part_two = (
        replace(part, **{f.name: given[f.name] for f in fields(part) if f.name in given})
        for part in defaults
    )
    methods = chosen_methods(part_two)
    try:
        model, tokenizer, pairs, training = load(inputs, training)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if not 0 < inputs.held_out < len(pairs):
        sys.exit(
            f"--held_out: got {inputs.held_out} of {len(pairs)} pairs, expected some of them, and "
            "fewer than there are"
        )
    held_out = pairs[len(pairs) - inputs.held_out :]
    records: Sequence[Mapping[str, Any]] = pairs[: len(pairs) - inputs.held_out]
    if part_two.ensemble is not None:
        records = with_strength(model, tokenizer, records, inputs, training, part_two)
    for method in methods:
        records = method(records)
    trainer = make_trainer(model, tokenizer, records, held_out, inputs, training)
    trainer.train()
    metrics: dict[str, float] = trainer.evaluate()
    report = trainer.report()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report.save(inputs.output_dir)
        print(f"\n{report}\nwritten to {inputs.output_dir}: the model, reward_report.json, .png")
    return metrics


def load(inputs: Inputs, training: Training) -> tuple[Any, Any, list[dict[str, Any]], Training]:
    """Load model, tokenizer and pairs, or make those of the toy world."""
    if inputs.model_name_or_path is None:
        if inputs.dataset is not None:
            sys.exit("--dataset: it needs a model to learn from it, --model_name_or_path")
        world = ToyWorld()
        torch.manual_seed(training.seed)
        model = transformers.LlamaForCausalLM(world.model_config())
        pairs = world.pairs(2000 + inputs.held_out, seed=training.seed)
        return model, world.tokenizer(), pairs, replace(training, learning_rate=1e-3)
    if inputs.dataset is None:
        sys.exit("--dataset: a JSON or JSONL file of preference pairs, or a hub name, is needed")
    tokenizer = AutoTokenizer.from_pretrained(inputs.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(inputs.model_name_or_path, dtype=torch.float32)
    if inputs.lang is not None and set_dialogue_template(tokenizer, inputs.lang):
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer, load_pairs(inputs.dataset, skip_bad=inputs.skip_bad), training


def chosen_methods(part_two: PartTwo) -> list[Any]:
    """Return the methods that were asked for, in the order they work in."""
    switches = {FlipLabels: part_two.flip, SmoothLabels: part_two.smooth}
    switches[AdaptiveMargin] = part_two.margin
    methods = [method() for method, on in switches.items() if on]
    if bool(methods) != (part_two.ensemble is not None):
        sys.exit("--ensemble: needed by --flip, --smooth and --margin, and of no use without one")
    models, folds = part_two.ensemble, part_two.folds
    if models is not None and (folds < 1 or models % folds or models < 2 * folds):
        sys.exit(
            f"--ensemble, --folds: got {models} and {folds}, expected 2, 3, … models to each fold"
        )
    return methods


def with_strength(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    inputs: Inputs,
    training: Training,
    part_two: PartTwo,
) -> list[dict[str, Any]]:
    """Measure the strength of every preference, and keep it beside the model."""

    def train(some: Sequence[Mapping[str, Any]], seed: int) -> RewardModel:
        trainer = make_trainer(model, tokenizer, some, None, inputs, replace(training, seed=seed))
        trainer.train()
        return trainer.reward_model

    collator = PairCollator(tokenizer, max_length=training.max_length)
    size = {"models": part_two.ensemble, "folds": part_two.folds}
    strength = PreferenceStrength.measure(train, records, collator, seed=training.seed, **size)
    Path(inputs.output_dir).mkdir(parents=True, exist_ok=True)
    strength.save(Path(inputs.output_dir) / "strength.json")
    against = (strength.mean < 0).double().mean().item()
    print(f"strength: the ensemble contradicts {against:.1%} of the labels")
    return strength.annotate(records)


def make_trainer(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    held_out: Any,
    inputs: Inputs,
    training: Training,
) -> RewardTrainer:
    """Put the parts together."""
    return RewardTrainer(
        RewardModel.from_language_model(model),
        TrainingArguments(
            output_dir=inputs.output_dir,
            learning_rate=training.learning_rate,
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch_size,
            per_device_eval_batch_size=2 * training.batch_size,
            warmup_steps=0.1,
            eval_strategy="no" if held_out is None else "steps",
            eval_steps=0.1,
            logging_steps=0.1,
            save_strategy="no",
            report_to=[],
            bf16=training.bf16,
            seed=training.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        train_dataset=list(records),
        eval_dataset=held_out,
        data_collator=PairCollator(tokenizer, max_length=training.max_length),
        loss=RankingLoss(lm_coef=training.lm_coef, centering_coef=training.centering_coef),
        lm_head=None if training.lm_coef is None else model.get_output_embeddings(),
        margin_column="margin" if "margin" in records[0] else None,
        smoothing_column="label_smoothing" if "label_smoothing" in records[0] else None,
        peft_config=lora(training.lora_r),
    )


def lora(rank: int | None) -> Any:
    """LoRA on every linear layer, or None."""
    if rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


if __name__ == "__main__":
    main()
