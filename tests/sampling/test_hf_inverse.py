"""Tokens by their cumulative probabilities, against a search in sums of numpy's float64."""

import numpy as np
import pytest
import torch

from mossrlhf.sampling.hf import inverse_cdf

SIZES = [1, 255, 256, 257, 1000]


def searched(p, uniform):
    """The definition, in numpy's float64; never a token of probability 0."""
    found = []
    for row, u in zip(p.double().numpy(), uniform.double().numpy(), strict=True):
        total = np.cumsum(row)
        token = np.searchsorted(total, u * total[-1], side="right")
        found.append(min(token, np.flatnonzero(row)[-1]))
    return torch.tensor(np.array(found))


@pytest.mark.parametrize("size", SIZES)
def test_inverse_is_a_search_in_the_sums(size):
    torch.manual_seed(size)
    for trial in range(40):
        logits = torch.randn(32, size) * 3
        edge = min(trial, max(0, (size - 1) // 2))
        logits[:, :edge] = -torch.inf  # nothing at either end
        logits[:, size - edge :] = -torch.inf
        logits[:, size // 2 + 1 :: 3] = -torch.inf  # and holes
        logits[:, size // 2] = 0.0
        p = logits.softmax(-1)
        uniform = torch.rand(32, dtype=torch.float64)
        got, expected = inverse_cdf(p, uniform), searched(p, uniform)
        assert (p.gather(1, got[:, None]) > 0).all()
        # A sum in float32 may miss a number that falls within its rounding of an edge.
        for b in (got != expected).nonzero().flatten().tolist():
            total = p[b].double().cumsum(-1)
            near = (total - uniform[b] * total[-1]).abs().min()
            assert near < 1e-6
        assert (got != expected).sum() <= 1


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("size", SIZES)
def test_inverse_at_the_ends(size, u):
    """The first and the last token that has a probability, even where it is next to none."""
    for first, last in {(0, size - 1), (size // 2, size // 2), (size // 3, size - 1 - size // 4)}:
        if first > last:
            continue
        p = torch.zeros(3, size)
        p[:, first : last + 1] = torch.rand(3, last + 1 - first) + 0.01
        got = inverse_cdf(p, torch.full((3,), u, dtype=torch.float64))
        assert got.tolist() == [first if u == 0 else last] * 3


@pytest.mark.parametrize("place", [0, 1, 254, 256, 400, 768, 998])
def test_rare_tokens_get_their_share(place):
    """A token of 1e-9 owns the numbers of its share: it begins where it should, and is as wide.

    All but the last of a block, which has what rounding leaves.
    """
    p = torch.full((1, 1000), 1e-3)
    p[0, place] = 1e-9
    exact = p[0].double()
    # One sum of each block in float32 is added up, and its tokens exactly.
    sums = [block.sum().double() for block in p[0].split(256)]
    block, within = divmod(place, 256)
    start, total = sum(sums[:block], exact[256 * block : place].sum()), sum(sums)
    shares = torch.tensor([-0.5, 0.01, 0.5, 0.99, 1.5], dtype=torch.float64)
    uniform = ((start + exact[place] * shares) / total).clamp(0, 1 - 2**-53)
    got = inverse_cdf(p.expand(5, -1), uniform)
    assert got[1:4].tolist() == [place] * 3
    assert within == 0 or got[0] == place - 1
    assert got[4] == place + 1


def test_inverse_over_many_even_numbers_gives_each_its_share():
    torch.manual_seed(0)
    p, count = (torch.randn(1, 1000) * 2).softmax(-1), 200_000
    uniform = torch.arange(count, dtype=torch.float64) / count
    got = inverse_cdf(p.expand(count, -1), uniform).bincount(minlength=1000).double() / count
    torch.testing.assert_close(got, p[0].double(), rtol=0, atol=2 / count)


def test_inverse_takes_sums_other_than_one():
    p = torch.tensor([[0.5, 0.0, 1.5, 2.0]])
    uniform = torch.tensor([0.0, 0.124, 0.126, 0.49, 0.51, 0.99], dtype=torch.float64)
    assert inverse_cdf(p.expand(6, -1), uniform).tolist() == [0, 0, 2, 2, 3, 3]
