"""From scores to rewards: every step of P1 eqs. 18 and 19, switched on and off."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mossrlhf.reward_shaping import (
    RewardShaper,
    RollingReturnMoments,
    RunningMoments,
    add_at_last,
)
from mossrlhf.types import Rollout

SCORES = st.lists(st.floats(-100, 100), max_size=8)


@pytest.fixture
def rollout():
    """Responses of 3, 2 and 1 tokens; the second's last token does not count, the third is cut."""
    return Rollout(
        input_ids=torch.zeros(3, 4, dtype=torch.long),
        prompt_lengths=torch.tensor([1, 1, 1]),
        response_lengths=torch.tensor([3, 2, 1]),
        truncated=torch.tensor([False, False, True]),
        mask=torch.tensor([[True, False, True], [True, False, False], [True, False, False]]),
        scores=torch.tensor([2.0, -1.0, 5.0]),
        logprobs=torch.tensor([[-1.0, torch.nan, -2.0], [-3.0, torch.nan, 0.0], [-1.0, 0.0, 0.0]]),
        ref_logprobs=torch.tensor([[-2.0, 0.0, -1.0], [-3.5, 0.0, 0.0], [-1.0, torch.nan, 0.0]]),
    )


def shaper(**options):
    """A shaper with everything off but `options`."""
    return RewardShaper(**{"kl_coef": None, **options})


class TestMoments:
    @given(st.lists(SCORES, max_size=5))
    def test_merging_equals_numpy_over_everything(self, parts):
        moments = RunningMoments()
        for part in parts:
            moments.update(torch.tensor(part, dtype=torch.float64))
        together = np.array([score for part in parts for score in part])
        assert moments.count == len(together)
        if len(together):
            assert moments.mean == pytest.approx(together.mean(), abs=1e-9)
            # m2 of equal numbers is rounding alone: the spread must be told from it.
            squares = ((together - together.mean()) ** 2).sum()
            assert moments.m2 == pytest.approx(squares, rel=1e-9, abs=1e-9)
        if len(together) >= 2 and together.std() > 1e-3:
            assert moments.std == pytest.approx(together.std(ddof=1))

    @pytest.mark.parametrize("scores", [[], [7.0], [3.0, 3.0, 3.0]])
    def test_std_is_one_until_two_numbers_differ(self, scores):
        moments = RunningMoments()
        moments.update(torch.tensor(scores))
        assert moments.std == 1.0

    def test_small_spreads_count(self):
        moments = RunningMoments()
        moments.update(torch.tensor([0.1, 0.2], dtype=torch.float64))
        assert moments.std == pytest.approx(0.1 * 0.5**0.5)

    def test_of_one_number_there_is_no_spread(self):
        assert RunningMoments(count=1, mean=3.0, m2=2.0).std == 1.0

    def test_they_begin_with_nothing(self):
        nothing = {"count": 0.0, "mean": 0.0, "m2": 0.0}
        assert RunningMoments().state_dict() == nothing
        assert RollingReturnMoments() == RollingReturnMoments(**nothing, gamma=0.99, rolling=0.0)

    def test_what_is_not_finite_is_passed_over(self):
        moments = RunningMoments()
        moments.update(torch.tensor([1.0, torch.nan, 3.0, torch.inf]))
        assert (moments.count, moments.mean, moments.m2) == (2, 2.0, 2.0)

    def test_large_offsets_keep_their_spread(self):
        """Σx² − n·mean² in float32 would give nothing here."""
        moments = RunningMoments()
        for part in ([10000.0, 10001.0], [10002.0, 10003.0]):
            moments.update(torch.tensor(part))
        assert moments.std == pytest.approx(np.std([0, 1, 2, 3], ddof=1), rel=1e-9)

    def test_two_processes_that_hold_the_same(self):
        moments = RunningMoments()
        for part in ([1.0, 2.0], [6.0]):
            moments.update(torch.tensor(part), reduce=lambda tensor: 2 * tensor)
        doubled = np.array([1, 2, 1, 2, 6, 6])
        assert moments.count == 6
        assert moments.mean == pytest.approx(doubled.mean())
        assert moments.std == pytest.approx(doubled.std(ddof=1))

    def test_rolling_sum_by_hand(self):
        # γ = ½: R = 4, then 2 + 2 = 4, then 2 − 1 = 1 in the next call; std of [4, 4, 1] = √3.
        moments = RollingReturnMoments(gamma=0.5)
        moments.update(torch.tensor([4.0, 2.0]))
        moments.update(torch.tensor([torch.nan, -1.0]))
        assert (moments.count, moments.mean, moments.rolling) == (3, 3.0, 1.0)
        assert moments.std == pytest.approx(3**0.5)

    @pytest.mark.parametrize("kind", [RunningMoments, RollingReturnMoments])
    def test_state_comes_back_through_json(self, kind):
        one, two = kind(), kind()
        one.update(torch.tensor([1.0, 5.0]))
        two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        for moments in (one, two):
            moments.update(torch.tensor([2.0]))
        assert one == two


