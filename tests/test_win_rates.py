"""Win rates by hand, also over several processes."""

import pytest
import torch

from mossrlhf.metrics import compare, win_rates

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
