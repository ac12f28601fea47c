"""The pair collator, the ranking loss against formulas, `PairModel` against single sequences."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from preferences import language_model, log_likelihood, pairs, reward_model, reward_of

from mossrlhf.data import PairCollator
from mossrlhf.models import add_adapters
from mossrlhf.reward_modeling.pairs import PairModel, PairRewards, PairwiseCollator, RankingLoss

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)


def pair_rewards(chosen, rejected, margin=None, nll=None, tokens=None, smoothing=None):
    rows = [chosen, rejected, margin or [0.0] * len(chosen), nll or [0.0] * len(chosen)]
    rows += [tokens or [1.0] * len(chosen), smoothing or [np.nan] * len(chosen)]
    return PairRewards(*torch.tensor(rows, dtype=torch.float64))


def adapted_pair_model(config=LORA, model=None):
    model = model or reward_model()
    if config is not None:
        add_adapters(model, config)
    return PairModel(model)


def test_ranking_loss_matches_the_formula():
    rewards = pair_rewards([2, 0, -1], [1, 0, 2], [0.5, 0, 0], [3, 4, 5], [2, 1, 5])
    sigma = 1 / (1 + np.exp(-np.array([0.5, 0.0, -3.0])))  # numpy, pair by pair
    ranking = -np.log(sigma).mean()
    output = RankingLoss()(rewards)
    assert output.loss.item() == pytest.approx(ranking)
    output = RankingLoss(lm_coef=0.7)(rewards)
    assert output.loss.item() == pytest.approx(ranking + 0.7 * 12 / 8)
    assert output.stats["ranking_loss"].item() == pytest.approx(ranking)
    assert output.stats["lm_loss"].item() == pytest.approx(12 / 8)
    smooth = -(0.9 * np.log(sigma) + 0.1 * np.log(1 - sigma)).mean()
    assert RankingLoss(label_smoothing=0.1)(rewards).loss.item() == pytest.approx(smooth)


def test_ranking_loss_counts_ties_as_half_right():
    stats = RankingLoss()(pair_rewards([2, 0, -1, 3], [1, 0, 2, -1], [5, 5, 5, 5])).stats
    assert stats["accuracy"].item() == 2.5 / 4
    assert stats["margin"].item() == (1 + 0 - 3 + 4) / 4


def test_ranking_loss_of_parts_adds_up_to_that_of_the_whole():
    rewards = pair_rewards([2, 0, -1], [1, 0, 2], [0.5, 0, 0], [3, 4, 5], [2, 1, 5])
    loss = RankingLoss(lm_coef=0.7)
    whole, counts = loss(rewards), torch.tensor([3.0, 8.0])
    parts = [loss(PairRewards(*(x[s] for x in rewards)), counts) for s in (slice(2), slice(2, 3))]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item())
    for name, value in whole.stats.items():
        assert sum(part.stats[name] for part in parts).item() == pytest.approx(value.item())


def test_ranking_loss_has_a_gradient_at_large_negative_margins():
    chosen = torch.tensor([-30.0], requires_grad=True)
    one = torch.ones(1)
    RankingLoss()(
        PairRewards(chosen, 0 * one, 0 * one, 0 * one, one, torch.nan * one)
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
def test_ranking_loss_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RankingLoss(**options)


def test_ranking_loss_uses_the_alpha_of_a_pair_before_its_own():
    given = [2, 0, -1], [1, 0, 2]
    loss = RankingLoss(label_smoothing=0.3)
    alphas = np.array([0.0, 0.1, 0.3])
    sigma = 1 / (1 + np.exp(-np.array([1.0, 0.0, -3.0])))
    expected = -((1 - alphas) * np.log(sigma) + alphas * np.log(1 - sigma)).mean()
    rewards = pair_rewards(*given, smoothing=[0.0, 0.1, np.nan])
    assert loss(rewards).loss.item() == pytest.approx(expected)


def test_ranking_loss_centering_adds_the_mean_square_of_the_sums():
    rewards = pair_rewards([2, 0, -1], [1, 0, 2])
    output = RankingLoss(centering_coef=0.1)(rewards)
    plain = RankingLoss()(rewards)
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.1 * (9 + 0 + 1) / 3)
    assert output.stats["centering_loss"].item() == pytest.approx(10 / 3)


@pytest.mark.parametrize("tied", [False, True])
def test_pair_model_computes_rewards_and_log_probs_in_one_pass(tokenizer, tied):
    lm = language_model(tie_word_embeddings=tied)
    model = reward_model(tie_word_embeddings=tied)
    pair_model = PairModel(model, None if tied else lm.lm_head)
    records = pairs(5)
    batch = PairCollator(tokenizer)(records)
    rows = {name: torch.stack(batch[name].chunk(2), 1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        rewards, nll = pair_model(**rows, chosen_labels=batch["chosen_labels"])
    for i, record in enumerate(records):
        likelihood, _ = log_likelihood(lm, tokenizer, record)
        assert nll[i].item() == pytest.approx(-likelihood, rel=1e-4)
        for j, side in enumerate(("chosen", "rejected")):
            alone = reward_of(model, tokenizer, record, side)
            assert rewards[i, j].item() == pytest.approx(alone, abs=1e-4)
    assert not model.score._forward_pre_hooks


@pytest.mark.parametrize("groups", [2, 3, 7])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pair_model_computes_the_same_in_groups_of_similar_length(tokenizer, groups, side):
    """With seven groups of six rows, one row is computed twice and counted once."""
    batch = PairwiseCollator(PairCollator(tokenizer))(pairs(3))
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["chosen_labels"]
    if side == "left":
        width = mask.shape[-1]
        place = (torch.arange(width) + mask.sum(-1, keepdim=True)) % width
        ids, mask = ids.gather(2, place), mask.gather(2, place)
        labels = labels.gather(1, place[:, 0])
    results = []
    for count in (1, groups):
        model = PairModel(reward_model(), language_model().lm_head, groups=count).double()
        rewards, nll = model(ids, mask, labels)
        (rewards[:, 0] * torch.tensor([1.0, 2.0, 3.0]) - rewards[:, 1] + nll).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((rewards, nll, gradient))
        assert model(ids, mask)[1].tolist() == [0.0] * 3
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-6, atol=1e-9)


def test_collator_reads_margins_from_their_column(tokenizer):
    plain = PairwiseCollator(PairCollator(tokenizer))
    assert plain(pairs(2, margin=3.0))["margin"].tolist() == [0.0, 0.0]
    collator = PairwiseCollator(PairCollator(tokenizer), margin_column="lead")
    batch = collator([*pairs(1, lead=2), *pairs(1, lead=0.5)])
    assert batch["margin"].tolist() == [2.0, 0.5]
    with pytest.raises(ValueError, match=r"margin_column: a record has no 'lead' .*'rejected'\]"):
        collator([*pairs(1, lead=2), *pairs(1)])
    for wrong, kind in (("2", "str"), (True, "bool"), ([1.0], "list")):
        with pytest.raises(ValueError, match=f"record's 'lead' is .*, a {kind}, expected a number"):
            collator([*pairs(1, lead=2), *pairs(1, lead=wrong)])


def test_collator_refuses_alphas_out_of_range(tokenizer):
    collator = PairwiseCollator(PairCollator(tokenizer), smoothing_column="alpha")
    assert collator(pairs(2, alpha=0.2))["smoothing"].tolist() == [pytest.approx(0.2)] * 2
    for alpha in (0.5, -0.1):
        with pytest.raises(ValueError, match=r"smoothing_column: 'alpha' holds .*FlipLabels"):
            collator(pairs(2, alpha=alpha))
    for alpha in (None, float("nan")):
        with pytest.raises(ValueError, match="smoothing_column: a record has no 'alpha'"):
            collator(pairs(2, alpha=alpha))


def test_collator_measures_the_longer_sequence_of_each_pair(tokenizer):
    records = pairs(5)
    lengths = PairwiseCollator(PairCollator(tokenizer)).lengths(records)
    texts = [[f"{r['prompt']} {r[side]} </s>" for side in ("chosen", "rejected")] for r in records]
    assert lengths == [max(len(tokenizer.tokenize(text)) for text in both) for both in texts]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "lm_head/model.safetensors"])
def test_loading_names_a_damaged_file(tmp_path, name):
    model = PairModel(reward_model(), language_model().lm_head)
    model.save(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*missing or damaged, resume from"):
        model.load(tmp_path)


def test_saved_adapters_keep_the_moments_of_the_rewards(tmp_path):
    model = adapted_pair_model()
    model.config.score_mean, model.config.score_std = 1.0, 2.0
    model.save(tmp_path, adapters_only=True)
    model.config.score_mean, model.config.score_std = 7.0, 9.0
    model.load(tmp_path)
    assert (model.config.score_mean, model.config.score_std) == (1.0, 2.0)


def test_gathered_weights_are_saved_with_adapters_merged(tmp_path):
    """DeepSpeed hands over the state dict, in which the adapters are separate."""
    model = adapted_pair_model()
    model.save(tmp_path, model.state_dict())
    adapted_pair_model(None).load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(config=replace(LORA, lora_alpha=8)), "lora_alpha 16 there, 8 here"),
        (dict(config=replace(LORA, use_rslora=True)), "use_rslora False there, True here"),
        (dict(model=reward_model(seed=5)), "trained on another base than the model's"),
        (dict(config=None), "holds adapters alone, and the model in training has none"),
        (dict(config=None, whole=True), None),
        (dict(damage="adapter_config.json"), "adapter.*cannot be read"),
        (dict(damage="adapter_model.safetensors"), "cannot be read .SafetensorError"),
        (dict(damage="score_moments.json"), "cannot be read .JSONDecodeError"),
        (dict(remove="score_moments.json"), "cannot be read .FileNotFoundError"),
        ({}, None),
    ],
)
def test_loading_refuses_a_checkpoint_that_does_not_fit(tmp_path, change, message):
    adapted_pair_model().save(tmp_path, adapters_only="whole" not in change)
    if name := change.get("damage"):
        (tmp_path / "adapter" / name).write_bytes(b"{")
    if name := change.get("remove"):
        (tmp_path / "adapter" / name).unlink()
    now = adapted_pair_model(change.get("config", LORA), change.get("model"))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        now.load(tmp_path)


def test_adapters_load_over_the_same_base_in_half_precision(tmp_path):
    adapted_pair_model().save(tmp_path, adapters_only=True)
    adapted_pair_model(model=reward_model().to(torch.bfloat16)).load(tmp_path)


def test_loading_refuses_a_checkpoint_without_adapters_for_a_model_with_some(tmp_path):
    PairModel(reward_model()).save(tmp_path)
    with pytest.raises(ValueError, match="it holds no adapters, and the model in training has som"):
        adapted_pair_model().load(tmp_path)
