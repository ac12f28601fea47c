"""Prompts: checks before training, too long ones, batches."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mossrlhf.data import (
    Shuffled,
    encode_prompt,
    overlong_prompts,
    prompt_batch,
    require_fitting_prompts,
    set_dialogue_template,
    without_overlong,
)
from mossrlhf.data import prompts as module
from mossrlhf.data.prompts import require_records

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
DATASET = [{"prompt": "hi", "answer": 1}, {"prompt": "you"}]


class Frame:
    """As much of a pandas.DataFrame as tells it from a list."""

    iloc = None

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise KeyError(index)


class MapStyle:
    """A map-style dataset of torch."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return DATASET[index]


@pytest.mark.parametrize(
    "dataset",
    [
        DATASET,
        tuple(DATASET),
        MapStyle(),
        Dataset.from_list(DATASET),
        [{"prompt": [USER, ANSWER, USER]}],
        [{"prompt": [{"role": "system", "content": "be kind"}, USER]}],
    ],
)
def test_require_records_accepts_datasets(dataset):
    assert require_records(dataset, "train_dataset") is None  # and raises nothing


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("prompts.jsonl", r"got str, expected .*load_prompts\('prompts.jsonl'\)"),
        (DatasetDict(train=Dataset.from_list(DATASET)), r"DatasetDict, .*dataset\['train'\]"),
        ({"train": DATASET}, r"got dict, .*of \['train'\]: dataset\['train'\]"),
        ({}, "got dict"),
        (Frame(), r"got Frame, .*to_dict\('records'\)"),
        ((record for record in DATASET), r"got generator, .*list\(dataset\)"),
        (
            IterableDataset.from_generator(lambda: iter(DATASET)),
            r"IterableDataset.*list\(dataset\)",
        ),
        ({"hi"}, r"got set, .*list\(dataset\)"),
        (None, "got NoneType"),
        (["hi", "you"], r"record 0 is of type str, expected a dict; write \[\{'prompt': text\}"),
        ([1], "record 0 is of type int, expected a dict$"),
    ],
)
def test_require_records_names_a_remedy(dataset, message):
    with pytest.raises(TypeError, match="^train_dataset: .*" + message):
        require_records(dataset, "train_dataset")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "it is empty, expected at least one record"),
        ([{"text": "hi"}], r"record 0 has the columns \['text'\], expected one called 'prompt'"),
        ([{"prompt": "hi", "prompts": "hi"}], "record 0 has a column called 'prompts'.*rename"),
        ([{"prompt": "hi", "completions": "x"}], "has a column called 'completions'"),
        ([{"prompt": "hi", "completion_ids": [1]}], "has a column called 'completion_ids'"),
        (
            [{"prompt": [USER]}, {"prompt": [USER, ANSWER]}],
            r"record 1 ends with the assistant's 'hello'.*prompt\[:-1\]",
        ),
    ],
)
def test_require_records_refuses_unusable_prompts(dataset, message):
    with pytest.raises(ValueError, match="^eval_dataset: .*" + message):
        require_records(dataset, "eval_dataset")


def test_require_records_accepts_responses_in_examples():
    require_records([{"text": "a document"}], "ptx_dataset", prompts=False)
    require_records([{"prompt": [USER, ANSWER]}], "ptx_dataset", prompts=False)
    with pytest.raises(TypeError, match=r"record 0 is of type str, expected a dict$"):
        require_records(["a document"], "ptx_dataset", prompts=False)


def test_shuffled_processes_share_one_order_and_resume():
    records = [{"prompt": str(number)} for number in range(10)]
    whole = Shuffled(records, seed=3)
    taken = [whole.next(8), whole.next(8), whole.next(4)]
    rows = [record["prompt"] for part in taken for record in part]
    assert sorted(rows[:10]) == sorted(rows[10:]) == [str(number) for number in range(10)]
    assert rows[:10] != rows[10:]
    parts = [Shuffled(records, 3, index, 2) for index in range(2)]
    for count, expected in zip((4, 4, 2), taken, strict=True):
        assert [record for part in parts for record in part.next(count)] == expected
    assert [records[row] for part in parts for row in part.dealt] == taken[2]
    resumed = Shuffled(records, seed=3)
    resumed.load_state_dict({"position": 8})
    assert resumed.next(8) == taken[1]
    assert resumed.state_dict() == {"position": 16}
    with pytest.raises(ValueError, match="dataset: it is empty"):
        Shuffled([])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "hi"}, "expected one called 'prompt'"),
        ({"prompt": "hi", "completions": "x"}, "has a column called 'completions'"),
        ({"prompt": [USER, ANSWER]}, "a record ends with the assistant's 'hello'"),
    ],
)
def test_prompt_batch_refuses_unusable_records(record, message):
    with pytest.raises(ValueError, match="^records: .*" + message):
        prompt_batch([record], PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({}))))


