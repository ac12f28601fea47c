"""Files that are no data."""

import gzip

from bad_inputs.room import Room
from mossrlhf.data import load_pairs, load_prompts, load_sft, stream_pairs, stream_prompts
from mossrlhf.data.readers import MAX_DEPTH, MAX_LINE_BYTES

room = Room("Data files")
row = room.row
GOOD = b'{"prompt": "a"}\n'


def line(shop, content, **options):
    """The reader's answer to a line between good ones."""
    return load_prompts(shop.file("a.jsonl", GOOD + content + b"\n" + GOOD), **options)


row(
    "a JSON-lines file cut off within its last record",
    "DataError: …a.jsonl:2: malformed JSON (Unterminated string…the file ends within this record; "
    "was a download or a write cut short?",
    lambda shop: load_prompts(shop.file("a.jsonl", GOOD + b'{"prompt": "b')),
)
row(
    "a JSON list cut off",
    "DataError: …a.json: malformed JSON (…the file ends within this record",
    lambda shop: load_prompts(shop.file("a.json", b'[{"prompt": "a"}, {"prompt": "b')),
)
row(
    "text that is not UTF-8 (Latin-1)",
    "DataError: …a.jsonl:2: not UTF-8 (byte 0xe9 at offset 15), expected text saved as UTF-8",
    lambda shop: line(shop, b'{"prompt": "caf\xe9"}'),
)
row(
    "text saved as UTF-16",
    "DataError: …a.jsonl:1: …not UTF-8",
    lambda shop: load_prompts(shop.file("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"))),
)
row(
    "a file compressed by gzip",
    "DataError: …it is compressed by gzip, expected JSON text; unpack it first: gunzip",
    lambda shop: load_prompts(shop.file("a.jsonl.gz", gzip.compress(GOOD))),
)
row(
    "a Parquet file",
    "DataError: …it is a Parquet file, expected JSON text; pass datasets.load_dataset('parquet'",
    lambda shop: load_prompts(shop.file("a.parquet", b"PAR1....")),
)
row(
    "an empty file",
    "DataError: …a.jsonl: empty, expected at least one record",
    lambda shop: load_pairs(shop.file("a.jsonl", b"\n \n")),
)
row(
    "a directory",
    "DataError: …it is a directory, expected a file; pass one of its files (a.jsonl)",
    lambda shop: load_sft(shop.file("a.jsonl", GOOD).parent),
)
row(
    "a file that is not there",
    "FileNotFoundError: source: there is no file …gone.jsonl (looked in …)",
    lambda shop: load_prompts(shop.folder / "gone.jsonl"),
)
row(
    "NaN in a record",
    "DataError: …a.jsonl:2: NaN is not JSON, expected a number; write null or a string",
    lambda shop: line(shop, b'{"prompt": "a", "score": NaN}'),
)
row(
    "a number too large for a float",
    "DataError: …a.jsonl:2: the number 1e999 is too large for a float; write null or a string",
    lambda shop: line(shop, b'{"prompt": "a", "score": 1e999}'),
)
row(
    "lists nested a million deep",
    f"DataError: …a.jsonl:2: lists and objects more than {MAX_DEPTH} deep, expected a record",
    lambda shop: line(shop, b"[" * 10**6),
)
row(
    "half of a surrogate pair",
    r"DataError: …a.jsonl:2: prompt holds \ud83d at character 2, half of a surrogate pair",
    lambda shop: line(shop, rb'{"prompt": "ab\ud83d"}'),
)
row(
    "zeros, where a write broke off",
    "DataError: …a.jsonl:2: a NUL byte at offset 0, expected text saved as UTF-8; was it saved as "
    "UTF-16, or did a write break off?",
    lambda shop: line(shop, b"\0" * 4096),
)
row(
    "a line longer than 16 MiB",
    f"DataError: …a.jsonl:1: the line has {MAX_LINE_BYTES + 1} bytes, expected at most",
    lambda shop: load_prompts(shop.file("a.jsonl", b" " * MAX_LINE_BYTES + b"\n" + GOOD)),
)
row(
    "a record spread over several lines",
    "DataError: …a.jsonl:2: malformed JSON (…the record goes on in the next line, expected all of "
    "it in one",
    lambda shop: line(shop, b'{"prompt":\n"b"}'),
)
row(
    "a JSON list cut off, for `stream_prompts`",
    "DataError: …a.json: malformed JSON (record 1 has no end)…the file ends within this record",
    lambda shop: stream_prompts(shop.file("a.json", b'[{"prompt": "a"}, {"prompt": "b')),
)


@row(
    "a file that changes after `stream_prompts` has indexed it",
    "DataError: …it changed after it was indexed (…); index it again",
)
def changes(shop):
    records = stream_prompts(shop.file("a.jsonl", GOOD))
    shop.file("a.jsonl", GOOD * 2)
    return records[0]


row(
    "a number for a path",
    "TypeError: source: got 3, expected a path, the name of a hub dataset, or records",
    lambda shop: load_prompts(3),
)
row(
    "None for a path",
    "TypeError: source: got None, expected a path, the name of a hub dataset, or records",
    lambda shop: load_pairs(None),
)
row(
    "a number for the path of a stream",
    "TypeError: path: got 3, expected the path of a JSON or JSON-lines file",
    lambda shop: stream_pairs(3),
)
row(
    "a list of records for `stream_prompts`",
    "TypeError: path: got [{'prompt': 'a'}], expected the path of a JSON or JSON-lines file; for "
    "records in memory call load_",
    lambda shop: stream_prompts([{"prompt": "a"}]),
)
row(
    "an empty string for a path",
    "ValueError: source: got '', expected a path, the name of a hub dataset, or records",
    lambda shop: load_prompts(""),
)
