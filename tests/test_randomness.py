"""`temporary_seed` gives the random states back, after errors too."""

import pytest
import torch

from mossrlhf.randomness import temporary_seed


def test_temporary_seed_leaves_the_generator_as_it_was():
    torch.manual_seed(5)
    expected = [torch.rand(3), torch.rand(3)]
    torch.manual_seed(5)
    found = [torch.rand(3)]
    with temporary_seed(7):
        first = torch.rand(100)
    found.append(torch.rand(3))
    assert torch.equal(torch.stack(found), torch.stack(expected))
    with temporary_seed(7):
        assert torch.equal(torch.rand(100), first)
    with temporary_seed(8):
        assert not torch.equal(torch.rand(100), first)


def test_temporary_seed_is_given_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), temporary_seed(7):
        torch.rand(-1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_temporary_seed_on_the_accelerator():
    torch.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(5)
    with temporary_seed(7):
        torch.rand(100, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
