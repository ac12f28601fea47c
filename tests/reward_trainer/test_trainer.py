"""`RewardTrainer`: the loss against formulas by hand, the trainer against itself and others."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from preferences import WORDS, language_model, pairs, reward_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from mossrlhf.data import PairCollator, TokenBatches
from mossrlhf.models.backbone import can_pack, is_causal
from mossrlhf.reward_trainer import PairModel, PairScores, RankingLoss, RewardTrainer, storage
from mossrlhf.reward_trainer.pairs import PairRows
from mossrlhf.reward_trainer.parts import check_arguments


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def log_likelihood(model, tokenizer, record):
    """log p(response, eos | prompt) and its number of tokens, token by token."""
    prompt = tokenizer(record["prompt"])["input_ids"]
    response = [*tokenizer(record["chosen"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0]
    total = 0.0
    for offset, token in enumerate(response):
        total += log_softmax(logits[len(prompt) + offset - 1], -1)[token].item()
    return total, len(response)


def score(model, tokenizer, record, answer):
    ids = tokenizer(f"{record['prompt']} {record[answer]} </s>", return_tensors="pt")
    with torch.no_grad():
        return model(ids["input_ids"], ids["attention_mask"]).item()


# ------------------------------------------------------------------------------------- the loss


def scores_of(chosen, rejected, margin=None, nll=None, tokens=None, smoothing=None):
    rows = [chosen, rejected, margin or [0.0] * len(chosen), nll or [0.0] * len(chosen)]
    rows += [tokens or [1.0] * len(chosen), smoothing or [np.nan] * len(chosen)]
    return PairScores(*torch.tensor(rows, dtype=torch.float64))


def test_loss_is_that_of_the_formula():
    scores = scores_of([2, 0, -1], [1, 0, 2], [0.5, 0, 0], [3, 4, 5], [2, 1, 5])
    sigma = 1 / (1 + np.exp(-np.array([0.5, 0.0, -3.0])))  # numpy, pair by pair
    ranking = -np.log(sigma).mean()
    output = RankingLoss()(scores)
    assert output.loss.item() == pytest.approx(ranking)
    output = RankingLoss(lm_coef=0.7)(scores)
    assert output.loss.item() == pytest.approx(ranking + 0.7 * 12 / 8)
    assert output.stats["ranking_loss"].item() == pytest.approx(ranking)
    assert output.stats["lm_loss"].item() == pytest.approx(12 / 8)
    smooth = -(0.9 * np.log(sigma) + 0.1 * np.log(1 - sigma)).mean()
    assert RankingLoss(label_smoothing=0.1)(scores).loss.item() == pytest.approx(smooth)


def test_statistics_count_ties_half():
    stats = RankingLoss()(scores_of([2, 0, -1, 3], [1, 0, 2, -1], [5, 5, 5, 5])).stats
    assert stats["accuracy"].item() == 2.5 / 4
    assert stats["margin"].item() == (1 + 0 - 3 + 4) / 4


def test_shares_of_parts_add_up_to_the_whole():
    scores = scores_of([2, 0, -1], [1, 0, 2], [0.5, 0, 0], [3, 4, 5], [2, 1, 5])
    loss = RankingLoss(lm_coef=0.7)
    whole, counts = loss(scores), torch.tensor([3.0, 8.0])
    parts = [loss(PairScores(*(x[s] for x in scores)), counts) for s in (slice(2), slice(2, 3))]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item())
    for name, value in whole.stats.items():
        assert sum(part.stats[name] for part in parts).item() == pytest.approx(value.item())


def test_gradient_survives_a_large_negative_margin():
    chosen = torch.tensor([-30.0], requires_grad=True)
    one = torch.ones(1)
    RankingLoss()(
        PairScores(chosen, 0 * one, 0 * one, 0 * one, one, torch.nan * one)
    ).loss.backward()
    assert chosen.grad.item() == pytest.approx(-1.0)  # of −log(σ + 1e-5): −1e-8


@pytest.mark.parametrize(
    "options",
    [
        {"lm_coef": 0.0},
        {"lm_coef": -1.0},
        {"label_smoothing": -0.1},
        {"label_smoothing": 0.5},
        {"label_smoothing": 0.6},
        {"label_smoothing": float("nan")},
    ],
    ids=str,
)
def test_loss_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RankingLoss(**options)


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("tied", [False, True])
def test_pair_model_reads_both_heads_in_one_pass(tokenizer, tied):
    lm = language_model(tie_word_embeddings=tied)
    model = reward_model(tie_word_embeddings=tied)
    pair_model = PairModel(model, None if tied else lm.lm_head)
    records = pairs(5)
    batch = PairCollator(tokenizer)(records)
    rows = {name: torch.stack(batch[name].chunk(2), 1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        scores, nll = pair_model(**rows, chosen_labels=batch["chosen_labels"])
    for i, record in enumerate(records):
        likelihood, _ = log_likelihood(lm, tokenizer, record)
        assert nll[i].item() == pytest.approx(-likelihood, rel=1e-4)
        for j, answer in enumerate(("chosen", "rejected")):
            alone = score(model, tokenizer, record, answer)
            assert scores[i, j].item() == pytest.approx(alone, abs=1e-4)
    assert not model.score._forward_pre_hooks


# --------------------------------------------------------------------------- the trainer's sums


@pytest.mark.parametrize("beta", [None, 0.5])
def test_loss_of_a_batch_by_hand(tokenizer, arguments, beta):
    lm, model, records = language_model(), reward_model(), pairs(4, margin=0.25)
    leads = [
        score(model, tokenizer, r, "chosen") - score(model, tokenizer, r, "rejected")
        for r in records
    ]
    expected = np.mean([np.log1p(np.exp(-(lead - 0.25))) for lead in leads])
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


def run(tokenizer, args, count, **options):
    """Train on all pairs with the LM term; the trainer, and its log."""
    trainer = RewardTrainer(
        reward_model(), args, processing_class=tokenizer, train_dataset=pairs(count),
        loss=RankingLoss(lm_coef=0.5), lm_head=language_model().lm_head, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_accumulation_changes_neither_steps_nor_logs(tokenizer, arguments):
    """10 pairs a step, at once or as 3 + 3 + 3 + 1, whose means differ from the mean."""
    common = dict(
        num_train_epochs=4, learning_rate=0.1, optim="sgd", logging_strategy="steps",
        logging_steps=2,
    )  # fmt: skip
    whole = run(tokenizer, arguments(per_device_train_batch_size=10, **common), 10)
    split = arguments(per_device_train_batch_size=3, gradient_accumulation_steps=4, **common)
    parts = run(tokenizer, split, 10)
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


def test_a_step_is_the_gradient_of_the_mean(tokenizer, arguments):
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
def test_evaluation_is_exact_whatever_the_batch_size(tokenizer, arguments, size):
    lm, model, records = language_model(), reward_model(), pairs(7)
    trainer = RewardTrainer(
        model, arguments(per_device_eval_batch_size=size), processing_class=tokenizer,
        eval_dataset=records, loss=RankingLoss(lm_coef=1.0), lm_head=lm.lm_head,
    )  # fmt: skip
    rows = [
        [score(model, tokenizer, r, answer) for answer in ("chosen", "rejected")] for r in records
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


def test_several_evaluation_sets_and_an_untrained_head(tokenizer, arguments):
    sets = {"one": pairs(3), "two": pairs(4, seed=1)}
    trainer = RewardTrainer(
        reward_model(head=False), arguments(), processing_class=tokenizer, eval_dataset=sets
    )
    metrics = trainer.evaluate()
    assert metrics["eval_one_accuracy"] == metrics["eval_two_accuracy"] == 0.5
    assert metrics["eval_one_loss"] == pytest.approx(np.log(2))
    assert "eval_one_lm_loss" not in metrics


# ---------------------------------------------------------------------- training, saving, resuming


def test_learns_a_trivial_preference(tokenizer, arguments):
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


def test_resumed_equals_uninterrupted(tokenizer, arguments, tmp_path):
    common = dict(
        per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2,
        save_strategy="steps", save_steps=4,
    )  # fmt: skip
    straight = run(tokenizer, arguments(output_dir=str(tmp_path / "straight"), **common), 12)
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


def test_best_checkpoint_is_loaded_at_the_end(tokenizer, arguments, tmp_path):
    """The smallest spread of scores is the first: training widens it."""
    args = arguments(
        per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-2,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="score_std", greater_is_better=False,
    )  # fmt: skip
    trainer = run(tokenizer, args, 32, eval_dataset=pairs(5, seed=1))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    spreads = [row["eval_score_std"] for row in trainer.state.log_history if "eval_loss" in row]
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert spreads[0] < spreads[1]
    again = trainer.evaluate()
    assert again["eval_score_std"] == pytest.approx(spreads[0])
    assert again["eval_loss"] == pytest.approx(losses[0])  # the output head came along


def test_a_checkpoint_without_a_weight_is_refused(tokenizer, arguments, tmp_path):
    trainer = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    trainer.reward_model.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    state = load_file(weights)
    state.pop("score.weight")
    save_file(state, weights)
    with pytest.raises(ValueError, match="score"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "broken"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "lm_head/model.safetensors"])
def test_a_damaged_checkpoint_is_named(tokenizer, arguments, tmp_path, name):
    trainer = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer, loss=RankingLoss(lm_coef=0.5),
        lm_head=language_model().lm_head,
    )  # fmt: skip
    storage.write(trainer.model, tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*missing or damaged, resume from"):
        storage.read(trainer.model, tmp_path)


def test_saved_folder_serves_as_a_classifier(tokenizer, arguments, tmp_path):
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
    for column, answer in enumerate(("chosen", "rejected")):
        texts = [f"{record['prompt']} {record[answer]} </s>" for record in records]
        with torch.no_grad():
            logits = classifier(**saved(texts, padding=True, return_tensors="pt")).logits
        np.testing.assert_allclose(logits[:, 0], expected[:, column], atol=1e-4)
    trainer = RewardTrainer(tmp_path / "saved", arguments(), processing_class=saved)
    np.testing.assert_allclose(trainer.predict(records).predictions, expected, atol=1e-5)


def test_datasets_keep_their_columns_and_arguments_their_values(tokenizer, arguments):
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


def test_documentation_runs(root, tmp_path, monkeypatch):
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
    is_causal(model.backbone), can_pack(model.backbone)  # run it, beforehand
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


def test_trained_parameters_are_float32(tokenizer, arguments):
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


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "good"},
        {"chosen": "good", "rejected": "bad"},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad"},
    ],
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_records_without_a_pair_are_refused_at_once(tokenizer, arguments, record, name):
    with pytest.raises(ValueError, match=f"{name}.*chosen.*load_pairs"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, **{name: [record]})


def test_prompts_without_room_for_a_response_are_refused_at_once(tokenizer, arguments):
    """Not in the midst of an epoch, when their turn comes; wherever in a dataset they stand."""
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


def test_margins_are_read_where_asked_for(tokenizer, arguments):
    plain = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    assert plain.data_collator(pairs(2, margin=3.0))["margin"].tolist() == [0.0, 0.0]
    trainer = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer, margin_column="lead"
    )
    batch = trainer.data_collator([*pairs(1, lead=2), *pairs(1, lead=0.5)])
    assert batch["margin"].tolist() == [2.0, 0.5]
    with pytest.raises(ValueError, match=r"margin_column: a record has no 'lead' .*'rejected'\]"):
        trainer.data_collator([*pairs(1, lead=2), *pairs(1)])
    for wrong, kind in (("2", "str"), (True, "bool"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"record's 'lead' is .*, a {kind}, expected a number"):
            trainer.data_collator([*pairs(1, lead=2), *pairs(1, lead=wrong)])


def test_alphas_of_pairs_take_the_place_of_the_losss():
    given = [2, 0, -1], [1, 0, 2]
    loss = RankingLoss(label_smoothing=0.3)
    alphas = np.array([0.0, 0.1, 0.3])
    sigma = 1 / (1 + np.exp(-np.array([1.0, 0.0, -3.0])))
    expected = -((1 - alphas) * np.log(sigma) + alphas * np.log(1 - sigma)).mean()
    scores = scores_of(*given, smoothing=[0.0, 0.1, np.nan])
    assert loss(scores).loss.item() == pytest.approx(expected)


def test_centering_adds_the_mean_square_of_the_sums():
    scores = scores_of([2, 0, -1], [1, 0, 2])
    output = RankingLoss(centering_coef=0.1)(scores)
    plain = RankingLoss()(scores)
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.1 * (9 + 0 + 1) / 3)
    assert output.stats["centering_loss"].item() == pytest.approx(10 / 3)


def test_numbers_out_of_range_are_refused_where_they_stand(tokenizer, arguments):
    trainer = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer, smoothing_column="alpha"
    )
    assert (
        trainer.data_collator(pairs(2, alpha=0.2))["smoothing"].tolist() == [pytest.approx(0.2)] * 2
    )
    for alpha in (0.5, -0.1):
        with pytest.raises(ValueError, match=r"smoothing_column: 'alpha' holds .*FlipLabels"):
            trainer.data_collator(pairs(2, alpha=alpha))
    for alpha in (None, float("nan")):
        with pytest.raises(ValueError, match="smoothing_column: a record has no 'alpha'"):
            trainer.data_collator(pairs(2, alpha=alpha))


def test_pairs_held_out_may_do_without_margins(tokenizer, arguments):
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


@pytest.mark.parametrize("groups", [2, 3, 7])
@pytest.mark.parametrize("side", ["right", "left"])
def test_groups_of_like_length_change_no_number(tokenizer, groups, side):
    """Seven groups of six rows: one is read twice, and counts once."""
    batch = PairRows(PairCollator(tokenizer))(pairs(3))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["chosen_labels"]
    if side == "left":
        width = mask.shape[-1]
        place = (torch.arange(width) + mask.sum(-1, keepdim=True)) % width
        ids, mask = ids.gather(2, place), mask.gather(2, place)
        labels = labels.gather(1, place[:, 0])
    results = []
    for count in (1, groups):
        model = PairModel(reward_model(), language_model().lm_head, groups=count).double()
        scores, nll = model(ids, mask, labels)
        (scores[:, 0] * torch.tensor([1.0, 2.0, 3.0]) - scores[:, 1] + nll).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((scores, nll, gradient))
        assert model(ids, mask)[1].tolist() == [0.0] * 3
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-9)


def test_batches_by_token_count_make_an_epoch(tokenizer, arguments):
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
    epochs = [size for size in seen if size > 1]  # the others are asked for their lengths
    assert trainer.state.global_step == 2 * steps == len(epochs)
    assert sum(epochs) == 2 * 23
    assert len({*epochs}) > 1
    trainer.train_dataset = iter(records)
    with pytest.raises(ValueError, match="which does not say how many pairs"):
        trainer.get_train_dataloader()


def test_resumed_equals_uninterrupted_by_token_count(tokenizer, arguments, tmp_path):
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


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tokenizer, arguments):
    small = reward_model(vocab_size=len(WORDS) - 1)
    with pytest.raises(ValueError, match=r"13 tokens.*only 12.*resize_token_embeddings"):
        RewardTrainer(small, arguments(), processing_class=tokenizer)
    small.backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    RewardTrainer(small, arguments(), processing_class=tokenizer)


def test_model_and_heads_have_to_fit(tokenizer, arguments):
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


def test_a_score_that_is_not_finite_stops_the_step(tokenizer, arguments):
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
def test_datasets_of_other_types_are_refused_by_name(
    tokenizer, arguments, argument, value, message
):
    given = {"args": arguments(), argument: value}
    with pytest.raises(TypeError, match=message):
        RewardTrainer(reward_model(), processing_class=tokenizer, **given)


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_datasets_without_records_are_refused(tokenizer, arguments, argument):
    with pytest.raises(ValueError, match=f"{argument}: it is empty"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, **{argument: []})


def test_arguments_of_other_types_are_refused_by_name():
    check_arguments(None, None, TokenBatches())
    for place, (value, name) in enumerate([({}, "args"), ("ranking", "loss"), (4096, "batches")]):
        given: list = [None, None, None]
        given[place] = value
        with pytest.raises(TypeError, match=f"{name}: got {value!r}, expected a "):
            check_arguments(*given)
