"""Whatever is read, readers raise nothing but `DataError`, and lose no line.

`MOSSRLHF_FUZZ_EXAMPLES=10000 pytest tests/data/test_readers_fuzz.py` tries more than the few
hundred examples of every day.
"""

import json
import os
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mossrlhf.data import (
    DataError,
    load_pairs,
    load_prompts,
    load_sft,
    stream_pairs,
    stream_prompts,
    stream_sft,
)

EXAMPLES = int(os.environ.get("MOSSRLHF_FUZZ_EXAMPLES", "200"))
READERS = {load_prompts: stream_prompts, load_pairs: stream_pairs, load_sft: stream_sft}

KEYS = [
    "prompt", "chosen", "rejected", "response", "completion", "output", "text", "instruction",
    "input", "history", "system", "conversations", "messages", "role", "content", "from", "value",
    "other",
]  # fmt: skip
TEXTS = [
    "", " ", "Hi", "a\n", "\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi\n\nAssistant: B", "user",
    "human", "gpt", "assistant", "system", "\ud800", "\0", "你好", "\u2028",
]  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(TEXTS), st.text(max_size=5), st.none(), st.booleans(), st.integers(),
    st.floats(), st.just(5000).map(lambda digits: 10**digits),
)  # fmt: skip


def mapping(values):
    return st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.text(max_size=3)), values, max_size=5
    )


ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | mapping(inner), max_leaves=12
)
TEXT = st.sampled_from(TEXTS)
TURN = st.fixed_dictionaries({"role": TEXT, "content": TEXT}) | st.fixed_dictionaries(
    {"from": TEXT, "value": TEXT}
)
SIDE = st.one_of(TEXT, TURN, st.lists(TURN, max_size=3), st.lists(TEXT, max_size=3), ANYTHING)
RECORDS = st.one_of(
    ANYTHING,
    mapping(SIDE),
    st.lists(TEXT, max_size=4),
    st.fixed_dictionaries({"prompt": SIDE}, optional={"response": SIDE}),
    st.fixed_dictionaries({"chosen": SIDE, "rejected": SIDE}, optional={"prompt": SIDE}),
    st.fixed_dictionaries(
        {"instruction": TEXT}, optional={"input": SIDE, "output": SIDE, "history": SIDE}
    ),
    st.fixed_dictionaries({"conversations": SIDE}, optional={"chosen": SIDE, "rejected": SIDE}),
)
PIECES = [
    b"[", b"]", b"{", b"}", b'"', b":", b",", b"\n", b"\r\n", b"\r", b" ", b"\0", b"\\", b"\\u",
    b"\\ud800", b"NaN", b"1", b"9" * 5000, b"1e999", b"null", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9",
    b"\x1f\x8b", b"[" * 200, b"]" * 200, b"[" * 3000, b'{"a":' * 101, b"}" * 101, b"\x0c",
    b"\xc2\x85",
    b'{"prompt": "a"}', b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', b'{"text": "t"}\n',
    b'["Hi"]\n', b'["Hi", "Yes?"]\n', b'"prompt"',
]  # fmt: skip


def written(record):
    try:
        return json.dumps(record).encode()
    except ValueError:  # an integer of too many digits
        return b"1" * 5001


FILES = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.lists(st.one_of(RECORDS.map(written), st.binary(max_size=9)), max_size=5).map(b"\n".join),
    st.lists(RECORDS, max_size=4).map(
        lambda records: b"[" + b",".join(map(written, records)) + b"]"
    ),
)


def outcome(read, source, skip_bad):
    """What is read and how many are said to be skipped; or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            records = list(read(source, skip_bad=skip_bad))
        except DataError as error:
            return str(error)
    said = [str(warning.message) for warning in caught]
    skipped = [re.match(r"skipped (\d+) of (\d+) records", message) for message in said]
    counts = [tuple(map(int, match.groups())) for match in skipped if match]
    assert len(counts) <= (1 if skip_bad else 0)
    return records, *(counts[0] if counts else (0, len(records)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=EXAMPLES)
@given(data=FILES, name=st.sampled_from(["a.jsonl", "a.json", "a.txt"]))
def test_readers_raise_only_data_error_on_any_file(folder, data, name):
    path = folder / name
    path.write_bytes(data)
    count = sum(not line.isspace() and line != b"" for line in data.split(b"\n"))
    for load, stream in READERS.items():
        for skip_bad in (False, True):
            loaded = outcome(load, path, skip_bad)
            streamed = outcome(stream, path, skip_bad)
            assert streamed == loaded
            if not isinstance(loaded, str):
                records, skipped, total = loaded
                assert len(records) + skipped == total
                is_list = data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
                assert total == count or (is_list and name != "a.jsonl")


@settings(max_examples=EXAMPLES)
@given(records=st.lists(RECORDS, max_size=5))
def test_readers_raise_only_data_error_on_any_records(records):
    for load in READERS:
        for skip_bad in (False, True):
            loaded = outcome(load, records, skip_bad)
            if not isinstance(loaded, str):
                assert len(loaded[0]) + loaded[1] == loaded[2] == len(records)
