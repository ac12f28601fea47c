"""The buffer deals out every sequence once an epoch; micro-batches fit their bounds."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mossrlhf.minibatches import RolloutBuffer, micro_batches, note, split
from mossrlhf.types import Rollout


def rollout_of(lengths, first=0):
    """Sequences of the given (prompt, response) lengths, named first, first + 1, …"""
    prompt, response = map(torch.tensor, zip(*lengths, strict=True))
    width, length = int((prompt + response).max()), int(response.max())
    return Rollout(
        input_ids=torch.zeros(len(lengths), width, dtype=torch.long),
        prompt_lengths=prompt,
        response_lengths=response,
        truncated=torch.zeros(len(lengths), dtype=torch.bool),
        mask=torch.arange(length) < response[:, None],
        columns={"name": [first + i for i in range(len(lengths))]},
    )


def names(parts):
    return [name for part in parts for name in part.columns["name"]]


@pytest.fixture
def buffer():
    """Two rollouts of 4 and 3 sequences, of different widths."""
    buffer = RolloutBuffer()
    buffer.add(rollout_of([(1, 2), (2, 2), (1, 1), (3, 1)]))
    buffer.add(rollout_of([(2, 5), (1, 1), (4, 2)], first=4))
    return buffer


def test_holds_what_was_added(buffer):
    assert len(buffer) == 7
    assert names([buffer.all()]) == list(range(7))
    buffer.clear()
    assert len(buffer) == 0


def test_without_a_generator_the_order_is_kept(buffer):
    batches = list(buffer.minibatches(3, epochs=2))
    assert [len(batch) for batch in batches] == [3, 3, 1] * 2  # the last one is ragged
    assert names(batches) == [*range(7)] * 2


def test_minibatches_carry_no_padding_to_spare(buffer):
    first, second, _ = buffer.minibatches(3)
    assert first.input_ids.shape == (3, 4)
    assert second.mask.shape == (3, 5)


def test_every_epoch_is_shuffled_anew(buffer):
    batches = list(buffer.minibatches(3, epochs=2, generator=torch.Generator().manual_seed(1)))
    one, two = names(batches[:3]), names(batches[3:])
    assert sorted(one) == sorted(two) == list(range(7))
    assert one != two != list(range(7))
    again = buffer.minibatches(3, epochs=2, generator=torch.Generator().manual_seed(1))
    assert names(again) == one + two


def test_state_comes_back(buffer):
    other = RolloutBuffer()
    other.load_state_dict(buffer.state_dict())
    buffer.clear()  # of the original: the state is no alias
    assert names([other.all()]) == list(range(7))


def test_refusals(buffer):
    with pytest.raises(ValueError, match="size: got 0"):
        next(buffer.minibatches(0))
    with pytest.raises(ValueError, match="got none"):
        next(RolloutBuffer().minibatches(1))
    for bound in ("size", "max_tokens"):
        with pytest.raises(ValueError, match=f"{bound}: got 0, expected at least 1, or None"):
            micro_batches(buffer.all(), **{bound: 0})


def test_without_a_bound_there_is_one_micro_batch(buffer):
    whole = buffer.all()
    assert micro_batches(whole) == [whole]
    assert micro_batches(whole, size=7) == [whole]


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12)), min_size=1, max_size=12)


@given(LENGTHS, st.integers(1, 5))
def test_micro_batches_by_size(lengths, size):
    parts = micro_batches(rollout_of(lengths), size=size)
    assert names(parts) == list(range(len(lengths)))
    assert all(len(part) <= size for part in parts)
    assert len(parts) == -(-len(lengths) // size)


@given(LENGTHS, st.integers(1, 40), st.none() | st.integers(1, 4))
def test_micro_batches_by_tokens(lengths, budget, size):
    parts = micro_batches(rollout_of(lengths), size=size, max_tokens=budget)
    assert Counter(names(parts)) == Counter(range(len(lengths)))
    for part in parts:
        assert part.input_ids.numel() <= budget or len(part) == 1
        assert size is None or len(part) <= size


def test_a_group_is_filled_to_its_bound():
    groups = split(rollout_of([(2, 3)] * 5), size=2, max_tokens=1000)
    assert [len(rows) for rows in groups] == [2, 2, 1]


def test_what_is_noted_is_zero_elsewhere():
    """Rows 2 and 0 of three, of at most two tokens where another has three."""
    noted = {}
    mask = torch.tensor([[True, False], [True, True]])
    shape, values = torch.Size([3, 3]), torch.tensor([5.0, 6.0, 7.0])
    note(noted, "values", torch.tensor([2, 0]), shape, mask, values)
    assert noted["values"].tolist() == [[6, 7, 0], [0, 0, 0], [5, 0, 0]]
    ones = torch.ones(3)
    note(noted, "values", torch.tensor([1]), shape, ones[None].bool(), ones)
    assert noted["values"].tolist() == [[6, 7, 0], [1, 1, 1], [5, 0, 0]]


def test_like_lengths_go_together():
    # Totals 10, 2, 9, 3 under 20 padded tokens: {2, 3} (6), then {9, 10} (20), not {2, 3, 9} (27).
    groups = split(rollout_of([(4, 6), (1, 1), (4, 5), (1, 2)]), max_tokens=20)
    assert [rows.tolist() for rows in groups] == [[1, 3], [2, 0]]
