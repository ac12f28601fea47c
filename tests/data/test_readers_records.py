"""Of what is written, every record is read, or named with its place and the reason: none is lost.

Records of every format, good ones and broken ones, as JSON lines, as a JSON list, from memory, and
as a stream, through each reader. More than the few hundred of every day, and their number printed:
`MOSSRLHF_FUZZ_RECORDS=10000 pytest -s tests/data/test_readers_records.py`.
"""

import json
import os
import re
import warnings
from collections import Counter
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
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
from mossrlhf.data.formats import (
    alpaca,
    as_example,
    as_pair,
    as_prompt,
    detect_format,
    hh_strings,
    moss_dialogues,
    moss_pairs,
    moss_prompts,
    plain_text,
    sharegpt,
    standard,
)

RECORDS = int(os.environ.get("MOSSRLHF_FUZZ_RECORDS", "400"))
BATCH = 20
READERS = {
    load_prompts: (stream_prompts, as_prompt),
    load_pairs: (stream_pairs, as_pair),
    load_sft: (stream_sft, as_example),
}

# ---- records in order, by format ----------------------------------------------------------------

WORDS = st.text(min_size=1, max_size=6, alphabet='abc é你😀\n\t"\\').filter(str.strip)
TWO = st.lists(WORDS, min_size=2, max_size=2, unique_by=str.strip)
OTHERS = st.fixed_dictionaries({}, optional={"score": st.floats(-9, 9), "tags": st.lists(WORDS)})


def turns(length, names=("role", "content"), roles=("user", "assistant")):
    """A dialogue of so many turns."""
    role, content = names
    return st.tuples(*[WORDS] * length).map(
        lambda texts: [{role: roles[i % 2], content: text} for i, text in enumerate(texts)]
    )


def mapping(required, optional=None):
    return st.builds(
        lambda record, others: {**others, **record},
        st.fixed_dictionaries(required, optional=optional or {}),
        OTHERS,
    )


def pair(make):
    return st.builds(lambda two, rest: {**rest, **make(two)}, TWO, OTHERS)


DIALOGUE = st.one_of(*[turns(length) for length in (1, 2, 3)])
SHAREGPT = turns(3, ("from", "value"), ("human", "gpt")) | turns(
    2, ("from", "value"), ("human", "gpt")
)
GOOD = {
    standard: st.one_of(
        mapping({"prompt": WORDS | turns(1) | turns(3)}, {"response": WORDS, "completion": WORDS}),
        pair(lambda two: {"prompt": "help", "chosen": two[0], "rejected": two[1]}),
    ),
    sharegpt: st.one_of(
        mapping({"conversations": SHAREGPT}, {"system": WORDS}), mapping({"messages": DIALOGUE})
    ),
    alpaca: mapping({"instruction": WORDS}, {"input": WORDS, "output": WORDS, "system": WORDS}),
    hh_strings: pair(
        lambda two: {
            side: f"\n\nHuman: Hi\n\nAssistant: {text}"
            for side, text in zip(("chosen", "rejected"), two, strict=True)
        }
    ),
    moss_pairs: pair(
        lambda two: {"chosen": ["Hi", two[0]], "rejected": ["Hi", two[1]]},
    ),
    moss_prompts: st.lists(WORDS, min_size=1, max_size=4),
    moss_dialogues: st.lists(WORDS, min_size=1, max_size=4),
    plain_text: mapping({"text": WORDS}),
}

# ---- and what goes wrong with them --------------------------------------------------------------

