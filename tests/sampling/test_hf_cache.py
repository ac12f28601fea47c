"""Room for keys and values: what is held is the same, and is seldom copied."""

import weakref
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mossrlhf.sampling.hf import PreallocatedLayer, can_drop_rows, preallocate


def states(count, rows=3, wide=5):
    """Keys and values of some tokens."""
    return torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, wide)


@pytest.fixture
def pair():
    """A layer of transformers that holds six tokens, and one of ours that took them over."""
    torch.manual_seed(0)
    plain = DynamicLayer()
    plain.update(*states(6))
    return plain, PreallocatedLayer.of(plain, room=3)


def same(pair):
    plain, roomy = pair
    assert torch.equal(roomy.keys, plain.keys)
    assert torch.equal(roomy.values, plain.values)
    assert roomy.get_seq_length() == plain.get_seq_length()


CHANGES = {
    "rows": lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
    "order": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeats": lambda layer: layer.batch_repeat_interleave(1),
    "crop": lambda layer: layer.crop(-4),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [0, 2, 4])
def test_holds_what_transformers_holds(pair, change, before):
    for _ in range(before):
        given = states(1)
        shown = [layer.update(*given) for layer in pair]
        assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))
    for layer in pair:
        CHANGES[change](layer)
    rows = 3 if change == "reset" else len(pair[0].keys)
    for count in (1, 1, 2, 5, 1):
        given = states(count, rows)
        for layer in pair:
            layer.update(*given)
        same(pair)


def test_a_token_is_written_behind_the_others(pair):
    """Without copying those; and once in `room` tokens, with."""
    _, roomy = pair
    places = []
    for _ in range(9):
        roomy.update(*states(1))
        places.append((roomy.keys.data_ptr(), roomy.values.data_ptr()))
    assert [a == b for a, b in pairwise(places)] == [True, True, False] * 2 + [True, True]


def test_no_more_room_is_made_than_was_asked_for(pair):
    _, roomy = pair
    roomy.update(*states(1))
    assert roomy.keys.untyped_storage().nbytes() == 3 * 2 * (6 + 3) * 4 * 4
    assert roomy.values.untyped_storage().nbytes() == 3 * 2 * (6 + 3) * 5 * 4


def test_room_of_rows_that_are_let_go_is_free_at_once(pair):
    """Not with the layer's next token, when all other layers hold as much."""
    _, roomy = pair
    roomy.update(*states(1))
    rooms = [weakref.ref(view._base) for view in (roomy.keys, roomy.values)]
    assert None not in [room() for room in rooms]
    roomy.batch_select_indices(torch.tensor([2, 0]))
    assert [room() for room in rooms] == [None, None]


def test_keys_shown_before_stay_as_they_were(pair):
    _, roomy = pair
    first, _ = roomy.update(*states(1))
    kept = first.clone()
    for _ in range(7):
        roomy.update(*states(1))
    assert torch.equal(first, kept)


def test_plain_layers_alone_get_room():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(8), DynamicLayer()]
    for layer in cache.layers[:2]:
        layer.update(*states(2))
    preallocate(cache, 4)
    assert [type(x) for x in cache.layers] == [
        PreallocatedLayer,
        DynamicSlidingWindowLayer,
        DynamicLayer,
    ]
    assert can_drop_rows(cache)
    cache.layers[0].update(*states(1))
    held = cache.layers[0]
    preallocate(cache, 2)  # again, as after every segment
    assert cache.layers[0] is held
    assert held.room == 2


@pytest.mark.parametrize("cache", [None, (), "recurrent state"])
def test_other_caches_are_left_alone(cache):
    preallocate(cache, 4)
    assert not can_drop_rows(cache)


def test_a_cache_that_is_off_the_device_is_left_alone():
    cache = DynamicCache()
    cache.layers, cache.offloading = [DynamicLayer()], True
    cache.layers[0].update(*states(2))
    preallocate(cache, 4)
    assert type(cache.layers[0]) is DynamicLayer
