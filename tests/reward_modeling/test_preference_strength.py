"""Preference strength against numpy, and the methods of Part II on records by hand."""

import math

import numpy as np
import pytest
import torch
from preferences import pairs, reward_model

from mossrlhf import AdaptiveMargin, FlipLabels, PreferenceStrength, SmoothLabels
from mossrlhf.data import PairCollator
from mossrlhf.reward_modeling.preference_strength import checksum

NAN = math.nan


def with_strengths(*strengths):
    records = pairs(len(strengths))
    return [
        {**r, "strength": s, "strength_std": 1.0} for r, s in zip(records, strengths, strict=True)
    ]


class Oracle(torch.nn.Module):
    """Rewards a sequence by the count of one token, times a scale."""

    def __init__(self, token: int, scale: float) -> None:
        super().__init__()
        self.token, self.scale = token, torch.nn.Parameter(torch.tensor(scale))

    def forward(self, ids, mask):
        return self.scale * ((ids == self.token) & (mask == 1)).sum(1)


def test_mean_and_std_ignore_models_that_were_not_queried():
    margins = torch.tensor([[1.0, NAN, 2.0], [3.0, -1.0, NAN], [NAN, -4.0, NAN]])
    strength = PreferenceStrength(margins, "x")
    table = margins.numpy()
    np.testing.assert_allclose(strength.mean, np.nanmean(table, 0))
    np.testing.assert_allclose(strength.std[:2], np.nanstd(table[:, :2], 0, ddof=1))
    assert strength.std[2].isnan()  # of a single margin


def test_of_queries_every_model_about_every_pair(tokenizer):
    records, good = pairs(5), tokenizer.convert_tokens_to_ids("good")
    models = [Oracle(good, 1.0), Oracle(good, 3.0)]
    strength = PreferenceStrength.of(models, records, PairCollator(tokenizer), batch_size=2)
    assert strength.margins.tolist() == [[1.0] * 5, [3.0] * 5]
    assert strength.mean.tolist() == [2.0] * 5
    assert strength.std.tolist() == pytest.approx([2**0.5] * 5)
    assert all(model.training for model in models)
    with pytest.raises(ValueError, match=r"got 1 and 5.*two models at least"):
        PreferenceStrength.of(models[:1], records, PairCollator(tokenizer))