def test_everything_off_puts_the_score_at_the_last_token_that_counts(rollout):
    assert shaper()(rollout).tolist() == [[0, 0, 2], [-1, 0, 0], [5, 0, 0]]


def test_kl_penalty_stands_at_every_token(rollout):
    # −½·(log π − log π_ref): row 0: −½·1, −½·(−1); row 1: −½·½; row 2: 0. NaN outside the mask.
    got = shaper(kl_coef=0.5)(rollout)
    expected = [[-0.5, 0, 2 + 0.5], [-1 - 0.25, 0, 0], [5, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_the_default_penalty_is_p1s(rollout):
    torch.testing.assert_close(RewardShaper()(rollout), shaper(kl_coef=0.05)(rollout))


def test_normalization_takes_the_new_scores_in_first(rollout):
    # Mean of [2, −1, 5] = 2, unbiased std 3.
    subject = shaper(normalize=True)
    torch.testing.assert_close(subject.shape(rollout.scores), torch.tensor([0.0, -1.0, 1.0]))
    # Then [8]: mean 3.5, std √15 over the history of four.
    got = subject.shape(torch.tensor([8.0]))
    torch.testing.assert_close(got, torch.tensor([4.5 / 15**0.5]))


def test_scaling_divides_alone(rollout):
    got = shaper(scale=True).shape(rollout.scores)
    torch.testing.assert_close(got, torch.tensor([2.0, -1.0, 5.0]) / 3)


def test_scaling_by_the_rolling_sum(rollout):
    # P1's variant, γ = 0: the sum is the score itself; γ = 1: 2, 1, 6, of std √7.
    same = shaper(scale=True, moments=RollingReturnMoments(gamma=0.0)).shape(rollout.scores)
    torch.testing.assert_close(same, rollout.scores / 3)
    summed = shaper(scale=True, moments=RollingReturnMoments(gamma=1.0)).shape(rollout.scores)
    torch.testing.assert_close(summed, rollout.scores / 7**0.5)


@pytest.mark.parametrize("option", ["normalize", "scale"])
@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0]])
def test_a_first_score_is_finite(option, scores):
    """C's std of one number is infinite."""
    got = shaper(**{option: True}).shape(torch.tensor(scores))
    assert got.tolist() == [0.0 if option == "normalize" else 3.0] * len(scores)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip": 1.5}, [1.5, -1.0, 1.5]),  # of the scores as they are
        ({"clip": 0.8, "normalize": True}, [0.0, -0.8, 0.8]),
        ({"clip": 0.5, "scale": True}, [0.5, -1 / 3, 0.5]),
    ],
)
def test_clip(rollout, options, expected):
    torch.testing.assert_close(shaper(**options).shape(rollout.scores), torch.tensor(expected))


def test_clip_spares_the_kl_penalty(rollout):
    got = shaper(clip=0.1, kl_coef=0.5)(rollout)
    torch.testing.assert_close(got[0], torch.tensor([-0.5, 0.0, 0.1 + 0.5]))


def test_penalty_for_a_missing_end_survives_the_clip(rollout):
    got = shaper(clip=0.8, normalize=True, missing_eos_penalty=2.0)(rollout)
    torch.testing.assert_close(got[:, 0], torch.tensor([0.0, -0.8, 0.8 - 2.0]))


def test_penalty_for_a_missing_end_needs_no_score_of_the_whole(rollout):
    dense = replace(rollout, scores=None, token_scores=torch.ones(3, 3))
    got = shaper(missing_eos_penalty=2.0)(dense)
    assert got.tolist() == [[1, 0, 1], [1, 0, 0], [1 - 2, 0, 0]]


def test_a_score_that_does_not_apply_is_none(rollout):
    """Normalized too it is 0, not 0 − mean; and the moments have not seen it."""
    subject = shaper(normalize=True, clip=0.8, moments=RunningMoments(10.0, 7.0, 90.0))
    got = subject.shape(torch.tensor([torch.nan, 7.0]))
    assert got[0].item() == 0.0
    assert subject.moments.count == 11


