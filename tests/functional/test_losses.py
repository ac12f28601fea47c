"""Losses per token and per pair: tables computed by hand, gradients included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mossrlhf.functional import clipped_policy_loss, clipped_value_loss, lm_loss, ranking_loss

CLIP, WIDE = (0.2, 0.2), (0.2, 0.4)

# ratio ρ, advantage A, clip, dual clip → loss, and its gradient by log π (which is −ρA or 0).
POLICY_CASES = [
    (1.0, 2.0, CLIP, None, -2.0, -2.0),
    (0.5, 1.0, CLIP, None, -0.5, -0.5),  # A > 0 and ρ too small: not clipped, min(0.5, 0.8)
    (1.5, 1.0, CLIP, None, -1.2, 0.0),  # A > 0 and ρ too large: clipped, min(1.5, 1.2)
    (0.5, -1.0, CLIP, None, 0.8, 0.0),  # A < 0 and ρ too small: clipped, min(−0.5, −0.8)
    (1.5, -1.0, CLIP, None, 1.5, 1.5),  # A < 0 and ρ too large: not clipped
    (1.3, 1.0, WIDE, None, -1.3, -1.3),  # within 1 + 0.4
    (1.5, 1.0, WIDE, None, -1.4, 0.0),
    (0.7, -1.0, WIDE, None, 0.8, 0.0),
    (1.5, 1.0, None, None, -1.5, -1.5),  # no clip at all
    (0.5, -1.0, None, None, 0.5, 0.5),
    (5.0, -1.0, CLIP, 3.0, 3.0, 0.0),  # dual clip: at most c|A|
    (2.0, -1.0, CLIP, 3.0, 2.0, 2.0),
    (5.0, -1.0, None, 3.0, 3.0, 0.0),
    (5.0, 1.0, None, 3.0, -5.0, -5.0),  # dual clip leaves A > 0 alone
    (1.5, 0.0, CLIP, 3.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "clip", "dual", "loss", "gradient"), POLICY_CASES)
def test_clipped_policy_loss(ratio, advantage, clip, dual, loss, gradient):
    old = torch.tensor([-1.7], dtype=torch.float64)
    new = (old + np.log(ratio)).requires_grad_()
    got = clipped_policy_loss(new, old, torch.tensor([advantage]).double(), clip, dual)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(gradient)


# V, R, ε around V_old = 0 → loss, gradient by V.
VALUE_CASES = [
    (0.1, 1.0, 0.2, 0.405, -0.9),  # within the clip: ½ (0.1 − 1)²
    (0.5, 1.0, 0.2, 0.32, 0.0),  # towards R beyond the clip: ½ max(0.25, (0.2 − 1)²)
    (-0.5, 1.0, 0.2, 1.125, -1.5),  # away from R: ½ max(2.25, (−0.2 − 1)²)
    (-0.5, -1.0, 0.2, 0.32, 0.0),  # the mirror images of the two
    (0.5, -1.0, 0.2, 1.125, 1.5),
    (0.5, 1.0, None, 0.125, -0.5),
    (2.0, -1.0, None, 4.5, 3.0),
]


@pytest.mark.parametrize(("value", "target", "clip", "loss", "gradient"), VALUE_CASES)
@pytest.mark.parametrize("old", [0.0, 3.0])
def test_clipped_value_loss(value, target, clip, loss, gradient, old):
    """Moving V, V_old and R together changes nothing."""
    new = torch.tensor([value + old], dtype=torch.float64, requires_grad=True)
    others = torch.tensor([[old], [target + old]], dtype=torch.float64)
    got = clipped_value_loss(new, *others, clip=clip)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert new.grad.item() == pytest.approx(gradient)


def test_what_is_left_out():
    """Both clips are 0.2; pairs have no margin and no flipped labels."""
    new, old, target = torch.tensor([[0.9, -0.9, 0.3], [0.0] * 3, [2.0, -2.0, 0.1]]).double()
    for loss, clip in ((clipped_policy_loss, CLIP), (clipped_value_loss, 0.2)):
        assert torch.equal(loss(new, old, target), loss(new, old, target, clip))
    assert torch.equal(ranking_loss(new, old), ranking_loss(new, old, 0.0, 0.0))


SCORES = arrays(np.float64, 4, elements=st.floats(-30, 30))


@given(SCORES, SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.4]))
def test_ranking_loss(chosen, rejected, margin, smoothing):
    got = ranking_loss(*map(torch.from_numpy, (chosen, rejected, margin)), smoothing)
    d = chosen - rejected - margin
    # −log σ(d) = log(1 + e^−d)
    expected = (1 - smoothing) * np.logaddexp(0, -d) + smoothing * np.logaddexp(0, d)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def test_ranking_loss_is_steep_at_large_negative_margins():
    """−σ(15) by the chosen score: C's log(σ + 1e-5) has 0.03 left here."""
    chosen, rejected = torch.tensor([-15.0], requires_grad=True), torch.zeros(1)
    ranking_loss(chosen, rejected).sum().backward()
    assert chosen.grad.item() == pytest.approx(-1.0, abs=1e-5)


def test_ranking_loss_of_bf16_scores_is_float32():
    chosen = torch.tensor([1.01], dtype=torch.bfloat16)
    got = ranking_loss(chosen, torch.zeros(1, dtype=torch.bfloat16), margin=0.5)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(np.log1p(np.exp(0.5 - chosen.double().item())))


def test_lm_loss_by_hand():
    # Two tokens, V = 2: position 0 predicts token 1 with softmax([0, ln 3]) = [1/4, 3/4].
    logits = torch.tensor([[[0.0, np.log(3.0)], [50.0, -50.0]]])
    loss, tokens = lm_loss(logits, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx(np.log(4 / 3))
    assert tokens.item() == 1


@pytest.mark.parametrize("ignored", [-100, 0])
def test_lm_loss_is_cross_entropy_of_shifted_labels(ignored):
    logits = torch.randn(3, 6, 11, dtype=torch.float64)
    labels = torch.randint(1, 11, (3, 6))
    labels[0, :3] = labels[1, 5] = labels[2] = ignored  # a prompt, padding, nothing labeled
    loss, tokens = lm_loss(logits, labels, ignored)
    mean = F.cross_entropy(
        logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=ignored
    )
    assert tokens.item() == 3 + 4
    torch.testing.assert_close(loss / tokens, mean)


def test_lm_loss_of_bf16_logits_is_float32():
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    loss, _ = lm_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, lm_loss(logits.float(), labels)[0])


def test_lm_loss_of_nothing_is_zero():
    loss, tokens = lm_loss(torch.randn(1, 4, 7), torch.full((1, 4), -100))
    assert loss.item() == 0.0
    assert tokens.item() == 0