@pytest.mark.parametrize(("models", "folds"), [(4, 1), (4, 2), (6, 3)])
def test_measure_queries_models_about_pairs_they_were_not_trained_on(tokenizer, models, folds):
    records, trained_on, seeds = pairs(11), [], []

    def train(some, seed):
        trained_on.append([records.index(record) for record in some])
        seeds.append(seed)
        return Oracle(3, float(len(trained_on)))

    options = dict(models=models, folds=folds, seed=7)
    strength = PreferenceStrength.measure(train, records, PairCollator(tokenizer), **options)
    assert seeds == [7 + k for k in range(models)]
    for k, seen in enumerate(trained_on):
        queried = (~strength.margins[k].isnan()).nonzero()[:, 0].tolist()
        expected = range(11) if folds == 1 else {*range(11)} - {*seen}
        assert queried == sorted(expected)
        assert strength.margins[k, queried[0]] == k + 1
    times = (~strength.margins.isnan()).sum(0)
    assert times.tolist() == [models // folds] * 11
    if folds > 1:
        assert trained_on[0] != trained_on[folds]  # each round splits differently


def test_measure_refuses_too_few_models_for_the_folds(tokenizer):
    train = lambda records, seed: Oracle(3, 1.0)  # noqa: E731
    with pytest.raises(ValueError, match="got 5 and 2 for 4 pairs"):
        PreferenceStrength.measure(train, pairs(4), PairCollator(tokenizer), models=5, folds=2)
    with pytest.raises(ValueError, match="models"):
        PreferenceStrength.measure(train, pairs(4), PairCollator(tokenizer), models=1)


def test_saved_strength_annotates_the_same_pairs_only(tmp_path):
    records = pairs(3, topic="x")
    strength = PreferenceStrength(
        torch.tensor([[1.0, NAN, 2.0], [3.0, -1.0, 0.1]]), checksum(records)
    )
    strength.save(tmp_path / "strength.json")
    loaded = PreferenceStrength.load(tmp_path / "strength.json")
    assert torch.equal(loaded.margins.nan_to_num(99), strength.margins.nan_to_num(99))
    first = loaded.annotate(records)[0]
    assert first == {**records[0], "strength": 2.0, "strength_std": pytest.approx(2**0.5)}
    for others in (records[::-1], records[:2], pairs(3, seed=1)):
        with pytest.raises(ValueError, match="are not the 3 that were measured"):
            loaded.annotate(others)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other.json: expected what PreferenceStrength.save"):
        PreferenceStrength.load(tmp_path / "other.json")


def test_flip_labels_swaps_the_pairs_of_lowest_strength():
    records = with_strengths(2.0, -3.0, 0.5, -0.1, -2.0)
    for method, flipped in (
        (FlipLabels(), {1, 3, 4}),
        (FlipLabels(below=-1.0), {1, 4}),
        (FlipLabels(share=0.2), {1}),
        (FlipLabels(share=0.8), {1, 3, 4}),
        (FlipLabels(share=0.8, below=None), {1, 2, 3, 4}),
        (FlipLabels(share=0.0), set()),
    ):
        for i, (before, after) in enumerate(zip(records, method(records), strict=True)):
            turned = i in flipped
            assert after["flipped"] is turned
            sides = (before["chosen"], before["rejected"])
            assert (after["chosen"], after["rejected"]) == (sides[::-1] if turned else sides)
            assert after["strength"] == (-1 if turned else 1) * before["strength"]
            assert after["prompt"] == before["prompt"]


def test_smooth_labels_gives_sigmoid_of_minus_strength():
    records = with_strengths(2.0, 0.0, -3.0)
    alphas = [r["label_smoothing"] for r in SmoothLabels(highest=0.4, scale=0.5)(records)]
    assert alphas == pytest.approx([1 / (1 + np.exp(1.0)), 0.4, 0.4])


def test_adaptive_margin_is_the_strength_within_bounds():
    records = with_strengths(2.0, 0.5, -3.0)
    for method, margins in (
        (AdaptiveMargin(), [2.0, 0.5, 0.0]),
        (AdaptiveMargin(lowest=None), [2.0, 0.5, -3.0]),
        (AdaptiveMargin(scale=2.0, lowest=-1.0, highest=3.0), [3.0, 1.0, -1.0]),
    ):
        assert [r["margin"] for r in method(records)] == margins


def test_methods_combine():
    records = with_strengths(2.0, -3.0)
    for method in (FlipLabels(), SmoothLabels(), AdaptiveMargin()):
        records = method(records)
    assert [r["flipped"] for r in records] == [False, True]
    assert [r["margin"] for r in records] == [2.0, 3.0]
    assert records[1]["label_smoothing"] == pytest.approx(1 / (1 + np.exp(3.0)))


def test_a_label_flipped_twice_is_the_original():
    records = with_strengths(2.0, -3.0, 1.0)
    once = FlipLabels(share=0.34, below=None)(records)
    assert [r["flipped"] for r in once] == [False, True, False]
    twice = FlipLabels(below=1.5)(once)
    assert [r["flipped"] for r in twice] == [False, True, True]
    back = FlipLabels(share=0.34, below=None)(FlipLabels(share=0.34, below=None)(once[1:2]))
    assert FlipLabels(below=9.0)(once[1:2])[0]["flipped"] is False
    assert FlipLabels(below=9.0)(once[1:2])[0]["chosen"] == records[1]["chosen"]
    assert back == once[1:2]


@pytest.mark.parametrize("before", [SmoothLabels(), AdaptiveMargin()])
def test_flip_labels_refuses_records_with_margins_or_alphas(before):
    with pytest.raises(ValueError, match="let FlipLabels come first"):
        FlipLabels()(before(with_strengths(2.0, -3.0)))


@pytest.mark.parametrize("method", [FlipLabels(), SmoothLabels(), AdaptiveMargin()])
@pytest.mark.parametrize("strength", [None, NAN])
def test_methods_refuse_records_without_strength(method, strength):
    with pytest.raises(ValueError, match="not all have a number in 'strength'"):
        method([{**r, "strength": strength} for r in pairs(2)])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (FlipLabels, dict(share=1.5), "share"),
        (FlipLabels, dict(share=None, below=None), "expected one of the two"),
        (SmoothLabels, dict(highest=0.5), "highest"),
        (SmoothLabels, dict(scale=0.0), "scale"),
        (AdaptiveMargin, dict(scale=-1.0), "scale"),
        (AdaptiveMargin, dict(lowest=1.0, highest=0.0), "lowest to be the lower"),
    ],
)
def test_methods_refuse_numbers_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_diverged_models_and_empty_data_are_refused(tokenizer):
    broken = reward_model()
    torch.nn.init.constant_(broken.score.weight, float("nan"))
    collator = PairCollator(tokenizer)
    with pytest.raises(ValueError, match="6 of 6 rewards are not finite"):
        PreferenceStrength.of([broken, reward_model()], pairs(3), collator)
    with pytest.raises(ValueError, match="pairs: got none"):
        PreferenceStrength.measure(lambda *_: broken, [], collator)


def test_strengths_may_be_numpy_numbers():
    records = [{**pairs(1)[0], "strength": np.float32(-1.5)}]
    assert FlipLabels()(records)[0]["strength"] == 1.5


def test_load_refuses_a_file_without_margins(tmp_path):
    (tmp_path / "s.json").write_text('{"margins": [], "fingerprint": "x"}')
    with pytest.raises(ValueError, match=r"s.json: expected what PreferenceStrength.save"):
        PreferenceStrength.load(tmp_path / "s.json")
