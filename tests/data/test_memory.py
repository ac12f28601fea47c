"""Collators that remember: the same batches, and nothing tokenized twice."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from mossrlhf.data import PairCollator, SFTCollator, set_dialogue_template
from mossrlhf.data.memory import Encodings

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "how are you?"},
]
SFT = [
    {"prompt": CHAT, "response": "Sure."},
    {"prompt": "Hi", "response": " there"},
    {"text": "Hi there, how are you?"},
    {"text": "('Hi', ' there')"},
    {"prompt": CHAT[2:], "response": "Sure. 你好"},
]
PAIRS = [
    {"prompt": CHAT, "chosen": "Sure.", "rejected": "how are you? how are you?"},
    {"prompt": "Hi", "chosen": " there", "rejected": " you"},
]


@pytest.fixture
def english(tokenizer):
    set_dialogue_template(tokenizer, "en")
    return tokenizer


@pytest.fixture
def calls(english, monkeypatch):
    """Counts how often the tokenizer tokenizes."""
    counted = []
    kind = type(english)
    original = kind.__call__

    def counting(self, *args, **kwargs):
        counted.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return counted


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(("kind", "records"), [(SFTCollator, SFT), (PairCollator, PAIRS)])
@pytest.mark.parametrize("max_length", [None, 12])
def test_what_is_remembered_is_what_was_encoded(english, calls, kind, records, max_length):
    plain = kind(english, max_length=max_length, cache_bytes=None)
    remembering = kind(english, max_length=max_length)
    for _ in range(3):
        for some in (records, records[::-1], copy.deepcopy(records[:1])):
            assert same(remembering(some), plain(some))
    calls.clear()
    remembering(records)
    assert not calls
    plain(records)
    assert calls


def test_a_batch_may_be_changed(english):
    collate = SFTCollator(english)
    first = collate(SFT[:1])
    expected = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    assert same(collate(SFT[:1]), expected)


def test_a_changed_record_is_another(english):
    collate = SFTCollator(english)
    record = {"prompt": copy.deepcopy(CHAT), "response": "Sure."}
    collate([record])
    record["prompt"][2]["content"] = "you there?"
    assert same(collate([record]), SFTCollator(english)([record]))
    record["response"] = "how?"
    assert same(collate([record]), SFTCollator(english)([record]))


def test_columns_it_does_not_read_make_no_other(english, calls):
    collate = PairCollator(english)
    collate(PAIRS)
    calls.clear()
    collate([{**pair, "input_ids": torch.ones(3), "margin": 2.0} for pair in PAIRS])
    assert not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}"),
        lambda tokenizer: tokenizer.add_tokens(["there"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<unk>"),
        lambda tokenizer: setattr(tokenizer, "bos_token", "</s>"),
    ],
    ids=["template", "tokens", "eos", "bos"],
)
def test_with_another_tokenizer_all_is_forgotten(english, calls, change):
    collate = SFTCollator(english)
    collate(SFT[:3])
    change(english)
    calls.clear()
    assert same(collate(SFT[:3]), SFTCollator(english, cache_bytes=None)(SFT[:3]))
    assert len(calls) > 6


def test_it_is_bounded():
    """What it holds stays, however much goes by; what does not fit is encoded again."""
    rows = [[1, 2, 3], [4] * 97]  # 500 bytes and 4 for each of 100 ids
    known = Encodings(2000)
    asked = []
    for number in [*range(9), *range(9)]:
        assert known(number, lambda n=number: asked.append(n) or rows) == rows
    assert asked == [*range(9), *range(2, 9)]
    assert (len(known), known.used) == (2, 1800)


@pytest.mark.parametrize("size", [None, 0])
def test_it_can_be_switched_off(size):
    known = Encodings(size)
    known("Hi", lambda: [[1]])
    assert len(known) == 0


def test_errors_are_not_remembered():
    known = Encodings()

    def broken():
        raise ValueError("too long")

    for _ in range(2):
        with pytest.raises(ValueError, match="too long"):
            known("Hi", broken)
    assert len(known) == 0


def test_copies_begin_empty(english):
    collate = SFTCollator(english, max_length=14)
    collate(SFT[:2])
    assert len(collate._known) == 2
    for other in (pickle.loads(pickle.dumps(collate)), copy.deepcopy(collate)):
        assert (len(other._known), other._known.size) == (0, collate.cache_bytes)
        assert other.max_length == 14
        assert same(other(SFT[:2]), collate(SFT[:2]))
    assert len(replace(collate, max_length=8)._known) == 0
