"""Files that are not text, and lines that are not records: what the readers raise."""

import gzip
import os
import subprocess
import sys
import textwrap
import time

import pytest

import mossrlhf
from mossrlhf.data import DataError, load_prompts, stream_prompts
from mossrlhf.data.readers import MAX_DEPTH, MAX_DIGITS, MAX_LINE_BYTES

GOOD = b'{"prompt": "a"}\n'
SKIP = "; skip_bad=True skips such records"
EACH = pytest.mark.parametrize("load", [load_prompts, stream_prompts])


def refused(load, source, **options):
    with pytest.raises(DataError) as error:
        load(source, **options)
    return str(error.value)


def nested(depth):
    """A record with a column so that lists and objects are `depth` deep."""
    return b'{"prompt": "a", "b": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


MALFORMED = "malformed JSON ({}), expected one JSON record per line, or a list"


BAD_LINES = {
    "latin-1": (
        b'{"prompt": "caf\xe9"}',
        "not UTF-8 (byte 0xe9 at offset 15), expected text saved as UTF-8",
    ),
    "NaN": (
        b'{"prompt": "a", "score": NaN}',
        "NaN is not JSON, expected a number; write null or a string",
    ),
    "Infinity": (
        b'{"prompt": "a", "score": [-Infinity]}',
        "-Infinity is not JSON, expected a number; write null or a string",
    ),
    "overflow": (
        b'{"prompt": "a", "score": 1e999}',
        "the number 1e999 is too large for a float; write null or a string",
    ),
    "deep": (
        nested(MAX_DEPTH + 1),
        f"lists and objects more than {MAX_DEPTH} deep, expected a record",
    ),
    "very deep": (
        nested(10**6),
        f"lists and objects more than {MAX_DEPTH} deep, expected a record",
    ),
    "unclosed": (
        b"[" * 10**6,
        f"lists and objects more than {MAX_DEPTH} deep, expected a record",
    ),
    "surrogate": (
        rb'{"prompt": "ab\ud83d"}',
        r"prompt holds \ud83d at character 2, half of a surrogate pair, expected Unicode text; "
        "was a text cut within an emoji?",
    ),
    "surrogate in a message": (
        rb'{"prompt": [{"role": "user", "content": "\ude00"}]}',
        r"prompt holds \ude00 at character 0, half of a surrogate pair, expected Unicode text; "
        "was a text cut within an emoji?",
    ),
    "surrogate in a column": (
        rb'{"prompt": "a", "reference": "\udfff"}',
        r"reference holds \udfff at character 0, half of a surrogate pair, expected Unicode text; "
        "was a text cut within an emoji?",
    ),
    "NUL": (
        b'{"prompt": "a\0"}',
        "a NUL byte at offset 13, expected text saved as UTF-8; was it saved as UTF-16, or did a "
        "write break off?",
    ),
    "zeros": (
        b"\0" * 4096,
        "a NUL byte at offset 0, expected text saved as UTF-8; was it saved as UTF-16, or did a "
        "write break off?",
    ),
    "huge integer": (
        b'{"prompt": "a", "id": ' + b"1" * (MAX_DIGITS + 1) + b"}",
        "an integer of 4301 digits, expected at most 4300",
    ),
    "number": (b"7", "got 7, expected a record: an object, or a list of utterances"),
    "string": (b'"Hi"', "got 'Hi', expected a record: an object, or a list of utterances"),
    "null": (b"null", "got None, expected a record: an object, or a list of utterances"),
    "over two lines": (
        b'{"prompt":',
        MALFORMED.format("Expecting value: line 2 column 1 (char 11)")
        + "; the record goes on in the next line, expected all of it in one",
    ),
    "a list's beginning": (
        b"[",
        MALFORMED.format("Expecting value: line 2 column 1 (char 2)")
        + " (one list of all records? then name it .json)",
    ),
    "control character": (
        b'{"prompt": "a\tb"}',
        MALFORMED.format("Invalid control character at: line 1 column 14 (char 13)"),
    ),
}


@EACH
@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_raise_or_are_skipped(tmp_path, load, case):
    data, reason = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + data + b"\n" + GOOD)
    assert refused(load, path) == f"{path}:2: {reason}{SKIP}"
    with pytest.warns(UserWarning, match="skipped") as caught:
        assert list(load(path, skip_bad=True)) == [{"prompt": "a"}] * 2
    message = f"skipped 1 of 3 records; the first: {path}:2: {reason}"
    assert [str(warning.message) for warning in caught] == [message]


@EACH
@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b'{"prompt": "b', "Unterminated string starting at: line 1 column 12 (char 11)"),
        (b'{"prompt": ', "Expecting value: line 1 column 12 (char 11)"),
        (b'{"prompt": "b"', "Expecting ',' delimiter: line 1 column 15 (char 14)"),
    ],
)
def test_truncated_last_line_is_named(tmp_path, load, end, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + end)
    cut = "; the file ends within this record; was a download or a write cut short?"
    assert refused(load, path) == f"{path}:2: {MALFORMED.format(reason)}{cut}{SKIP}"


@EACH
def test_marks_blank_lines_and_escapes_are_accepted(tmp_path, load):
    """A mark on each line, Windows lines, blanks, no end of the last, escaped NUL and emoji."""
    path = tmp_path / "a.jsonl"
    mark = b"\xef\xbb\xbf"
    good = rb'{"prompt": "\u0000\ud83d\ude00", "id": ' + b"1" * MAX_DIGITS + b', "x": 1.5}'
    path.write_bytes(mark + GOOD + b"\r\n \t\r\n\n" + mark + GOOD[:-1] + b"\r\n" + good)
    records = [*[{"prompt": "a"}] * 2, {"prompt": "\0😀", "id": int("1" * MAX_DIGITS), "x": 1.5}]
    assert list(load(path)) == records
    path.write_bytes(nested(MAX_DEPTH)[:-1] + b', "c": [1]}')  # more brackets than levels
    assert load(path)[0]["c"] == [1]