def turns(*contents, system=None):
    roles = ("user", "assistant") * len(contents)
    said = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return [*([{"role": "system", "content": system}] if system else []), *said]


PROMPTS = [
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
def test_overlong_prompts_are_those_that_encode_prompt_refuses(english, limit):
    found = overlong_prompts(PROMPTS, english, limit)
    expected = {
        i for i, r in enumerate(PROMPTS) if "prompt" in r and refused(english, r["prompt"], limit)
    }
    assert set(found) == expected
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for index, tokens in found.items():
        prompt = PROMPTS[index]["prompt"]
        assert refused(english, prompt, tokens - 1)
        assert not refused(english, prompt, tokens)


def test_no_limit_fits_everything(english):
    assert overlong_prompts(PROMPTS, english, None) == {}
    require_fitting_prompts(PROMPTS, english, None)


def test_streams_without_length_are_not_checked(english):
    require_fitting_prompts(None, english, 9)
    require_fitting_prompts(iter(PROMPTS), english, 9)
    several = {"stream": iter(PROMPTS), "list": PROMPTS}
    with pytest.raises(ValueError, match=r"eval_dataset: \d of its longest"):
        require_fitting_prompts(several, english, 9, name="eval_dataset")


def test_short_prompts_are_not_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "prompt_encodings", lambda *_: pytest.fail("tokenized"))
    assert overlong_prompts([{"prompt": "Hi " * 20}] * 5, tokenizer, 62) == {}


def test_only_the_longest_prompts_are_tokenized(tokenizer, monkeypatch):
    """However many there are: those with the most bytes come first."""
    records = [{"prompt": "how are you? " * (1 + i % 50)} for i in range(500)]
    asked = []
    original = module.prompt_encodings
    monkeypatch.setattr(module, "prompt_encodings", lambda t, p: asked.append(p) or original(t, p))
    overlong_prompts(records, tokenizer, 20, at_most=10)
    assert asked == ["how are you? " * 50] * 10
    asked.clear()
    monkeypatch.setattr(module, "MAX_CHECKED", 7)
    with pytest.raises(ValueError, match=r"7 of its longest prompts do not fit"):
        require_fitting_prompts(records, tokenizer, 20)
    assert len(asked) == 7


def test_overlong_error_names_record_and_remedy(english):
    limit = 30
    found = overlong_prompts(PROMPTS, english, limit)
    index, tokens = next(iter(found.items()))
    message = (
        rf"eval_dataset: {len(found)} of its longest prompts do not fit; that of record {index} "
        rf"takes {tokens} tokens .*at most 30.*without_overlong\(records, tokenizer, max_length=30"
    )
    with pytest.raises(ValueError, match=message):
        require_fitting_prompts(PROMPTS, english, limit, name="eval_dataset")


def test_without_overlong_drops_what_does_not_fit(english):
    limit = 30
    found = overlong_prompts(PROMPTS, english, limit)
    with pytest.warns(UserWarning, match=f"left out {len(found)} of {len(PROMPTS)} records"):
        kept = without_overlong(PROMPTS, english, limit)
    assert kept == [r for i, r in enumerate(PROMPTS) if i not in found]
    require_fitting_prompts(kept, english, limit)
    assert without_overlong(kept, english, limit) == kept
    with pytest.raises(ValueError, match=r"none of its 2 prompts fits .*max_length=3 tokens"):
        without_overlong([PROMPTS[1], PROMPTS[6]], english, 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Hi"}, r"train_dataset: record 1 has the columns \['question'\]"),
        ({"prompt": []}, r"train_dataset: record 1 has the prompt \[\], expected a string"),
        ({"prompt": 7}, "train_dataset: record 1 has the prompt 7, expected a string, or a list"),
    ],
)
def test_fit_check_refuses_records_without_a_prompt(english, record, message):
    with pytest.raises(ValueError, match=message):
        require_fitting_prompts([{"prompt": "Hi"}, record], english, 9)


def test_messages_without_a_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="train_dataset: tokenizer: has no chat_template"):
        require_fitting_prompts([{"prompt": turns("Hi")}], tokenizer, 9)


def test_overlong_prompts_reads_hub_datasets(english):
    datasets = pytest.importorskip("datasets")
    records = [{"prompt": "Hi"}, {"prompt": "how are you? " * 9}]
    found = overlong_prompts(datasets.Dataset.from_list(records), english, 9)
    assert list(found) == [1]
