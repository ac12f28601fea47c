"""Advantages against loops written from the definitions, holes squeezed out first."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mossrlhf.functional import (
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    sequence_returns,
)

NUMBERS = st.floats(-5, 5)
SHARES = st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0])


@st.composite
def responses(draw):
    """Rewards, values, mask and bootstrap; NaN outside the mask."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6)))
    mask = draw(arrays(np.bool_, shape))
    rewards, values = (draw(arrays(np.float64, shape, elements=NUMBERS)) for _ in range(2))
    bootstrap = draw(arrays(np.float64, shape[:1], elements=NUMBERS))
    return np.where(mask, rewards, np.nan), np.where(mask, values, np.nan), mask, bootstrap


def gae_by_sums(rewards, values, mask, gamma, lam, bootstrap):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the kept tokens of a row, written out as that sum."""
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        kept = np.flatnonzero(mask[b])
        r, v = rewards[b, kept], np.append(values[b, kept], bootstrap[b])
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(kept))]
        for t, place in enumerate(kept):
            out[b, place] = sum((gamma * lam) ** i * d for i, d in enumerate(delta[t:]))
    return out


@given(responses(), SHARES, SHARES, st.booleans())
def test_gae(batch, gamma, lam, bootstrapped):
    rewards, values, mask, bootstrap = batch
    after = bootstrap if bootstrapped else np.zeros_like(bootstrap)
    got = gae(
        *map(torch.from_numpy, (rewards, values, mask)),
        gamma=gamma,
        lam=lam,
        bootstrap=torch.from_numpy(bootstrap) if bootstrapped else None,
    )
    expected = gae_by_sums(rewards, values, mask, gamma, lam, after)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_gae_by_hand():
    # γ = 1/2, λ = 1/2; r = [0, 0, 4], V = [1, 2, 2], bootstrap 6, the middle token masked out.
    # δ_2 = 4 + 6/2 − 2 = 5;  δ_0 = 0 + 2/2 − 1 = 0;  A_0 = 0 + 5/4.
    got = gae(
        torch.tensor([[0.0, 7.0, 4.0]]),
        torch.tensor([[1.0, 9.0, 2.0]]),
        torch.tensor([[True, False, True]]),
        gamma=0.5,
        lam=0.5,
        bootstrap=torch.tensor([6.0]),
    )
    assert got.tolist() == [[1.25, 0.0, 5.0]]


@given(responses())
def test_gae_at_both_ends_of_lambda(batch):
    rewards, values, mask, _ = map(torch.from_numpy, batch)
    to_go = discounted_returns(rewards, mask, 0.9)
    monte_carlo = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(monte_carlo[mask], (to_go - values)[mask])
    one_step = gae(rewards, values, mask, gamma=0.0, lam=0.0)
    torch.testing.assert_close(one_step[mask], (rewards - values)[mask])


@given(responses(), SHARES)
def test_discounted_returns(batch, gamma):
    rewards, _, mask, _ = batch
    got = discounted_returns(torch.from_numpy(rewards), torch.from_numpy(mask), gamma).numpy()
    for b in range(len(mask)):
        kept = rewards[b, mask[b]]
        expected = [sum(gamma**i * r for i, r in enumerate(kept[t:])) for t in range(len(kept))]
        np.testing.assert_allclose(got[b, mask[b]], expected, atol=1e-9)
    assert (got[~mask] == 0).all()


@given(responses())
def test_sequence_returns(batch):
    rewards, _, mask, _ = batch
    got = sequence_returns(torch.from_numpy(rewards), torch.from_numpy(mask))
    np.testing.assert_allclose(got, [row[m].sum() for row, m in zip(rewards, mask, strict=True)])


@given(responses(), SHARES)
def test_reinforce_plus_plus(batch, gamma):
    rewards, _, mask, _ = map(torch.from_numpy, batch)
    got = reinforce_plus_plus(rewards, mask, gamma).numpy()
    to_go = discounted_returns(rewards, mask, gamma).numpy()[mask.numpy()]
    assert (got[~mask.numpy()] == 0).all()
    if len(to_go):
        expected = (to_go - to_go.mean()) / np.sqrt(to_go.var() + 1e-8)
        np.testing.assert_allclose(got[mask.numpy()], expected, atol=1e-6)
    undiscounted = reinforce_plus_plus(rewards, mask, 1.0)
    torch.testing.assert_close(reinforce_plus_plus(rewards, mask), undiscounted, equal_nan=True)


RETURNS = torch.tensor([1.0, 3.0, 8.0, 5.0, 5.0, 5.0])


def test_group_relative_by_hand():
    assert torch.equal(group_relative(RETURNS, 3), group_relative(RETURNS, 3, eps=1e-4))
    # Group [1, 3, 8]: mean 4, deviations [−3, −1, 4], unbiased std √(26/2) = √13.
    got = group_relative(RETURNS, 3, eps=0.0001)
    expected = torch.tensor([-3.0, -1.0, 4.0]) / (13**0.5 + 1e-4)
    torch.testing.assert_close(got, torch.cat([expected, torch.zeros(3)]))


def test_group_relative_without_the_division():
    assert group_relative(RETURNS, 3, eps=None).tolist() == [-3.0, -1.0, 4.0, 0.0, 0.0, 0.0]


def test_leave_one_out_by_hand():
    # 1 − (3 + 8)/2 = −4.5;  3 − (1 + 8)/2 = −1.5;  8 − (1 + 3)/2 = 6.
    assert leave_one_out(RETURNS, 3).tolist() == [-4.5, -1.5, 6.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("baseline", [group_relative, leave_one_out])
@pytest.mark.parametrize("size", [0, 1, 4])
def test_groups_must_fit(baseline, size):
    with pytest.raises(ValueError, match=f"group_size: got {size} for 6 responses"):
        baseline(RETURNS, size)


@pytest.mark.parametrize("name", ["gae", "discounted_returns", "reinforce_plus_plus"])
def test_what_is_masked_has_no_part_in_the_gradient(name):
    mask = torch.tensor([[True, False, True], [True, True, False]])
    inside = torch.tensor([[1.0, 0.0, 3.0], [2.0, -2.5, 0.0]], dtype=torch.float64)
    rewards = torch.where(mask, inside, torch.nan).requires_grad_()
    values = torch.where(mask, -inside, torch.nan).requires_grad_()
    got = {
        "gae": lambda: gae(rewards, values, mask, gamma=0.9),
        "discounted_returns": lambda: discounted_returns(rewards, mask, gamma=0.9),
        "reinforce_plus_plus": lambda: reinforce_plus_plus(rewards, mask, gamma=0.9),
    }[name]()
    got.square().sum().backward()
    assert got.isfinite().all()
    for leaf in (rewards, values) if name == "gae" else (rewards,):
        assert leaf.grad.isfinite().all()
        assert leaf.grad[mask].any()
        assert not leaf.grad[~mask].any()


def test_defaults_are_those_documented():
    """γ = 1 and λ = 0.95; discounted returns with γ = 1; ε = 1e-4 in a group's deviation."""
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # δ_1 = 2 − 0.25 = 1.75; δ_0 = 1 + 0.25 − 0.5 = 0.75; A_0 = 0.75 + 0.95·1.75 = 2.4125.
    assert torch.allclose(gae(rewards, values, mask), torch.tensor([[2.4125, 1.75]]))
    assert torch.allclose(discounted_returns(rewards, mask), torch.tensor([[3.0, 2.0]]))
    # Returns 0 and 1e-3: mean 5e-4, unbiased deviation 7.0711e-4; 5e-4 / 8.0711e-4 = 0.61950.
    got = group_relative(torch.tensor([0.0, 1e-3], dtype=torch.float64), 2)
    assert got[1].item() == pytest.approx(0.61950, abs=1e-5)
