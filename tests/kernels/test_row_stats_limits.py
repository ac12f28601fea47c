"""Statistics of rows where numbers end: impossible words, labels that are none, rows to ignore."""

import pytest
import torch
from scored import BLOCK, GRADED, V, check, gradient, off, oracle, score

from mossrlhf.kernels import IGNORED_ID, token_stats

HOLES = {
    "the first block": slice(0, BLOCK),
    "the first blocks": slice(0, 2 * BLOCK),
    "the last block": slice(2 * BLOCK, None),
    "a block between": slice(BLOCK, 2 * BLOCK),
    "every other word": slice(0, None, 2),
    "all but one word": slice(1, None),
    "all but the last word": slice(0, -1),
}


class TestImpossibleWords:
    @pytest.mark.parametrize("hole", HOLES)
    def test_holes(self, given, hole):
        logits, ids, ref = given
        logits[:, HOLES[hole]], ref[:, HOLES[hole]] = -torch.inf, -torch.inf
        ids[:] = logits.argmax(-1)
        check(logits, ids, 0.7, ref)

    @pytest.mark.parametrize("hole", ["the first block", "the last block", "all but one word"])
    def test_a_reference_of_larger_support(self, given, hole):
        logits, ids, ref = given
        logits[:, HOLES[hole]] = -torch.inf
        ids[:] = logits.argmax(-1)
        check(logits, ids, 0.7, ref, slope_within=2e-6)

    def test_the_label_itself(self, given):
        """Its log-probability is −∞; the other numbers, and the gradient of all, are not hurt."""
        logits, ids, _ = given
        logits[:, :BLOCK] = -torch.inf
        ids[:] = torch.arange(5)
        stats, slope = gradient(logits, score(ids))
        expected, true_slope = gradient(logits, lambda z: oracle(z, ids))
        assert (stats.logprob == -torch.inf).all()
        assert off(stats.entropy, expected.entropy) <= 1e-6
        assert off(slope, true_slope) <= 1e-6

    @pytest.mark.parametrize("hole", ["the first block", "the last block", "all but one word"])
    def test_kl_from_a_reference_of_smaller_support_is_infinite(self, given, hole):
        logits, ids, ref = given
        ref[:, HOLES[hole]] = -torch.inf
        assert (token_stats(logits, ids, ref_logits=ref).kl == torch.inf).all()

    def test_infinite_kl_leaves_other_gradients_alone(self, given):
        logits, ids, ref = given
        expected = gradient(logits, score(ids), GRADED[:3])[1]
        ref[:, ::2] = -torch.inf
        assert off(gradient(logits, score(ids, 1.0, ref), GRADED[:3])[1], expected) <= 1e-6

    def test_kl_from_itself_is_zero(self, given):
        logits, ids, _ = given
        logits[:, ::3] = -torch.inf
        stats, slope = gradient(logits, score(ids, 1.0, logits.clone()), ("kl",))
        assert stats.kl.abs().max() <= 1e-6
        assert slope.abs().max() <= 1e-6

    @pytest.mark.parametrize("place", [0, BLOCK, V - 1])
    def test_broken_logits_are_not_hidden(self, given, place):
        logits, ids, ref = given
        logits[2, place] = torch.nan
        stats = token_stats(logits, ids, ref_logits=ref)
        for name in GRADED:
            assert getattr(stats, name).isnan().tolist() == [False, False, True, False, False]


class TestLabels:
    @pytest.mark.parametrize("label", [V, V + 3, 2**40])
    def test_beyond_the_vocabulary(self, given, backend, label):
        logits, ids, ref = given
        ids[3] = label
        if backend == "torch":
            if logits.is_cuda:
                pytest.skip("torch ends the process of CUDA")
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                token_stats(logits, ids)
            return
        stats = token_stats(logits, ids, ref_logits=ref)
        for found in (stats.logprob, stats.ref_logprob):
            assert found.isnan().tolist() == [False, False, False, True, False]

    @pytest.mark.parametrize("ignored", [-100, -1])
    def test_ignored(self, given, ignored):
        """Whatever is in the row: its numbers are zero, its gradient too, and no other changes."""
        logits, ids, ref = given
        whole, slope = gradient(logits, score(ids, 0.7, ref))
        logits[1], ref[1], ids[1] = torch.nan, torch.nan, ignored
        stats, cut = gradient(logits, score(ids, 0.7, ref))
        others = torch.tensor([0, 2, 3, 4], device=logits.device)
        for name in (*GRADED, "ref_logprob"):
            assert getattr(stats, name)[1] == 0
            assert torch.equal(getattr(stats, name)[others], getattr(whole, name)[others])
        assert (cut[1] == 0).all()
        assert torch.equal(cut[others], slope[others])

    def test_the_ignored_id_is_that_of_transformers(self):
        assert IGNORED_ID == -100

    def test_int32(self, given):
        logits, ids, _ = given
        one, other = gradient(logits, score(ids)), gradient(logits, score(ids.int()))
        assert torch.equal(one[0].logprob, other[0].logprob)
        assert torch.equal(one[1], other[1])

    @pytest.mark.parametrize("content", [torch.nan, -torch.inf, torch.inf])
    def test_rows_without_upstream_gradient_get_zeros(self, given, content):
        logits, ids, ref = given
        logits[1] = content
        leaf = logits.requires_grad_()
        stats = token_stats(leaf, ids, ref_logits=ref)
        sum(getattr(stats, name)[2:].sum() for name in GRADED).backward()
        assert (leaf.grad[:2] == 0).all()
        assert leaf.grad[2:].isfinite().all()
        assert leaf.grad[2:].abs().sum(-1).min() > 0
