"""`Rollout`: lengths make the masks, and splitting and joining lose nothing."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mossrlhf.types import LossOutput, Rollout

PAD = 9


@pytest.fixture
def rollout():
    """Prompts of 2 and 1 tokens, responses of 2 and 3; the second response has a hole."""
    return Rollout(
        input_ids=torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        prompt_lengths=torch.tensor([2, 1]),
        response_lengths=torch.tensor([2, 3]),
        truncated=torch.tensor([False, True]),
        mask=torch.tensor([[True, True, False], [True, False, True]]),
        columns={"answer": ["a", "b"]},
    )


def test_what_lengths_say(rollout):
    assert len(rollout) == 2
    assert rollout.prompts() == [[1, 2], [5]]
    assert rollout.completions() == [[3, 4], [6, 7, 8]]
    assert rollout.attention_mask.tolist() == [[True] * 4, [True] * 4]


def test_where_states_and_tokens_stand(rollout):
    """The state before response token t stands at prompt + t − 1, the token one further."""
    assert rollout.state_index[0, :2].tolist() == [1, 2]
    assert rollout.state_index[1].tolist() == [0, 1, 2]
    assert rollout.response_ids[0, :2].tolist() == [3, 4]
    assert rollout.response_ids[1].tolist() == [6, 7, 8]


def test_padding_of_the_right_length_is_not_attended(rollout):
    wide = replace(rollout, input_ids=torch.nn.functional.pad(rollout.input_ids, (0, 2), value=4))
    assert wide.attention_mask.tolist() == [[True] * 4 + [False] * 2] * 2
    assert wide.completions() == rollout.completions()  # pad = 4 is also a real token


def test_weights_default_to_the_mask(rollout):
    assert rollout.token_weights.tolist() == [[1, 1, 0], [1, 0, 1]]
    assert rollout.token_weights.dtype == torch.float32
    assert rollout.state_weights.tolist() == rollout.token_weights.tolist()
    assert rollout.states is rollout.mask


def test_weights_count_inside_the_mask_only(rollout):
    weighted = replace(rollout, weights=torch.tensor([[0.5, 0.25, 8.0], [2.0, float("nan"), 1.0]]))
    assert weighted.token_weights.tolist() == [[0.5, 0.25, 0], [2, 0, 1]]
    assert weighted.state_weights.tolist() == weighted.token_weights.tolist()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (3, [[1, 1, 1, 0], [1, 0, 1, 0]]),  # the first ended before the limit, the second at it
        (4, [[1, 1, 1, 0], [1, 0, 1, 1]]),
        (2, [[1, 1, 0, 0], [1, 0, 1, 0]]),
    ],
)
def test_end_states(rollout, limit, expected):
    values = torch.ones(2, 3)
    widened = replace(rollout, values=values).with_end_states(limit)
    assert widened.states.int().tolist() == expected
    assert widened.state_weights.tolist() == expected
    assert widened.mask.tolist() == [[True, True, False, False], [True, False, True, False]]
    assert widened.values.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert widened.input_ids is rollout.input_ids
    # The state after the last token of the first response is the one at that token: position 3.
    assert widened.state_index[0, 2] == 3


def annotated(lengths, extra_width=0):
    """A rollout with most fields filled in, of the given (prompt, response) lengths."""
    prompt, response = map(torch.tensor, zip(*lengths, strict=True))
    size, length = len(lengths), int(response.max())
    width = int((prompt + response).max()) + extra_width
    valid = torch.arange(width) < (prompt + response)[:, None]
    ids = torch.where(valid, torch.arange(size * width).view(size, width) % 100, PAD)
    inside = torch.arange(length) < response[:, None]
    mask = inside & (torch.rand(size, length) < 0.8)
    per_token = {
        name: torch.where(inside, torch.randn(size, length), 0.0)
        for name in ("weights", "logprobs", "ref_logprobs", "values", "advantages", "returns")
    }
    return Rollout(
        input_ids=ids,
        prompt_lengths=prompt,
        response_lengths=response,
        truncated=torch.rand(size) < 0.5,
        mask=mask,
        columns={"name": [f"row {i} of {size}" for i in range(size)]},
        scores=torch.randn(size),
        extra={
            "number": torch.randn(size),
            "tokens": torch.randn(size, length),
            "planes": torch.randn(size, length, 2),
        },
        **per_token,
    )


def assert_same_sequences(got, expected):
    """Equal but for padding beyond the response."""
    assert got.completions() == expected.completions()
    assert got.prompts() == expected.prompts()
    assert list(got.columns["name"]) == list(expected.columns["name"])
    length = int(expected.response_lengths.max())
    for spec in fields(Rollout):
        a, b = getattr(got, spec.name), getattr(expected, spec.name)
        if isinstance(b, Tensor) and spec.name != "input_ids":
            if b.ndim == 2:
                a, b = a[:, :length], b[:, :length]
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)], ids=str)
def test_end_states_widen_what_is_per_token_among_the_extra_tensors(rollout, shape):
    tokens = torch.arange(float(torch.Size(shape).numel())).view(shape)
    other = {"number": torch.ones(2), "features": torch.ones(2, 5)}
    widened = replace(rollout, extra={"tokens": tokens, **other}).with_end_states(limit=4)
    assert widened.extra["tokens"].shape[:2] == widened.mask.shape == (2, 4)
    assert torch.equal(widened.extra["tokens"][:, :3], tokens)
    assert not widened.extra["tokens"][:, 3].any()
    assert {name: widened.extra[name] for name in other} == other  # as they are
    part = widened.select(torch.tensor([0]))
    assert part.extra["tokens"].shape[:2] == part.mask.shape == (1, 3)
    assert part.extra["features"].shape == (1, 5)


LENGTHS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5)


@given(LENGTHS, st.data())
def test_select(lengths, data):
    whole = annotated(lengths, extra_width=2)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    part = whole.select(torch.tensor(rows))
    assert part.completions() == [whole.completions()[i] for i in rows]
    assert part.columns["name"] == [whole.columns["name"][i] for i in rows]
    longest = max(lengths[i][1] for i in rows)
    assert part.input_ids.shape == (len(rows), max(sum(lengths[i]) for i in rows))
    assert part.mask.shape == part.logprobs.shape == (len(rows), longest)
    torch.testing.assert_close(part.logprobs, whole.logprobs[rows, :longest], rtol=0, atol=0)
    torch.testing.assert_close(part.scores, whole.scores[rows], rtol=0, atol=0)
    torch.testing.assert_close(part.extra["number"], whole.extra["number"][rows])
    for name in ("tokens", "planes"):  # cut as the tensors [B, T] are
        torch.testing.assert_close(part.extra[name], whole.extra[name][rows, :longest])


@given(LENGTHS, st.data())
def test_concat_undoes_split(lengths, data):
    whole = annotated(lengths)
    cut = data.draw(st.integers(0, len(lengths) - 1))
    if cut == 0:
        assert Rollout.concat([whole]) is whole
        return
    parts = [whole.select(torch.arange(cut)), whole.select(torch.arange(cut, len(lengths)))]
    assert_same_sequences(Rollout.concat(parts), whole)


def test_concat_pads_on_the_right():
    joined = Rollout.concat([annotated([(1, 1)]), annotated([(2, 3), (1, 2)])])
    assert joined.input_ids.shape == (3, 5)
    for name in ("mask", "logprobs", "weights"):
        assert getattr(joined, name).shape == (3, 3)
        assert not getattr(joined, name)[0, 1:].any()
    assert joined.extra["tokens"].shape == (3, 3)
    assert joined.extra["planes"].shape == (3, 3, 2)


def test_selection_keeps_end_states(rollout):
    widened = rollout.with_end_states(limit=3)
    part = widened.select(torch.tensor([0]))
    assert part.states.int().tolist() == [[1, 1, 1]]
    joined = Rollout.concat([part, widened.select(torch.tensor([1]))])
    assert joined.states.tolist() == widened.states.tolist()


def test_concat_refuses_what_does_not_match(rollout):
    with pytest.raises(ValueError, match="got none"):
        Rollout.concat([])
    with pytest.raises(ValueError, match="logprobs is filled in 1 of 2 rollouts"):
        Rollout.concat([replace(rollout, logprobs=torch.zeros(2, 3)), rollout])
    with pytest.raises(ValueError, match=r"columns differ .*answer.*question"):
        Rollout.concat([rollout, replace(rollout, columns={"question": ["x", "y"]})])
    with pytest.raises(ValueError, match="extra differ"):
        Rollout.concat([rollout, replace(rollout, extra={"more": torch.zeros(2)})])


def test_to_moves_every_tensor(rollout):
    moved = replace(rollout, scores=torch.zeros(2), extra={"more": torch.zeros(2)}).to("meta")
    tensors = [getattr(moved, spec.name) for spec in fields(Rollout)] + [moved.extra["more"]]
    tensors = [value for value in tensors if isinstance(value, Tensor)]
    assert len(tensors) == 7
    assert {value.device.type for value in tensors} == {"meta"}
    assert moved.columns == rollout.columns


def test_containers_are_frozen(rollout):
    with pytest.raises(AttributeError):
        rollout.scores = torch.zeros(2)
    with pytest.raises(AttributeError):
        LossOutput(torch.tensor(0.0)).loss = torch.tensor(1.0)
