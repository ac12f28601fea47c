"""Log-probabilities, entropy and KL estimates against numpy, and by enumerating a small softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mossrlhf.functional import (
    entropy_from_logits,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    token_logprobs,
    token_stats,
)

LOGITS = arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 7)),
    elements=st.floats(-20, 20),
)
TEMPERATURES = st.sampled_from([0.5, 0.8, 1.0, 2.0])


def log_softmax(z):
    """Row by row, in float64, from the definition."""
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@given(LOGITS, TEMPERATURES, st.integers(0, 2**32 - 1))
def test_token_stats(logits, temperature, seed):
    ids = np.random.default_rng(seed).integers(0, logits.shape[-1], logits.shape[:-1])
    logp, ref = log_softmax(logits / temperature), log_softmax(-logits / temperature)
    z = torch.from_numpy(logits)
    got = token_stats(z, torch.from_numpy(ids), temperature, ref_logits=-z)
    total = np.log(np.exp(logits / temperature).sum(-1))
    np.testing.assert_allclose(got.logsumexp, total, atol=1e-9)
    np.testing.assert_allclose(got.kl, (np.exp(logp) * (logp - ref)).sum(-1), atol=1e-9)
    for place in np.ndindex(ids.shape):
        assert got.ref_logprob[place].item() == pytest.approx(ref[place][ids[place]], abs=1e-9)
        assert got.logprob[place].item() == pytest.approx(logp[place][ids[place]], abs=1e-9)
        entropy = -sum(np.exp(lp) * lp for lp in logp[place])
        assert got.entropy[place].item() == pytest.approx(entropy, abs=1e-9)


def test_entropy_is_left_out_where_not_asked_for():
    assert token_stats(torch.zeros(1, 4), torch.tensor([0]), entropy=False).entropy is None


def test_hand_computed():
    # softmax([0, ln 3]) = [1/4, 3/4]; at τ = 1/2 the logits are [0, ln 9]: [1/10, 9/10].
    logits, ids = torch.tensor([0.0, np.log(3.0)]), torch.tensor(1)
    assert token_logprobs(logits, ids).item() == pytest.approx(np.log(3 / 4))
    assert token_logprobs(logits, ids, 0.5).item() == pytest.approx(np.log(9 / 10))
    # H = ln 4 − ¾ ln 3.
    assert entropy_from_logits(logits).item() == pytest.approx(np.log(4) - 0.75 * np.log(3))


def test_bf16_logits_are_scored_in_float32():
    """Exactly the float32 result; a log-softmax in bf16 is visibly off."""
    logits = (10 * torch.randn(64, 1000)).bfloat16()
    ids = torch.randint(1000, (64,))
    got = token_stats(logits, ids)
    exact = torch.from_numpy(log_softmax(logits.double().numpy()))
    picked = exact.gather(-1, ids[:, None]).squeeze(-1)
    assert got.logprob.dtype == got.entropy.dtype == torch.float32
    torch.testing.assert_close(got.logprob.double(), picked, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        got.entropy.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0
    )
    naive = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    assert (naive.double() - picked).abs().max() > 0.02
    assert exact_kl(logits, logits).dtype == torch.float32


def test_impossible_tokens_add_nothing_to_entropy_or_gradient():
    # Two tokens at 1/2 each, two impossible ones: H = ln 2, and no gradient (a maximum).
    logits = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.backward()
    assert entropy.item() == pytest.approx(np.log(2))
    torch.testing.assert_close(logits.grad, torch.zeros(4))


def test_entropy_gradient():
    """∂H/∂z_v = −p_v (log p_v + H), at a place with an impossible token."""
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    entropy_from_logits(logits).backward()
    logp = log_softmax(logits.detach().numpy()[:3])
    entropy = -(np.exp(logp) * logp).sum()
    expected = [*(-np.exp(logp) * (logp + entropy)), 0.0]
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("function", [entropy_from_logits, lambda z: exact_kl(z, z)])
def test_broken_logits_are_not_hidden(function):
    assert function(torch.tensor([0.0, float("nan")])).isnan()


@given(LOGITS, TEMPERATURES, st.integers(0, 2**32 - 1))
def test_exact_kl(logits, temperature, seed):
    other = np.random.default_rng(seed).normal(0, 3, logits.shape)
    logp, ref = log_softmax(logits / temperature), log_softmax(other / temperature)
    got = exact_kl(torch.from_numpy(logits), torch.from_numpy(other), temperature)
    for place in np.ndindex(logits.shape[:-1]):
        expected = sum(np.exp(a) * (a - b) for a, b in zip(logp[place], ref[place], strict=True))
        assert got[place].item() == pytest.approx(expected, abs=1e-9)
        assert got[place].item() >= -1e-9


def test_exact_kl_over_a_smaller_support():
    # π = [1/2, 1/2, 0] and the reference is uniform over three: KL = ln(3/2); both impossible: 0.
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    value = exact_kl(logits, torch.zeros(3))
    value.backward()
    assert value.item() == pytest.approx(np.log(3 / 2))
    assert logits.grad.isfinite().all()
    assert exact_kl(logits, logits.detach()).item() == 0.0


class TestEstimatorsByEnumeration:
    """Expectations over every token of a softmax of five, so nothing is sampled."""

    @pytest.fixture
    def logits(self):
        return torch.tensor([0.5, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64, requires_grad=True)

    @pytest.fixture
    def reference(self):
        return torch.tensor([1.0, 0.2, -0.5, 0.3, 0.0], dtype=torch.float64).log_softmax(-1)

    def expectation(self, estimator, logits, reference):
        """E_π[k], the distribution sampled from held fixed, as in training."""
        logp = logits.log_softmax(-1)
        return (logp.detach().exp() * estimator(logp, reference)).sum()

    @pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
    def test_unbiased(self, estimator, logits, reference):
        value = self.expectation(estimator, logits, reference)
        torch.testing.assert_close(value, exact_kl(logits, reference))

    def test_k2_is_biased_and_small_for_small_divergence(self, logits, reference):
        assert self.expectation(kl_k2, logits, reference) != exact_kl(logits, reference)
        near = logits.detach().log_softmax(-1) + 1e-3 * torch.arange(5)
        near_kl = exact_kl(logits, near)
        biased = self.expectation(kl_k2, logits, near.log_softmax(-1))
        assert biased.item() == pytest.approx(near_kl.item(), rel=1e-2)

    @pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
    def test_never_negative(self, estimator, logits, reference):
        assert (estimator(logits.log_softmax(-1), reference) >= 0).all()

    def test_k1_is_signed(self, logits, reference):
        values = kl_k1(logits.log_softmax(-1), reference)
        assert values.min() < 0 < values.max()

    def gradient(self, value, logits):
        return torch.autograd.grad(value, logits)[0]

    def test_gradient_of_k1_vanishes_in_expectation(self, logits, reference):
        got = self.gradient(self.expectation(kl_k1, logits, reference), logits)
        torch.testing.assert_close(got, torch.zeros_like(got))

    def test_gradient_of_k2_is_the_divergences(self, logits, reference):
        got = self.gradient(self.expectation(kl_k2, logits, reference), logits)
        torch.testing.assert_close(got, self.gradient(exact_kl(logits, reference), logits))
        assert got.abs().max() > 0.1

    def test_gradient_of_k3_is_the_reverse_divergences(self, logits, reference):
        got = self.gradient(self.expectation(kl_k3, logits, reference), logits)
        torch.testing.assert_close(got, self.gradient(exact_kl(reference, logits), logits))
        assert (got - self.gradient(exact_kl(logits, reference), logits)).abs().max() > 0.1
