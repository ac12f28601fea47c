"""Batches by token count: every pair once, within the budget, alike for all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mossrlhf.data import TokenBatches, TokenBatchSampler
from mossrlhf.data.batches import GRAIN

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def sampler(lengths, **options):
    rest = {k: options.pop(k) for k in ("seed", "processes", "process") if k in options}
    return TokenBatchSampler(lengths, TokenBatches(**options), **rest)


@given(LENGTHS, st.integers(1, 4000), st.integers(1, 5), st.integers(0, 20))
def test_every_pair_comes_once_and_batches_keep_to_their_bounds(lengths, budget, least, more):
    made = sampler(lengths, max_tokens=budget, min_pairs=least, max_pairs=least + more)
    batches = list(made)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(made)
    short = [batch for batch in batches if len(batch) < least]
    assert len(short) <= 1  # what is left over
    for batch in batches:
        longest = max(-(-lengths[i] // GRAIN) * GRAIN for i in batch)
        assert len(batch) <= least + more
        assert len(batch) <= least or 2 * len(batch) * longest <= budget


@given(LENGTHS, st.integers(1, 4))
def test_processes_share_the_batches_evenly(lengths, processes):
    if len(lengths) < processes:
        with pytest.raises(ValueError, match=f"got {len(lengths)} pairs for {processes}"):
            sampler(lengths, processes=processes)
        return
    parts = [list(sampler(lengths, processes=processes, process=p)) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1
    everything = [i for part in parts for batch in part for i in batch]
    assert sorted(everything) == list(range(len(lengths)))
    assert all(batch for part in parts for batch in part)


def test_single_pairs_that_come_out_uneven_are_refused():
    with pytest.raises(ValueError, match="5 pairs make a batch each, which 2 processes"):
        sampler([9] * 5, max_pairs=1, min_pairs=1, processes=2)


def test_epochs_differ_and_come_back():
    made = sampler(list(range(1, 200)), max_tokens=900)
    first = list(made)
    assert list(made) == first
    made.set_epoch(1)
    second = list(made)
    assert second != first
    assert len(second) == len(first)
    members = [{frozenset(batch) for batch in epoch} for epoch in (first, second)]
    assert not members[0] <= members[1]  # not the same batches in another order
    made.set_epoch(0)
    assert list(made) == first
    other = sampler(list(range(1, 200)), max_tokens=900, seed=1)
    assert list(other) != first


def test_a_budget_is_filled():
    made = sampler([16] * 64, max_tokens=2 * 16 * 8, min_pairs=1)
    assert [len(batch) for batch in made] == [8] * 8


@pytest.mark.parametrize(
    "options", [dict(max_tokens=0), dict(min_pairs=0), dict(min_pairs=5, max_pairs=4)]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        TokenBatches(**options)