def test_token_scores_stand_where_they_are_given(rollout):
    dense = torch.tensor([[1.0, torch.nan, 2.0], [3.0, 9.0, 9.0], [4.0, 9.0, 9.0]])
    both = replace(rollout, token_scores=dense)
    assert shaper()(both).tolist() == [[1, 0, 2 + 2], [3 - 1, 0, 0], [4 + 5, 0, 0]]
    alone = replace(both, scores=None)
    assert shaper(kl_coef=0.0)(alone).tolist() == [[1, 0, 2], [3, 0, 0], [4, 0, 0]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"normalize": True}, r"normalize=True\)"),
        ({"scale": True}, r"scale=True\)"),
        ({"clip": 0.8, "normalize": True}, r"normalize=True, clip=0\.8\)"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_token_scores_escape_no_switch_in_silence(rollout, options, named, beside):
    dense = replace(rollout, token_scores=torch.ones(3, 3))
    if not beside:
        dense = replace(dense, scores=None)
    subject = shaper(**options)
    with pytest.raises(ValueError, match=rf"^RewardShaper\({named}: a reward gave a number per"):
        subject(dense)
    assert subject.moments.count == 0


def test_token_scores_stand_beside_the_kl_penalty(rollout):
    dense = replace(rollout, scores=None, token_scores=torch.ones(3, 3))
    expected = [[1 - 0.5, 0, 1 + 0.5], [1 - 0.25, 0, 0], [1, 0, 0]]
    torch.testing.assert_close(shaper(kl_coef=0.5)(dense), torch.tensor(expected))


def test_score_after_the_end(rollout):
    """As in TRL: one step after the last token, but at it where the response was cut."""
    assert not RewardShaper().score_after_end
    finished = replace(rollout, mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool())
    got = shaper(score_after_end=True)(finished.with_end_states(limit=3))
    assert got.tolist() == [[0, 0, 2, 0], [0, 0, -1, 0], [0, 5, 0, 0]]


def test_rows_without_any_token_get_nothing():
    mask = torch.tensor([[False, False], [True, False]])
    got = add_at_last(torch.zeros(2, 2), torch.tensor([7.0, 8.0]), mask)
    assert got.tolist() == [[0, 0], [8, 0]]


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)]
)
def test_adaptive_penalty(kl, factor):
    subject = RewardShaper(kl_coef=0.2)
    subject.adapt(kl, target=6.0)
    assert subject.kl_coef == pytest.approx(0.2 * factor)


def test_state_comes_back_through_json(rollout):
    one, two = (RewardShaper(kl_coef=0.3, normalize=True) for _ in range(2))
    one(rollout)
    one.adapt(9.0, target=6.0)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    torch.testing.assert_close(two(rollout), one(rollout), rtol=0, atol=0)
    assert two.state_dict() == one.state_dict()


def test_shapers_share_no_history():
    one, two = RewardShaper(), RewardShaper()
    one.moments.update(torch.ones(3))
    assert two.moments.count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, r"RewardShaper\(kl_coef=\): got -0.1"),
        ({"clip": 0.0}, r"RewardShaper\(clip=\): got 0.0"),
        ({"missing_eos_penalty": -1.0}, r"RewardShaper\(missing_eos_penalty=\)"),
        ({"normalize": True, "scale": True}, "Choose one"),
        ({"normalize": True, "moments": RollingReturnMoments()}, "use scale=True with it"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        RewardShaper(**options)


@pytest.mark.parametrize("name", ["kl_coef", "clip", "missing_eos_penalty"])
def test_small_numbers_are_accepted(name):
    assert getattr(RewardShaper(**{name: 0.01}), name) == 0.01


def test_missing_parts_are_named(rollout):
    with pytest.raises(ValueError, match="no log-probabilities of policy and reference"):
        RewardShaper()(replace(rollout, ref_logprobs=None))
    with pytest.raises(ValueError, match=r"rollout\.scores: got None"):
        shaper()(replace(rollout, scores=None))
    with pytest.raises(ValueError, match="kl_coef is None"):
        shaper().adapt(1.0, target=2.0)


def model_with_moments(mean, std):
    model = torch.nn.Module()
    model.config = SimpleNamespace(score_mean=mean, score_std=std)
    return model


def test_moments_of_a_reward_model_weigh_256_scores():
    moments = RunningMoments.of_reward_model(model_with_moments(2.0, 3.0))
    assert moments.state_dict() == {"count": 256.0, "mean": 2.0, "m2": 9.0 * 255}
    assert RunningMoments.of_reward_model(model_with_moments(2.0, 3.0), count=2).m2 == 9.0


@pytest.mark.parametrize(("mean", "std", "count"), [(None, 3, 9), (2, None, 9), (2, 3, 1.5)])
def test_moments_of_a_reward_model_need_both_numbers_and_a_count_of_two(mean, std, count):
    with pytest.raises(ValueError, match="expected two numbers"):
        RunningMoments.of_reward_model(model_with_moments(mean, std), count=count)
