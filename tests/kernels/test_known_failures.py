"""What goes wrong in other libraries' kernels, one test for each, on all backends."""

import pytest
import torch
from scored import BLOCK, GRADED, V, check, gradient, off, oracle

from mossrlhf.kernels import token_stats


@pytest.fixture
def given(backend, device):
    logits, ref = 3 * torch.randn(2, 3, V, device=device)
    return logits, torch.tensor([V - 1, BLOCK, V - 2], device=device), ref


def test_first_block_of_minus_infinity_gives_no_nan(given):
    """flash-attn, Liger and axolotl: −∞ − (−∞) in the running maximum."""
    logits, ids, ref = given
    logits[:, :BLOCK], ref[:, :BLOCK] = -torch.inf, -torch.inf
    stats, slope = gradient(
        logits, lambda z: token_stats(z, ids, ref_logits=ref), ("logprob", "entropy", "kl")
    )
    assert all(getattr(stats, name).isfinite().all() for name in GRADED)
    assert slope.isfinite().all()
    check(logits, ids, ref=ref)


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK + 1, V - 3])
def test_entropy_with_any_minus_infinity(given, place):
    """axolotl: 0 · −∞."""
    logits, ids, _ = given
    logits[:, place] = -torch.inf
    entropy = token_stats(logits, ids).entropy
    assert off(entropy, oracle(logits, ids).entropy) <= 1e-6


@pytest.mark.parametrize("level", [-200.0, -1000.0])
def test_logits_far_below_zero(given, level):
    """verl: exp() of what no maximum was taken from."""
    logits, ids, ref = given
    check(logits + level, ids, ref=ref + level)
    assert token_stats(logits + level, ids).logprob.isfinite().all()


@pytest.mark.parametrize("width", [1, BLOCK - 1, BLOCK + 1, V])
def test_log_probabilities_are_never_positive(backend, device, width):
    """verl, where the vocabulary is no multiple of the split: words beyond it, or none at all."""
    logits = 20 * torch.randn(4, width, device=device)  # peaked: the greatest is nearly certain
    for ids in (logits.argmax(-1), torch.full((4,), width - 1, device=device)):
        stats = token_stats(logits, ids)
        assert (stats.logprob <= 0).all()
        assert off(stats.logprob, oracle(logits, ids).logprob, 1.0) <= 1e-6


def test_offsets_beyond_two_to_the_31(backend, device):
    """Rows so far apart that a 32-bit offset comes out elsewhere; memory between is not touched."""
    apart = 2**30 + 24
    field = torch.empty(2 * apart + V, dtype=torch.bfloat16, device=device)
    logits = field.as_strided((3, V), (apart, 1))
    logits.copy_(torch.randn(3, V))
    near, ids = logits.clone(), torch.tensor([0, 5, V - 1], device=device)
    assert logits.stride(0) * 2 > 2**31
    for name in ("logprob", "entropy"):
        far, close = (getattr(token_stats(z, ids), name) for z in (logits, near))
        assert torch.equal(far, close)
    leaf = logits.requires_grad_()
    (slope,) = torch.autograd.grad(token_stats(leaf, ids, in_place=True).logprob.sum(), leaf)
    assert slope.data_ptr() == field.data_ptr()
    expected = torch.autograd.grad(token_stats(near.requires_grad_(), ids).logprob.sum(), near)[0]
    assert torch.equal(slope, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits(device):
    width, count = 151936, 14200
    logits = torch.randn(count, width, dtype=torch.bfloat16, device=device).requires_grad_()
    assert logits.numel() > 2**31
    ids = torch.randint(width, (count,), device=device)
    token_stats(logits, ids, in_place=False).logprob.sum().backward()
    last = logits.detach()[-3:].clone().requires_grad_()
    stats = token_stats(last, ids[-3:])
    stats.logprob.sum().backward()
    assert torch.equal(logits.grad[-3:], last.grad)


def test_entropy_has_a_gradient(given):
    """TRL's chunked operator drops it without a word."""
    logits, ids, _ = given
    _, slope = gradient(logits, lambda z: token_stats(z, ids), ("entropy",))
    assert slope.abs().max() > 1e-3
    check(logits, ids, names=("entropy",))


@pytest.mark.gpu
def test_no_recompilation_for_another_length(device):
    """Liger's GRPO kernel compiles for each: for the numbers of rows and for each temperature."""
    from mossrlhf.kernels import triton_rows

    def kernels():
        caches = [
            getattr(triton_rows, name).device_caches
            for name in ("_stats_kernel", "_gradient_kernel")
        ]
        return sum(len(cache[0]) for device_caches in caches for cache in device_caches.values())

    def score(count, temperature):
        logits = torch.randn(count, 1000, device=device, requires_grad=True)
        ids = torch.zeros(count, dtype=torch.long, device=device)
        token_stats(logits, ids, temperature).logprob.sum().backward()

    score(3, 0.5)
    score(1, 0.5)  # a single temperature is a stride of one, which is another kernel
    before = kernels()
    for count, temperature in [(1, 0.7), (2, 0.7), (16, 1.0), (17, 0.3), (48, 2.0), (100, 1.0)]:
        score(count, temperature)
    assert kernels() == before
