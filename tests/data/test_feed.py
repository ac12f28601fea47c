"""What a trainer takes for a dataset, and what it says of anything else."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mossrlhf.data import prompt_batch
from mossrlhf.data.records import require_records

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
RECORDS = [{"prompt": "hi", "answer": 1}, {"prompt": "you"}]


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
        return RECORDS[index]


@pytest.mark.parametrize(
    "dataset",
    [
        RECORDS,
        tuple(RECORDS),
        MapStyle(),
        Dataset.from_list(RECORDS),
        [{"prompt": [USER, ANSWER, USER]}],
        [{"prompt": [{"role": "system", "content": "be kind"}, USER]}],
    ],
)
def test_datasets_pass(dataset):
    assert require_records(dataset, "train_dataset") is None  # and raises nothing


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("prompts.jsonl", r"got str, expected .*load_prompts\('prompts.jsonl'\)"),
        (DatasetDict(train=Dataset.from_list(RECORDS)), r"DatasetDict, .*dataset\['train'\]"),
        ({"train": RECORDS}, r"got dict, .*of \['train'\]: dataset\['train'\]"),
        ({}, "got dict"),
        (Frame(), r"got Frame, .*to_dict\('records'\)"),
        ((record for record in RECORDS), r"got generator, .*list\(dataset\)"),
        (
            IterableDataset.from_generator(lambda: iter(RECORDS)),
            r"IterableDataset.*list\(dataset\)",
        ),
        ({"hi"}, r"got set, .*list\(dataset\)"),
        (None, "got NoneType"),
        (["hi", "you"], r"record 0 is of type str, expected a dict; write \[\{'prompt': text\}"),
        ([1], "record 0 is of type int, expected a dict$"),
    ],
)
def test_what_is_no_dataset_is_named_with_its_remedy(dataset, message):
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
def test_records_of_no_use_are_refused(dataset, message):
    with pytest.raises(ValueError, match="^eval_dataset: .*" + message):
        require_records(dataset, "eval_dataset")


def test_records_to_imitate_may_be_answered():
    require_records([{"text": "a document"}], "ptx_dataset", prompts=False)
    require_records([{"prompt": [USER, ANSWER]}], "ptx_dataset", prompts=False)
    with pytest.raises(TypeError, match=r"record 0 is of type str, expected a dict$"):
        require_records(["a document"], "ptx_dataset", prompts=False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "hi"}, "expected one called 'prompt'"),
        ({"prompt": "hi", "completions": "x"}, "has a column called 'completions'"),
        ({"prompt": [USER, ANSWER]}, "a record ends with the assistant's 'hello'"),
    ],
)
def test_what_the_check_has_not_seen_is_refused_as_its_turn_comes(record, message):
    with pytest.raises(ValueError, match="^records: .*" + message):
        prompt_batch([record], PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({}))))
