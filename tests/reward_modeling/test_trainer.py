"""`RewardTrainer`: its sums against formulas, resuming and saving, adapters, bad input."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from preferences import WORDS, language_model, log_likelihood, pairs, reward_model, reward_of
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from mossrlhf.data import PairCollator, TokenBatches
from mossrlhf.models import RewardModel, is_adapted, merged_state_dict
from mossrlhf.models.backbone import can_pack, is_causal
from mossrlhf.reward_modeling import trainer as trainer_module
from mossrlhf.reward_modeling.pairs import RankingLoss
from mossrlhf.reward_modeling.trainer import RewardTrainer

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained_with_lm_term(tokenizer, args, count, **options):
    trainer = RewardTrainer(
        reward_model(), args, processing_class=tokenizer, train_dataset=pairs(count),
        loss=RankingLoss(lm_coef=0.5), lm_head=language_model().lm_head, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def with_adapters(tokenizer, arguments, records, model=None, **options):
    args = arguments(
        learning_rate=0.05, per_device_train_batch_size=4, num_train_epochs=1, **options
    )
    return RewardTrainer(
        model or reward_model(), args, processing_class=tokenizer,
        train_dataset=records, eval_dataset=records, peft_config=LORA,
    )  # fmt: skip


# Loss, steps, evaluation


@pytest.mark.parametrize("beta", [None, 0.5])
def test_loss_of_a_batch_matches_a_computation_by_hand(tokenizer, arguments, beta):
    lm, model, records = language_model(), reward_model(), pairs(4, margin=0.25)
    chosen, rejected = (
        np.array([reward_of(model, tokenizer, r, side) for r in records])
        for side in ("chosen", "rejected")
    )
    expected = np.log1p(np.exp(-(chosen - rejected - 0.25))).mean()
    if beta is not None:
        likelihoods, lengths = zip(
            *(log_likelihood(lm, tokenizer, r) for r in records), strict=True
        )
        expected -= beta * sum(likelihoods) / sum(lengths)
    trainer = RewardTrainer(
        model, arguments(), processing_class=tokenizer, loss=RankingLoss(lm_coef=beta),
        lm_head=None if beta is None else lm.lm_head, margin_column="margin",
    )  # fmt: skip
    batch = trainer.data_collator(records)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_gradient_accumulation_changes_neither_steps_nor_logs(tokenizer, arguments):
    """10 pairs per step, in one batch or in batches of 3 + 3 + 3 + 1."""
    common = dict(
        num_train_epochs=4, learning_rate=0.1, optim="sgd", logging_strategy="steps",
        logging_steps=2,
    )  # fmt: skip
    whole = trained_with_lm_term(tokenizer, arguments(per_device_train_batch_size=10, **common), 10)
    split = arguments(per_device_train_batch_size=3, gradient_accumulation_steps=4, **common)
    parts = trained_with_lm_term(tokenizer, split, 10)
    assert whole.state.global_step == parts.state.global_step == 4
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-5, atol=1e-6)
    names = ("loss", "ranking_loss", "lm_loss", "accuracy", "margin", "grad_norm")
    *logs, summary = whole.state.log_history
    assert len(logs) == 2
    for one, other in zip(logs, parts.state.log_history, strict=False):
        assert [one[name] for name in names] == pytest.approx([other[n] for n in names], rel=1e-4)
        assert one["loss"] == pytest.approx(one["ranking_loss"] + 0.5 * one["lm_loss"], rel=1e-5)
        assert 0 < one["accuracy"] <= 1
    assert "accuracy" not in summary  # of the whole run


def test_step_follows_the_gradient_of_the_mean_over_pairs(tokenizer, arguments):
    model, records = reward_model(), pairs(6)
    twin = copy.deepcopy(model)
    args = arguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    RewardTrainer(model, args, processing_class=tokenizer, train_dataset=records).train()
    batch = PairCollator(tokenizer)(records)
    chosen, rejected = twin(batch["input_ids"], batch["attention_mask"]).chunk(2)
    torch.log1p(torch.exp(rejected - chosen)).mean().backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other - 0.1 * other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [3, 7])
def test_evaluation_metrics_do_not_depend_on_the_batch_size(tokenizer, arguments, size):
    lm, model, records = language_model(), reward_model(), pairs(7)
    trainer = RewardTrainer(
        model, arguments(per_device_eval_batch_size=size), processing_class=tokenizer,
        eval_dataset=records, loss=RankingLoss(lm_coef=1.0), lm_head=lm.lm_head,
    )  # fmt: skip
    rows = [
        [reward_of(model, tokenizer, r, side) for side in ("chosen", "rejected")] for r in records
    ]
    chosen, rejected = np.array(rows).T
    likelihoods, lengths = zip(*(log_likelihood(lm, tokenizer, r) for r in records), strict=True)
    metrics = trainer.evaluate()
    ranking = np.log1p(np.exp(rejected - chosen)).mean()
    expected = {
        "eval_accuracy": (chosen > rejected).mean(),
        "eval_margin": (chosen - rejected).mean(),
        "eval_ranking_loss": ranking,
        "eval_lm_loss": -sum(likelihoods) / sum(lengths),
        "eval_loss": ranking - sum(likelihoods) / sum(lengths),
        "eval_score_mean": np.concatenate([chosen, rejected]).mean(),
        "eval_score_std": np.concatenate([chosen, rejected]).std(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    prediction = trainer.predict(records)
    np.testing.assert_allclose(prediction.predictions, rows, atol=1e-4)
    assert prediction.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])


def test_evaluation_reports_several_sets_by_name(tokenizer, arguments):
    sets = {"one": pairs(3), "two": pairs(4, seed=1)}
    trainer = RewardTrainer(
        reward_model(head=False), arguments(), processing_class=tokenizer, eval_dataset=sets
    )
    metrics = trainer.evaluate()
    assert metrics["eval_one_accuracy"] == metrics["eval_two_accuracy"] == 0.5
    assert metrics["eval_one_loss"] == pytest.approx(np.log(2))
    assert "eval_one_lm_loss" not in metrics


# Training, saving, resuming


def test_training_learns_a_trivial_preference(tokenizer, arguments):
    args = arguments(
        per_device_train_batch_size=16, num_train_epochs=3, learning_rate=3e-3, max_grad_norm=1.0
    )
    trainer = RewardTrainer(
        reward_model(head=False), args, processing_class=tokenizer,
        train_dataset=pairs(160), eval_dataset=pairs(100, seed=1),
    )  # fmt: skip
    assert trainer.evaluate()["eval_accuracy"] == 0.5
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] > 0.9
    assert metrics["eval_loss"] < 0.5
    assert metrics["eval_margin"] > 0.5


def test_resumed_training_equals_uninterrupted_training(tokenizer, arguments, tmp_path):
    common = dict(
        per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    straight = trained_with_lm_term(
        tokenizer, arguments(output_dir=str(tmp_path / "straight"), **common), 12
    )
    assert straight.state.global_step == 6
    fresh = RewardTrainer(
        reward_model(seed=9), arguments(output_dir=str(tmp_path / "resumed"), **common),
        processing_class=tokenizer, train_dataset=pairs(12), loss=RankingLoss(lm_coef=0.5),
        lm_head=language_model(seed=9).lm_head,
    )  # fmt: skip
    before = weights(fresh).clone()
    fresh.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert fresh.state.global_step == 6
    assert (weights(fresh) - before).abs().max() > 0.1
    torch.testing.assert_close(weights(fresh), weights(straight), rtol=0, atol=0)


def test_training_ends_with_the_best_checkpoint(tokenizer, arguments, tmp_path):
    """The best by spread of the rewards is the first, since training widens it."""
    args = arguments(
        per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-2,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score_std", greater_is_better=False,
    )  # fmt: skip
    trainer = trained_with_lm_term(tokenizer, args, 32, eval_dataset=pairs(5, seed=1))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    spreads = [row["eval_score_std"] for row in trainer.state.log_history if "eval_loss" in row]
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert spreads[0] < spreads[1]
    again = trainer.evaluate()
    assert again["eval_score_std"] == pytest.approx(spreads[0])
    assert again["eval_loss"] == pytest.approx(losses[0])  # the output head was loaded too


def test_resuming_refuses_a_checkpoint_without_a_weight(tokenizer, arguments, tmp_path):
    trainer = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    trainer.reward_model.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    state = load_file(weights)
    state.pop("score.weight")
    save_file(state, weights)
    with pytest.raises(ValueError, match="score"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "broken"))


def test_saved_model_loads_as_a_transformers_classifier(tokenizer, arguments, tmp_path):
    trainer = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer,
        loss=RankingLoss(lm_coef=1.0), lm_head=language_model().lm_head,
    )  # fmt: skip
    trainer.save_model(str(tmp_path / "saved"))
    records = pairs(4)
    expected = trainer.predict(records).predictions
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for column, side in enumerate(("chosen", "rejected")):
        texts = [f"{record['prompt']} {record[side]} </s>" for record in records]
        with torch.no_grad():
            logits = classifier(**saved(texts, padding=True, return_tensors="pt")).logits
        np.testing.assert_allclose(logits[:, 0], expected[:, column], atol=1e-4)
    trainer = RewardTrainer(tmp_path / "saved", arguments(), processing_class=saved)
    np.testing.assert_allclose(trainer.predict(records).predictions, expected, atol=1e-5)


def test_training_keeps_dataset_columns_and_argument_values(tokenizer, arguments):
    datasets = pytest.importorskip("datasets")
    args = arguments(per_device_train_batch_size=4, num_train_epochs=1)
    before = args.to_dict()
    trainer = RewardTrainer(
        reward_model(), args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(pairs(8, margin=1.0, source="somewhere")),
        eval_dataset=datasets.Dataset.from_list(pairs(4, margin=100.0)), margin_column="margin",
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 50  # the margin reached the loss
    assert args.remove_unused_columns
    assert args.to_dict() == before


def test_the_code_of_the_documentation_runs(root, tmp_path, monkeypatch):
    text = (root / "docs" / "reward_modeling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["metrics"]["eval_loss"] > 0
    assert len(blocks) == 6


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_changes_no_number(tokenizer, arguments, on):
    options = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in options else "gradient_checkpointing"  # transformers 5.17
    model, twin, records = reward_model(), reward_model(), pairs(4)
    args = arguments(
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",
        **{name: on},
    )
    is_causal(model.backbone), can_pack(model.backbone)  # which run the model
    calls = []
    layer = model.backbone.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    RewardTrainer(model, args, processing_class=tokenizer, train_dataset=records).train()
    assert len(calls) == (2 if on else 1)  # once more in the backward pass
    plain = arguments(
        per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.1, optim="sgd"
    )
    RewardTrainer(twin, plain, processing_class=tokenizer, train_dataset=records).train()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


def test_trained_parameters_become_float32(tokenizer, arguments):
    model = reward_model().bfloat16()
    model.backbone.embed_tokens.weight.requires_grad_(False)
    head = language_model().lm_head.bfloat16()
    trainer = RewardTrainer(
        model, arguments(), processing_class=tokenizer, loss=RankingLoss(lm_coef=1.0), lm_head=head
    )
    trained = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert model.backbone.embed_tokens.weight.dtype == torch.bfloat16
    assert head.weight.dtype == torch.bfloat16
    assert trainer.model.lm_head is not head  # the language model keeps its own


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "good"},
        {"chosen": "good", "rejected": "bad"},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
    ],
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_records_without_a_pair_are_refused_before_training(tokenizer, arguments, record, name):
    with pytest.raises(ValueError, match=f"{name}.*chosen.*load_pairs"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, **{name: [record]})


def test_prompts_without_room_for_a_response_are_refused_before_training(tokenizer, arguments):
    records = [*pairs(5), {"prompt": "a " * 9, "chosen": "good", "rejected": "bad"}]

    def start(length, **datasets):
        return RewardTrainer(
            reward_model(), arguments(), processing_class=tokenizer, **datasets,
            data_collator=PairCollator(tokenizer, max_length=length),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"train_dataset: 1 of .* record 5 takes 9 .* at most 8"):
        start(9, train_dataset=records)
    with pytest.raises(ValueError, match="eval_dataset: 1 of its longest prompts"):
        start(9, train_dataset=pairs(5), eval_dataset={"one": pairs(2), "two": records})
    start(10, train_dataset=records)
    start(None, train_dataset=records)


def test_evaluation_pairs_need_no_margins(tokenizer, arguments):
    trainer = RewardTrainer(
        reward_model(), arguments(per_device_train_batch_size=2, num_train_epochs=1),
        processing_class=tokenizer, train_dataset=pairs(4, lead=2, alpha=0.1),
        eval_dataset=pairs(3), margin_column="lead", smoothing_column="alpha",
    )  # fmt: skip
    trainer.train()
    plain = RewardTrainer(trainer.reward_model, arguments(), processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate(pairs(3))["eval_loss"]
    assert (
        trainer.evaluate(pairs(3, lead=None, alpha=None))["eval_loss"]
        == plain.evaluate(pairs(3))["eval_loss"]
    )
    assert trainer.predict(pairs(2)).predictions.shape == (2, 2)
    assert trainer.evaluate(pairs(3, lead=5))["eval_loss"] > trainer.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="margin_column: a record has no 'lead'"):
        RewardTrainer(
            reward_model(), arguments(), processing_class=tokenizer, train_dataset=pairs(4),
            margin_column="lead",
        )  # fmt: skip


def test_token_batches_cover_every_pair_once_per_epoch(tokenizer, arguments):
    records = pairs(23)
    seen = []

    class Watched(PairCollator):
        def __call__(self, records):
            seen.append(len(records))
            return super().__call__(records)

    trainer = RewardTrainer(
        reward_model(), arguments(num_train_epochs=2), processing_class=tokenizer,
        train_dataset=records, data_collator=Watched(tokenizer),
        batches=TokenBatches(max_tokens=200, min_pairs=2, max_pairs=8),
    )  # fmt: skip
    steps = len(trainer.get_train_dataloader())
    seen.clear()
    trainer.train()
    epochs = [size for size in seen if size > 1]  # single records are collated for their lengths
    assert trainer.state.global_step == 2 * steps == len(epochs)
    assert sum(epochs) == 2 * 23
    assert len({*epochs}) > 1
    trainer.train_dataset = iter(records)
    with pytest.raises(ValueError, match="expected a dataset with a length"):
        trainer.get_train_dataloader()


def test_resumed_training_with_token_batches_equals_uninterrupted_training(
    tokenizer, arguments, tmp_path
):
    def trainer(name, **options):
        return RewardTrainer(
            reward_model(),
            arguments(
                learning_rate=0.01, num_train_epochs=3, save_strategy="steps", save_steps=1,
                output_dir=str(tmp_path / name), **options,
            ),
            processing_class=tokenizer, train_dataset=pairs(23),
            batches=TokenBatches(max_tokens=200, min_pairs=2, max_pairs=8),
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    per_epoch = whole.state.global_step // 3
    for step in (2, per_epoch, per_epoch + 2):
        resumed = trainer(f"from-{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(weights(resumed), weights(whole)), step


# Bad input


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tokenizer, arguments):
    small = reward_model(vocab_size=len(WORDS) - 1)
    with pytest.raises(ValueError, match=r"13 tokens.*only 12.*resize_token_embeddings"):
        RewardTrainer(small, arguments(), processing_class=tokenizer)
    small.backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    RewardTrainer(small, arguments(), processing_class=tokenizer)


def test_models_and_heads_that_do_not_fit_are_refused(tokenizer, arguments):
    lm = language_model()
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*from_language_model"):
        RewardTrainer(lm, arguments(), processing_class=tokenizer)
    with pytest.raises(ValueError, match="get_output_embeddings"):
        RewardTrainer(
            reward_model(), arguments(), processing_class=tokenizer, loss=RankingLoss(lm_coef=1.0)
        )
    with pytest.raises(ValueError, match="lm_coef is None"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, lm_head=lm.lm_head)
    with pytest.raises(ValueError, match=r"RankingLoss\(label_smoothing=\)"):
        RewardTrainer(
            reward_model(), arguments(label_smoothing_factor=0.1), processing_class=tokenizer
        )


def test_a_non_finite_reward_stops_the_step(tokenizer, arguments):
    model = reward_model()
    args = arguments(per_device_train_batch_size=2, num_train_epochs=1)
    trainer = RewardTrainer(model, args, processing_class=tokenizer, train_dataset=pairs(2))
    with torch.no_grad():
        model.backbone.embed_tokens.weight[WORDS.index("bad")] = float("nan")
    before = model.score.weight.clone()
    with pytest.raises(FloatingPointError, match=r"2 pairs are not finite.*good"):
        trainer.train()
    assert torch.equal(model.score.weight, before)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("train_dataset", "pairs.jsonl", r"train_dataset: .*load_pairs\('pairs.jsonl'\)"),
        ("train_dataset", ["one"], "train_dataset: record 0 is of type str, expected a dict"),
        ("train_dataset", {"train": pairs(2)}, "train_dataset: .*pick one of its parts"),
        ("eval_dataset", {"one": "x.json"}, "eval_dataset: .*read the file"),
    ],
)
def test_datasets_of_other_types_are_refused(tokenizer, arguments, argument, value, message):
    given = {"args": arguments(), argument: value}
    with pytest.raises(TypeError, match=message):
        RewardTrainer(reward_model(), processing_class=tokenizer, **given)


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_empty_datasets_are_refused(tokenizer, arguments, argument):
    with pytest.raises(ValueError, match=f"{argument}: it is empty"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, **{argument: []})


def test_arguments_of_other_types_are_refused():
    trainer_module._check_arguments(None, None, TokenBatches())
    for place, (value, name) in enumerate([({}, "args"), ("ranking", "loss"), (4096, "batches")]):
        given: list = [None, None, None]
        given[place] = value
        with pytest.raises(TypeError, match=f"{name}: got {value!r}, expected a "):
            trainer_module._check_arguments(*given)


# Adapters


def test_adapters_and_value_head_are_trained_and_the_base_is_not(tokenizer, arguments):
    model = reward_model()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    trainer = with_adapters(tokenizer, arguments, pairs(16), model=model)
    trainer.train()
    assert is_adapted(model)
    after = model.state_dict()
    for name, weight in after.items():
        base = name.replace(".base_layer", "")
        if "lora_" in name or name.startswith("score"):
            assert name not in before or not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[base]), name
    assert any("lora_B" in name and w.abs().sum() > 0 for name, w in after.items())
    assert LORA.modules_to_save is None  # the user's own object


def test_saved_adapters_load_merged_and_by_peft(tokenizer, arguments, tmp_path):
    records = pairs(8)
    trainer = with_adapters(tokenizer, arguments, records)
    trainer.train()
    rewards = torch.tensor(trainer.predict(records).predictions)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    again = with_adapters(tokenizer, arguments, records, model=RewardModel.from_pretrained(folder))
    merged = torch.tensor(again.predict(records).predictions)
    torch.testing.assert_close(merged, rewards, atol=1e-5, rtol=1e-5)
    assert is_adapted(trainer.reward_model)  # it can be trained further

    # PEFT loads the adapter over the base.
    reward_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    batch = trainer.data_collator(records)
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask).logits.view(-1, 2)
    torch.testing.assert_close(found, rewards, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["fsdp", "zero3"])
def test_adapters_are_refused_with_sharded_weights(tokenizer, arguments, monkeypatch, by):
    begin = RewardTrainer.create_accelerator_and_postprocess

    def split(self):
        begin(self)
        self.is_fsdp_enabled = True

    if by == "fsdp":
        monkeypatch.setattr(RewardTrainer, "create_accelerator_and_postprocess", split)
    else:
        monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"peft_config: .*FSDP and DeepSpeed's stage 3 shard them"):
        with_adapters(tokenizer, arguments, pairs(4))


def test_merging_does_not_change_the_model(tokenizer, arguments):
    trainer = with_adapters(tokenizer, arguments, pairs(8))
    trainer.train()
    before = {name: w.clone() for name, w in trainer.reward_model.state_dict().items()}
    plain = reward_model()
    plain.load_state_dict(merged_state_dict(trainer.reward_model))
    after = trainer.reward_model.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())


def test_resumed_training_with_adapters_equals_uninterrupted_training(
    tokenizer, arguments, tmp_path
):
    options = dict(save_strategy="steps", save_steps=2, seed=3)
    whole = with_adapters(
        tokenizer, arguments, pairs(16), **options, output_dir=str(tmp_path / "a")
    )
    whole.train()
    resumed = with_adapters(
        tokenizer, arguments, pairs(16), **options, output_dir=str(tmp_path / "b")
    )
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()  # adapters and head only
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = whole.reward_model.state_dict()
    for name, weight in resumed.reward_model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_adapters_on_adapters_and_modules_to_save_are_refused(tokenizer, arguments):
    model = with_adapters(tokenizer, arguments, pairs(4)).reward_model
    with pytest.raises(ValueError, match="adapters inside already"):
        with_adapters(tokenizer, arguments, pairs(4), model=model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"modules_to_save=.*embed_tokens"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, peft_config=config)


def test_resuming_refuses_a_checkpoint_of_other_adapters(tokenizer, arguments, tmp_path):
    with_adapters(tokenizer, arguments, pairs(4)).save_model(str(tmp_path / "saved"))
    config = LoraConfig(r=4, target_modules=["k_proj"])
    other = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer, train_dataset=pairs(4),
        peft_config=config,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model's adapters differ in"):
        other.train(resume_from_checkpoint=str(tmp_path / "saved"))


def test_disable_dropout_makes_the_loss_deterministic(tokenizer, arguments):
    model = RewardModel.from_language_model(language_model(attention_dropout=0.5))
    torch.nn.init.normal_(model.score.weight)
    records = pairs(4)
    for disabled in (False, True):
        trainer = RewardTrainer(
            model, arguments(), processing_class=tokenizer, train_dataset=records,
            disable_dropout=disabled,
        )  # fmt: skip
        batch = trainer.data_collator(records)
        trainer.model.train()
        losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(3)}
        assert (len(losses) == 1) is disabled


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_bias=True), "peft_config: these adapters cannot be merged"),
        (dict(trainable_token_indices=[1]), "peft_config: got trainable_token_indices"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_before_training(
    tokenizer, arguments, options, message
):
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=message):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, peft_config=config)
