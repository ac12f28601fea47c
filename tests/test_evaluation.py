"""Win rates by hand; looking at a run does not change it."""

import pytest
import torch

from mossrlhf.metrics import compare, win_rates
from mossrlhf.randomness import temporary_seed

OURS = torch.tensor([3.0, 1.0, 2.0, 5.0, torch.nan, 0.0])
THEIRS = torch.tensor([2.0, 1.0, 4.0, 1.0, 9.0, torch.nan])


def test_win_rates_by_hand():
    rates = win_rates(OURS, THEIRS)
    assert rates == {"win_rate": 0.5, "tie_rate": 0.25, "lose_rate": 0.25}
    back = win_rates(THEIRS, OURS)
    assert back == {"win_rate": 0.25, "tie_rate": 0.25, "lose_rate": 0.5}


def test_where_no_prompt_counts_all_rates_are_zero():
    nothing = torch.tensor([torch.nan])
    assert set(win_rates(nothing, torch.ones(1)).values()) == {0}


def test_each_side_has_the_mean_of_what_applies_to_it():
    metrics = compare({"a": OURS, "b": -OURS}, {"a": THEIRS, "b": -THEIRS})
    assert metrics["eval/a/policy"] == pytest.approx(11 / 5)
    assert metrics["eval/a/ref"] == pytest.approx(17 / 5)
    assert metrics["eval/b/policy"] == pytest.approx(-11 / 5)
    assert metrics["eval/a/win_rate"] == metrics["eval/b/lose_rate"] == 0.5
    assert len(metrics) == 10


def test_processes_count_together():
    """What one process would send is added to what the other has."""
    halves = [slice(0, 2), slice(2, 6)]
    sent = []

    def send(tensor):
        sent.append(tensor)
        return tensor

    compare({"a": OURS[halves[0]]}, {"a": THEIRS[halves[0]]}, send)
    others = iter(sent)
    found = compare({"a": OURS[halves[1]]}, {"a": THEIRS[halves[1]]}, lambda x: x + next(others))
    assert found == pytest.approx(compare({"a": OURS}, {"a": THEIRS}))
    assert next(others, None) is None


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