OTHERS = {
    "gzip": (
        gzip.compress(GOOD),
        "it is compressed by gzip, expected JSON text; unpack it first: gunzip",
    ),
    "zip": (b"PK\3\4..", "it is a zip archive, expected JSON text; unpack it first: unzip"),
    "parquet": (
        b"PAR1..",
        "it is a Parquet file, expected JSON text; pass datasets.load_dataset('parquet', "
        "data_files=path, split='train')",
    ),
    "empty": (b"", "empty, expected at least one record"),
    "blank": (b"\n \r\n\n", "empty, expected at least one record"),
}  # fmt: skip


@EACH
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("case", OTHERS)
def test_files_without_records_are_refused(tmp_path, load, name, case):
    path = tmp_path / name
    path.write_bytes(OTHERS[case][0])
    for skip_bad in (False, True):
        assert refused(load, path, skip_bad=skip_bad) == f"{path}: {OTHERS[case][1]}"


@EACH
def test_directories_are_refused(tmp_path, load):
    how = "or read it with the package datasets and pass what that returns"
    what = f"{tmp_path}: it is a directory, expected a file; pass one of its files"
    assert refused(load, tmp_path) == refused(load, str(tmp_path)) == f"{what}, {how}"
    for name in ("d.json", "c.jsonl", "a.txt", "b.jsonl", "e.jsonl"):
        (tmp_path / name).touch()
    assert refused(load, tmp_path) == f"{what} (b.jsonl, c.jsonl, d.json, …), {how}"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"prompt": "a"},\n{"prompt": "\xe9"}]',
         ": record 1: not UTF-8 (byte 0xe9 at offset 13), expected text saved as UTF-8" + SKIP),
        (b'[{"prompt": "a"},\n{"prompt": "b',
         ": " + MALFORMED.format("record 1 has no end")
         + "; the file ends within this record; was a download or a write cut short?"),
        (b'["a"]\n["b"]', ": " + MALFORMED.format("Extra data after byte 5")
         + " (one record per line? then name it .jsonl)"),
        (b'[{"prompt": "a"}, {"prompt": "b", "x": NaN}]',
         ": record 1: NaN is not JSON, expected a number; write null or a string" + SKIP),
        (b'[{"prompt": "a"}, ' + nested(MAX_DEPTH + 1) + b"]",
         f": record 1: lists and objects more than {MAX_DEPTH} deep, expected a record{SKIP}"),
        (b"[" * 10**6, ": " + MALFORMED.format("record 0 has no end")
         + "; the file ends within this record; was a download or a write cut short?"),
    ],
)  # fmt: skip
def test_bad_lists_are_refused(tmp_path, data, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert refused(load_prompts, path) == f"{path}{reason}"


def test_bad_list_element_is_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "b", "x": [NaN]}, {"prompt": "c"}]')
    with pytest.warns(UserWarning, match="skipped 1 of 3 records; the first: .*record 1: NaN"):
        assert load_prompts(path, skip_bad=True) == [{"prompt": "a"}, {"prompt": "c"}]


@EACH
def test_line_length_limit(tmp_path, load):
    path = tmp_path / "a.jsonl"
    around = len(GOOD)  # with the end of the line
    fits = b'{"prompt": "' + b"a" * (MAX_LINE_BYTES - around + 1) + b'"}\n'
    assert len(fits) == MAX_LINE_BYTES
    path.write_bytes(GOOD + fits + GOOD)
    assert len(load(path)[1]["prompt"]) == MAX_LINE_BYTES - around + 1
    path.write_bytes(GOOD + b" " + fits + GOOD)
    reason = (
        f"the line has {MAX_LINE_BYTES + 1} bytes, expected at most {MAX_LINE_BYTES} "
        "(readers.MAX_LINE_BYTES) in a record; is it a list of many records on one line? then "
        "name it .json"
    )
    assert refused(load, path) == f"{path}:2: {reason}{SKIP}"
    path.write_bytes(b" " * 2**22 + fits + GOOD)  # read in several pieces
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert list(load(path, skip_bad=True)) == [{"prompt": "a"}]


MEASURE = """
    import pathlib, sys
    from mossrlhf import data

    def status(name):
        text = pathlib.Path("/proc/self/status").read_text()
        return int(text.split(name + ":")[1].split()[0]) * 1024

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    try:
        records = data.load_prompts(sys.argv[1])
        print(len(records))
    except data.DataError as error:
        print(error)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measured by /proc")
@pytest.mark.parametrize(
    ("name", "most"),
    [("a.jsonl", 0.3), pytest.param("a.json", 3, marks=pytest.mark.slow)],
)
def test_long_line_is_not_held_in_memory(tmp_path, name, most):
    """As a record it is refused, as a list of records on one line it is read."""
    path = tmp_path / name
    record = b'{"prompt": "' + b"Hi there " * 100 + b'"}'
    count = 200_000_000 // len(record) // 100 * 100
    with path.open("wb") as file:
        file.write(b"[" + record)
        for _ in range(100):
            file.write((b"," + record) * (count // 100))
        file.write(b"]")
    code = textwrap.dedent(MEASURE)
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(mossrlhf.__file__))},
    )  # fmt: skip
    said, peak = run.stdout.splitlines()
    size = path.stat().st_size
    path.unlink()
    assert said == str(count + 1) or f":1: the line has {size} bytes, expected" in said
    assert int(peak) < most * size
    assert time.monotonic() - start < 60
