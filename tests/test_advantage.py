"""Estimators: GAE's switches one by one, and siblings of the same signature."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mossrlhf.advantage import AdvantageEstimator, GroupRelative, LeaveOneOut, ReinforcePlusPlus
from mossrlhf.functional import gae
from mossrlhf.types import Advantages

NUMBERS = st.floats(-5, 5)


@st.composite
def batches(draw):
    """Rewards, values, mask: holes, empty rows, NaN outside the mask."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    mask = draw(arrays(np.bool_, shape))
    rewards, values = (draw(arrays(np.float64, shape, elements=NUMBERS)) for _ in range(2))
    numbers = (np.where(mask, rewards, np.nan), np.where(mask, values, np.nan))
    return *map(torch.from_numpy, numbers), torch.from_numpy(mask)


@pytest.fixture
def batch():
    """Two responses of 3 and 2 tokens; the first has a hole."""
    rewards = torch.tensor([[0.0, 9.0, 1.0], [0.5, -1.0, 9.0]])
    values = torch.tensor([[0.2, 9.0, 0.4], [0.0, 0.3, 9.0]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    return rewards, values, mask


def test_defaults_are_gae(batch):
    """On: γ = 1, λ = 0.95. Off: whitening, clip, another λ for the critic."""
    got = AdvantageEstimator()(*batch)
    # Row 0: A_2 = 1 − 0.4 = 0.6, A_0 = 0.4 − 0.2 + 0.95·0.6; row 1: A_1 = −1.3, A_0 = 0.8 − 1.235.
    expected = torch.tensor([[0.77, 0.0, 0.6], [-0.435, -1.3, 0.0]])
    torch.testing.assert_close(got.advantages, expected)
    torch.testing.assert_close(got.returns, torch.where(batch[2], expected + batch[1], 0.0))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("bootstrap", [None, torch.tensor([2.0, -1.0])])
def test_gamma_lambda_and_bootstrap_reach_the_recursion(batch, gamma, lam, bootstrap):
    got = AdvantageEstimator(gamma=gamma, lam=lam)(*batch, bootstrap=bootstrap)
    expected = gae(*batch, gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(got.advantages, expected)


@given(batches())
def test_lambda_of_the_critic_is_its_own(batch):
    """`value_lam` changes the targets alone; at 1 they are the rewards to go."""
    rewards, values, mask = batch
    plain = AdvantageEstimator(lam=0.5)(*batch)
    decoupled = AdvantageEstimator(lam=0.5, value_lam=1.0)(*batch)
    torch.testing.assert_close(decoupled.advantages, plain.advantages)
    to_go = gae(rewards, torch.zeros_like(values), mask, lam=1.0)
    torch.testing.assert_close(decoupled.returns, to_go)
    targets = plain.advantages + torch.where(mask, values, 0.0)
    torch.testing.assert_close(plain.returns, targets)


@given(batches(), st.sampled_from([0, 1]))
def test_whitening(batch, correction):
    mask = batch[2].numpy()
    plain = AdvantageEstimator()(*batch)
    whitened = AdvantageEstimator(whiten=True, correction=correction)(*batch)
    raw = plain.advantages.numpy()[mask]
    assert (whitened.advantages.numpy()[~mask] == 0).all()
    torch.testing.assert_close(whitened.returns, plain.returns)  # the targets stay as they are
    if len(raw) > correction:
        expected = (raw - raw.mean()) / np.sqrt(raw.var(ddof=correction) + 1e-8)
        np.testing.assert_allclose(whitened.advantages.numpy()[mask], expected, atol=1e-6)


def test_whitening_over_the_counted_tokens_alone(batch):
    """A state that counts for the critic only is in the recursion, not in the moments."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    plain = AdvantageEstimator()(batch[0], batch[1], mask)
    got = AdvantageEstimator(whiten=True)(batch[0], batch[1], mask, counted=batch[2])
    raw = plain.advantages[batch[2]]
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(got.advantages[batch[2]], expected)
    assert (got.advantages[~batch[2]] == 0).all()
    torch.testing.assert_close(got.returns, plain.returns)


def test_whitening_over_two_processes_that_hold_the_same(batch):
    """The unbiased variance of twelve numbers, not of four: reductions add up."""
    estimator = AdvantageEstimator(whiten=True, correction=1)
    got = estimator(*batch, reduce=lambda tensor: 3 * tensor)
    tripled = estimator(*(torch.cat([x] * 3) for x in batch))
    torch.testing.assert_close(got.advantages, tripled.advantages[:2])


def test_clipping_comes_after_whitening(batch):
    whitened = AdvantageEstimator(whiten=True)(*batch).advantages
    clipped = AdvantageEstimator(whiten=True, clip=0.8)(*batch).advantages
    assert whitened.abs().max() > 0.8
    torch.testing.assert_close(clipped, whitened.clamp(-0.8, 0.8))
    bare = AdvantageEstimator(clip=0.5)(*batch)
    torch.testing.assert_close(bare.advantages, torch.tensor([[0.5, 0.0, 0.5], [-0.435, -0.5, 0]]))
    torch.testing.assert_close(bare.returns, AdvantageEstimator()(*batch).returns)


REWARDS = torch.tensor([[1.0, 2.0, 9.0], [0.0, 9.0, 1.0], [4.0, 9.0, 9.0], [0.0, 0.0, 2.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 1, 1]]).bool()
# Returns 3, 1 | 4, 2: group means 2 and 3, deviations ±1, unbiased std √2.


@pytest.mark.parametrize(
    ("estimator", "rows"),
    [
        (GroupRelative(group_size=2), [2**-0.5, -(2**-0.5)] * 2),
        (GroupRelative(group_size=2, scale=False), [1.0, -1.0] * 2),
        (LeaveOneOut(group_size=2), [2.0, -2.0] * 2),
    ],
)
def test_group_baselines(estimator, rows):
    got = estimator(REWARDS, torch.full_like(REWARDS, torch.nan), MASK)
    expected = torch.where(MASK, torch.tensor(rows)[:, None], 0.0)
    torch.testing.assert_close(got.advantages, expected, atol=1e-4, rtol=0)
    returns = torch.tensor([3.0, 1.0, 4.0, 2.0])[:, None]
    torch.testing.assert_close(got.returns, torch.where(MASK, returns, 0.0))


def test_reinforce_plus_plus():
    got = ReinforcePlusPlus(gamma=0.5)(REWARDS, REWARDS, MASK)
    # Rewards to go: [1 + 2/2, 2], [0 + 1/2, 1], [4], [0 + 0 + 2/4, 2/2, 2].
    to_go = torch.tensor([2.0, 2.0, 0.5, 1.0, 4.0, 0.5, 1.0, 2.0])
    expected = (to_go - to_go.mean()) / to_go.std(correction=0)
    torch.testing.assert_close(got.advantages[MASK], expected)
    assert (got.advantages[~MASK] == 0).all()
    undiscounted = ReinforcePlusPlus(gamma=1.0)(REWARDS, REWARDS, MASK)
    usual = ReinforcePlusPlus()(REWARDS, REWARDS, MASK)
    assert torch.equal(usual.advantages, undiscounted.advantages)


@pytest.mark.parametrize(
    "estimator",
    [
        AdvantageEstimator(),
        GroupRelative(group_size=2),
        LeaveOneOut(group_size=2),
        ReinforcePlusPlus(),
        lambda rewards, values, mask, bootstrap=None: Advantages(rewards - values, rewards),
    ],
)
def test_one_signature(estimator):
    got = estimator(REWARDS, REWARDS, MASK, bootstrap=torch.zeros(4))
    assert isinstance(got, Advantages)
    assert got.advantages.shape == got.returns.shape == MASK.shape


@pytest.mark.parametrize(
    "option",
    [
        {"gamma": 1.1}, {"gamma": -0.1}, {"lam": 1.1}, {"value_lam": 2.0}, {"correction": 2},
        {"clip": 0.0},
    ],
)  # fmt: skip
def test_refusals(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"AdvantageEstimator\({name}=\)"):
        AdvantageEstimator(**option)


@pytest.mark.parametrize("estimator", [GroupRelative, LeaveOneOut])
def test_a_group_has_two_responses_at_least(estimator):
    assert estimator(group_size=2).group_size == 2
    with pytest.raises(ValueError, match=r"\(group_size=\)"):
        estimator(group_size=1)


@pytest.mark.parametrize("option", ["gamma", "lam", "value_lam"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_share_is_accepted(option, share):
    assert getattr(AdvantageEstimator(**{option: share}), option) == share


def test_a_slip_is_recognized():
    with pytest.raises(TypeError, match="did you mean 'lam'"):
        AdvantageEstimator(lamb=0.9)
