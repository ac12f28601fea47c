"""Masked reductions against numpy on the entries of the mask; outside it stands NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mossrlhf.functional import masked_mean, masked_moments, masked_sum, upcast, whiten, widest


@st.composite
def masked(draw):
    """Values and a mask of the same shape, holes and empty rows included; NaN outside it."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
    values = draw(arrays(np.float64, shape, elements=st.floats(-10, 10)))
    mask = draw(arrays(np.bool_, shape))
    return np.where(mask, values, np.nan), mask


def tensors(pair):
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


@given(masked())
def test_sum_and_mean(pair):
    x, mask = pair
    kept = np.where(mask, x, 0.0)
    counts = np.maximum(mask.sum(1), 1)
    assert masked_sum(*tensors(pair)).item() == pytest.approx(kept.sum())
    assert masked_mean(*tensors(pair)).item() == pytest.approx(kept.sum() / max(mask.sum(), 1))
    np.testing.assert_allclose(masked_sum(*tensors(pair), dim=1).numpy(), kept.sum(1))
    np.testing.assert_allclose(masked_mean(*tensors(pair), dim=1).numpy(), kept.sum(1) / counts)


@given(masked(), st.sampled_from([0, 1]))
def test_moments(pair, correction):
    x, mask = pair
    mean, variance = masked_moments(*tensors(pair), correction=correction)
    count = mask.sum()
    expected_mean = x[mask].mean() if count else 0.0
    expected = x[mask].var(ddof=correction) if count > correction else 0.0
    assert mean.item() == pytest.approx(expected_mean)
    assert variance.item() == pytest.approx(expected)


@given(masked(), st.sampled_from([0, 1]), st.booleans())
def test_whiten(pair, correction, shift_mean):
    x, mask = pair
    got = whiten(*tensors(pair), shift_mean=shift_mean, correction=correction, eps=1e-3).numpy()
    assert (got[~mask] == 0).all()
    if mask.sum() > correction:
        mean, variance = x[mask].mean(), x[mask].var(ddof=correction)
        expected = (x[mask] - mean) / np.sqrt(variance + 1e-3) + (0.0 if shift_mean else mean)
        np.testing.assert_allclose(got[mask], expected, atol=1e-9)


def test_whiten_a_single_entry_is_zero_not_nan():
    got = whiten(torch.tensor([[3.0, float("nan")]]), torch.tensor([[True, False]]), correction=1)
    assert got.tolist() == [[0.0, 0.0]]


def test_two_processes_whiten_as_one():
    """Each reduction gets what the other process adds: here its count, sum and squares."""
    mine, other = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[8.0, 16.0]])
    both = torch.cat([mine, other], dim=1)
    # Order of the reductions: number of entries, their sum, squares around the common mean 6.2.
    others = iter([torch.tensor(2.0), other.sum(), ((other - 6.2) ** 2).sum()])
    got = whiten(
        mine, torch.ones(1, 3, dtype=torch.bool), reduce=lambda tensor: tensor + next(others)
    )
    expected = (mine - both.mean()) / both.std(correction=0)
    torch.testing.assert_close(got, expected)
    assert next(others, None) is None


REDUCTIONS = {
    "sum": masked_sum,
    "sum of rows": lambda x, mask: masked_sum(x, mask, dim=1),
    "mean": masked_mean,
    "mean of rows": lambda x, mask: masked_mean(x, mask, dim=1),
    "moments": lambda x, mask: torch.stack(masked_moments(x, mask)),
    "unbiased moments": lambda x, mask: torch.stack(masked_moments(x, mask, correction=1)),
    "whiten": whiten,
    "scale": lambda x, mask: whiten(x, mask, shift_mean=False),
}


@pytest.mark.parametrize("outside", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_is_masked_has_no_part_in_value_or_gradient(name, outside):
    """Both are those with zeros outside the mask; 0 × NaN in the backward pass would be NaN."""
    reduction = REDUCTIONS[name]
    mask = torch.tensor([[True, False, True], [False, True, False]])
    inside = torch.tensor([[1.0, 0.0, 3.0], [0.0, -2.5, 0.0]], dtype=torch.float64)
    wild, tame = (torch.where(mask, inside, other).requires_grad_() for other in (outside, 0.0))
    got, expected = reduction(wild, mask), reduction(tame, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    along = torch.linspace(1, 2, got.numel(), dtype=torch.float64).view_as(got)
    got.backward(along)
    expected.backward(along)
    assert wild.grad.isfinite().all()
    assert not wild.grad[~mask].any()
    torch.testing.assert_close(wild.grad[mask], tame.grad[mask], rtol=0, atol=0)
    assert torch.autograd.gradcheck(reduction, (tame, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_upcast_is_float32(dtype):
    assert upcast(torch.ones(2, dtype=dtype)).dtype == torch.float32


def test_upcast_leaves_float64():
    assert upcast(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_variance_is_of_the_population_unless_asked_otherwise():
    # (1 − 3)² + (5 − 3)² = 8 over 2 entries; whitened: ±2/√4.
    x, mask = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([True, True, False])
    assert masked_moments(x, mask)[1].item() == 4.0
    assert torch.allclose(whiten(x, mask), torch.tensor([-1.0, 1.0, 0.0]))


def test_sums_over_many_tokens_are_in_float64():
    assert widest(torch.ones(2)).dtype == torch.float64
    assert widest(torch.ones(2, dtype=torch.long)).dtype == torch.float64


def test_whiten_adds_1e_8_to_the_variance_by_default():
    x = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)
    got = whiten(x, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(got, x / (1e-8 + 1e-8) ** 0.5)
