"""Prompts that cannot be made to fit: exactly those that `encode_prompt` refuses."""

import pytest

from mossrlhf.data import (
    encode_prompt,
    overlong_prompts,
    require_fitting_prompts,
    set_dialogue_template,
    without_overlong,
)
from mossrlhf.data import fit as module


def turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [*([{"role": "system", "content": system}] if system else []), *said]


RECORDS = [
    {"prompt": "Hi"},
    {"prompt": "Hi there, how are you? " * 4, "name": "string"},
    {"text": "Hi there, how are you? " * 99},  # a document has no prompt
    {"prompt": turns("Hi there " * 40, "Sure.", "Hi")},  # loses its oldest turns
    {"prompt": turns("Hi", "Sure.", "how are you? " * 20, system="Sure.")},
    {"prompt": turns("Hi", system="how are you? " * 20)},
    {"prompt": turns("你好，请问" * 9)},
    {"prompt": ""},
    {"prompt": "zqxj"},  # a token a letter, behind a beginning of sequence and a space
    {"prompt": "龘靐齉"},  # three tokens a letter, one for each byte
]


def refused(tokenizer, prompt, limit):
    try:
        encode_prompt(tokenizer, prompt, limit)
    except ValueError:
        return True
    return False


@pytest.fixture(params=["tokenizer", "llama_tokenizer"])
def english(request):
    tokenizer = request.getfixturevalue(request.param)
    set_dialogue_template(tokenizer, "en")
    return tokenizer


@pytest.mark.parametrize("limit", range(1, 120))
def test_it_is_what_encoding_refuses(english, limit):
    found = overlong_prompts(RECORDS, english, limit)
    expected = {
        i for i, r in enumerate(RECORDS) if "prompt" in r and refused(english, r["prompt"], limit)
    }
    assert set(found) == expected
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for index, tokens in found.items():
        prompt = RECORDS[index]["prompt"]
        assert refused(english, prompt, tokens - 1)
        assert not refused(english, prompt, tokens)


def test_without_a_bound_everything_fits(english):
    assert overlong_prompts(RECORDS, english, None) == {}
    require_fitting_prompts(RECORDS, english, None)


def test_of_a_stream_nothing_is_said(english):
    require_fitting_prompts(None, english, 9)
    require_fitting_prompts(iter(RECORDS), english, 9)
    several = {"stream": iter(RECORDS), "list": RECORDS}
    with pytest.raises(ValueError, match=r"eval_dataset: \d of its longest"):
        require_fitting_prompts(several, english, 9, name="eval_dataset")


def test_what_is_short_is_not_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "prompt_encodings", lambda *_: pytest.fail("tokenized"))
    assert overlong_prompts([{"prompt": "Hi " * 20}] * 5, tokenizer, 62) == {}


def test_the_longest_alone_are_tokenized(tokenizer, monkeypatch):
    """However many there are: those with the most bytes come first."""
    records = [{"prompt": "how are you? " * (1 + i % 50)} for i in range(500)]
    asked = []
    original = module.prompt_encodings
    monkeypatch.setattr(module, "prompt_encodings", lambda t, p: asked.append(p) or original(t, p))
    overlong_prompts(records, tokenizer, 20, at_most=10)
    assert asked == ["how are you? " * 50] * 10
    asked.clear()
    monkeypatch.setattr(module, "LONGEST", 7)
    with pytest.raises(ValueError, match=r"7 of its longest prompts do not fit"):
        require_fitting_prompts(records, tokenizer, 20)
    assert len(asked) == 7


def test_the_error_says_which_and_what_to_do(english):
    limit = 30
    found = overlong_prompts(RECORDS, english, limit)
    index, tokens = next(iter(found.items()))
    message = (
        rf"eval_dataset: {len(found)} of its longest prompts do not fit; that of record {index} "
        rf"takes {tokens} tokens .*at most 30.*without_overlong\(records, tokenizer, max_length=30"
    )
    with pytest.raises(ValueError, match=message):
        require_fitting_prompts(RECORDS, english, limit, name="eval_dataset")


def test_what_does_not_fit_is_left_out(english):
    limit = 30
    found = overlong_prompts(RECORDS, english, limit)
    with pytest.warns(UserWarning, match=f"left out {len(found)} of {len(RECORDS)} records"):
        kept = without_overlong(RECORDS, english, limit)
    assert kept == [r for i, r in enumerate(RECORDS) if i not in found]
    require_fitting_prompts(kept, english, limit)
    assert without_overlong(kept, english, limit) == kept
    with pytest.raises(ValueError, match=r"none of its 2 prompts fits .*max_length=3 tokens"):
        without_overlong([RECORDS[1], RECORDS[6]], english, 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Hi"}, r"train_dataset: record 1 has the columns \['question'\]"),
        ({"prompt": []}, r"train_dataset: the prompt of record 1 is \[\], expected a string"),
        ({"prompt": 7}, "train_dataset: the prompt of record 1 is 7, expected a string, or a list"),
    ],
)
def test_what_is_no_prompt_is_refused(english, record, message):
    with pytest.raises(ValueError, match=message):
        require_fitting_prompts([{"prompt": "Hi"}, record], english, 9)


def test_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="train_dataset: tokenizer: has no chat_template"):
        require_fitting_prompts([{"prompt": turns("Hi")}], tokenizer, 9)


def test_datasets_of_the_hub_are_read(english):
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": "Hi"}, {"prompt": "how are you? " * 9}]
    found = overlong_prompts(datasets.Dataset.from_list(records), english, 9)
    assert list(found) == [1]