ODD = st.recursive(
    st.sampled_from([None, True, 0, -1, 2**70, 1e308, float("nan"), "", " ", "\ud800", "\0", "Hi"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@st.composite
def broken(draw, good):
    """A record with a part that is odd, missing or too much, or something else altogether."""
    record = draw(good)
    keys = list(record) if isinstance(record, dict) else list(range(len(record)))
    match draw(st.sampled_from(["odd", "odd", "lost", "deep", "more", "all"])):
        case "odd":
            record[draw(st.sampled_from(keys))] = draw(ODD)
        case "lost":
            del record[draw(st.sampled_from(keys))]
        case "deep":
            key = draw(st.sampled_from(keys))
            record[key] = [record[key]]
        case "more" if isinstance(record, dict):
            record[draw(st.sampled_from(["prompt", "chosen", "system", "history"]))] = draw(ODD)
        case _:
            record = draw(ODD)
    return record


@st.composite
def batches(draw):
    """A format (given or to be told), and records in it and not; the first one is in order."""
    form = draw(st.sampled_from(list(GOOD)))
    told = form is not moss_dialogues and draw(st.booleans())
    mixed = st.one_of(GOOD[form], GOOD[form], broken(GOOD[form]))
    rest = draw(st.lists(mixed, min_size=BATCH - 1, max_size=BATCH - 1))
    return None if told else form, [draw(GOOD[form]), *rest]


@st.composite
def damaged(draw, text):
    """The bytes of a line, some of them wrong; still a line, and one."""
    where = draw(st.integers(1, len(text)))
    what = draw(st.sampled_from([b"\xff", b"\0", b"}", b"NaN", b"\r", b"", b"[" * 120]))
    return text[:where] + what + (b"" if what == b"" else text[where:])


def written(record):
    return json.dumps(record).encode()


# ---- what becomes of them -----------------------------------------------------------------------


def all_named(read, place, records):
    """Read; leave out what is refused by its place, and again, until all the rest is read.

    Returns what is read, and the reason of each that is not, by its number.
    """
    left, refused = list(enumerate(records)), {}
    while left:
        problem = None
        try:
            found = list(read([record for _, record in left]))
        except DataError as error:
            problem = str(error)
        if problem is None:
            assert len(found) == len(left)
            return found, refused
        named = re.fullmatch(rf"{place}: (.+)", problem, re.DOTALL)
        assert named, problem
        number, _ = left.pop(int(named[1]) - place.endswith(r":(\d+)"))  # lines count from 1
        refused[number] = named[2]
    return [], refused


def counted(read, records):
    """What is read where bad ones are left out, how many are said to be, and the first of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = list(read(records, skip_bad=True))
        except DataError as error:  # where all are bad
            return [], len(records), str(error)
    said = [re.match(r"skipped (\d+) of (\d+) records; the first: (.*)", str(w.message), re.DOTALL)
            for w in caught]  # fmt: skip
    said = [match for match in said if match]
    if not said:
        return found, 0, None
    (match,) = said
    assert int(match[2]) == len(records)
    return found, int(match[1]), match[3]


def from_file(reader, path, form, put):
    """A reader of records that are written to a file first."""

    def read(records, **options):
        path.write_bytes(put(records))
        return reader(path, format=form, **options)

    return read


def as_lines(records):
    return b"\n".join(records) + b"\n"


def as_list(records):
    return b"[" + b",\n".join(records) + b"]"


def none_lost(read, place, records, seen):
    found, refused = all_named(read, place, records)
    assert len(found) + len(refused) == len(records)
    assert all(refused.values())
    again, count, first = counted(read, records)
    # By their text: NaN is not itself.
    assert (repr(again), count) == (repr(found), len(refused))
    if refused:
        assert first.partition(": ")[2].endswith(refused[min(refused)].partition("; skip_bad")[0])
    seen["read"] += len(found)
    seen["refused"] += len(refused)
    seen["readings"] += 1
    return refused


def test_every_record_is_read_or_named(tmp_path):
    """Through each reader: as lines, damaged in part, and as a stream; as a list; from memory."""
    seen = Counter()

    @settings(
        max_examples=-(-RECORDS // BATCH),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(batch=batches(), data=st.data())
    def walk(batch, data):
        form, records = batch
        texts = list(map(written, records))
        lines = [
            data.draw(damaged(text)) if i and data.draw(st.integers(0, 9)) == 0 else text
            for i, text in enumerate(texts)
        ]
        seen["written"] += len(records)
        for load, (stream, check) in READERS.items():
            # Known beforehand: a first record that is left out must not change it.
            use = form or detect_format([("", records[0])], check, "")
            path, other = tmp_path / "a.jsonl", tmp_path / "a.json"
            line = re.escape(str(path)) + r":(\d+)"
            by_line = none_lost(from_file(load, path, use, as_lines), line, lines, seen)
            assert none_lost(from_file(stream, path, use, as_lines), line, lines, seen) == by_line
            item = re.escape(str(other)) + r": record (\d+)"
            none_lost(from_file(load, other, use, as_list), item, texts, seen)
            none_lost(partial(load, format=use), r"records\[(\d+)\]", records, seen)
            if form is None:  # told from the records, it is the same
                told = from_file(load, path, None, as_lines)
                assert (
                    counted(told, lines)[:2]
                    == counted(from_file(load, path, use, as_lines), lines)[:2]
                )

    walk()
    print(dict(seen))
    assert seen["written"] >= RECORDS
    assert seen["read"] + seen["refused"] == BATCH * seen["readings"]
    share = seen["refused"] / (seen["read"] + seen["refused"])
    assert 0.1 < share < 0.9  # both happen, or nothing is shown


def test_lost_records_are_detected():
    records = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "c"}]

    def loses(some, skip_bad=False):
        return load_prompts(some, skip_bad=skip_bad)[:-1]

    def silent(some, skip_bad=False):
        return load_prompts([record for record in some if record["prompt"]])

    def nameless(some, skip_bad=False):
        if any(not record["prompt"] for record in some):
            raise DataError("something is empty")
        return load_prompts(some)

    for wrong in (loses, silent, nameless):
        with pytest.raises(AssertionError):
            none_lost(wrong, r"records\[(\d+)\]", records, Counter())
