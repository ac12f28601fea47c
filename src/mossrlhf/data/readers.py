"""Readers of files, hub datasets and sequences of dicts, which return canonical records.

`load_…` return a list; `stream_…` index a file of any size and parse a record when it is accessed.
"""

import codecs
import os
import re
import warnings
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate, tee
from json import JSONDecodeError, JSONDecoder
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, overload

from mossrlhf.data.formats import (
    DataError,
    Format,
    Record,
    RecordConverter,
    as_example,
    as_pair,
    as_prompt,
    detect_format,
    moss_prompts,
    short_repr,
)

MAX_LINE_BYTES = 2**24  # a longer line is never held in memory
MAX_DEPTH = 100  # of lists and objects: whatever parses can also be printed, copied and pickled
MAX_DIGITS = 4300  # of an integer: the limit of Python itself, from 3.10.7 on
LINES = (".jsonl", ".ndjson")  # files of one record per line, whatever their first byte

FilePath = str | os.PathLike[str]
Source = FilePath | Iterable[Any]
Check = Callable[[Record], Record]
Stamp = tuple[int, int]  # size in bytes, modification time in nanoseconds


class Located(NamedTuple):
    """A raw record, or a `DataError` instead of it, and its place."""

    where: str
    raw: Any
    offset: int = 0  # in bytes, in a file
    size: int = 0


def load_prompts(
    source: Source, *, format: Format | None = None, skip_bad: bool = False, split: str = "train"
) -> list[Record]:
    """Read prompts: ``{"prompt": str | messages, **other columns}`` each.

    Pairs and SFT examples also serve as prompts; their responses are dropped (`load_sft` keeps the
    response beside the prompt, and its records can be used as prompts too).

    Args:
        source: path of a JSON or JSON-lines file, name of a hub dataset, or records: any iterable
            of dicts, a `datasets.Dataset` or `datasets.IterableDataset` included.
        format: a function from a raw record to a canonical one, from `mossrlhf.data.formats` or
            your own; None: detect it from the first recognizable record.
        skip_bad: skip unusable records, with one warning that counts them.
        split: of the hub dataset.

    Returns:
        The records, in order.

    Raises:
        DataError: names file and line (or record), the reason, and what was expected.
        TypeError: if `source` is a mapping (several splits, or one record), or neither a path
            nor records; if `format` is not a function.
        FileNotFoundError: if `source` is a path and there is no file.
        ImportError: if `source` is a hub dataset and `datasets` is not installed.
    """
    return _load(source, format, skip_bad, split, as_prompt)


def load_pairs(
    source: Source, *, format: Format | None = None, skip_bad: bool = False, split: str = "train"
) -> list[Record]:
    """Read preferences: ``{"prompt", "chosen": str, "rejected": str, **other columns}`` each.

    `chosen` and `rejected` are only the responses.

    Args, Returns, Raises: those of `load_prompts`.
    """
    return _load(source, format, skip_bad, split, as_pair)


def load_sft(
    source: Source, *, format: Format | None = None, skip_bad: bool = False, split: str = "train"
) -> list[Record]:
    """Read examples for SFT or PTX: ``{"prompt", "response": str}`` or ``{"text"}`` each.

    Of a pair, the chosen response is the example. Lists of utterances begin with the user's.

    Args, Returns, Raises: those of `load_prompts`.
    """
    return _load(source, format, skip_bad, split, as_example)


def stream_prompts(
    path: FilePath, *, format: Format | None = None, skip_bad: bool = False
) -> "LazyRecords":
    """Index the prompts of a JSON or JSON-lines file of any size, as `load_prompts` reads them.

    The file is read once: every record is checked, and its position is kept.

    Args:
        path: of a file with a record per line, or one JSON list of records.
        format: a function from a raw record to a canonical one, as for `load_prompts`. Spawned
            workers need one that can be pickled: not a lambda.
        skip_bad: skip unusable records, with one warning that counts them.

    Returns:
        The records, in order, each parsed when it is accessed.

    Raises:
        DataError: names file and line (or record), the reason, and what was expected.
        FileNotFoundError: if there is no such file.
        TypeError: if `path` is not a path, or `format` not a function.
    """
    return _index(path, format, skip_bad, as_prompt)


def stream_pairs(
    path: FilePath, *, format: Format | None = None, skip_bad: bool = False
) -> "LazyRecords":
    """Index the preferences of a file of any size, as `load_pairs` reads them.

    Args, Returns, Raises: those of `stream_prompts`.
    """
    return _index(path, format, skip_bad, as_pair)


def stream_sft(
    path: FilePath, *, format: Format | None = None, skip_bad: bool = False
) -> "LazyRecords":
    """Index the SFT or PTX examples of a file of any size, as `load_sft` reads them.

    Args, Returns, Raises: those of `stream_prompts`.
    """
    return _index(path, format, skip_bad, as_example)


class LazyRecords(Sequence[Record]):
    """The records of a file, each parsed when it is accessed: a map-style dataset.

    The index takes 12 bytes of memory per record. Slices are views, so ``records[1000:]`` and
    ``records[:1000]`` split a file of any size into a training and a held-out set. Copies, pickles,
    threads and data-loader workers are safe: nothing is kept open. `stream_prompts`,
    `stream_pairs` and `stream_sft` make it from an absolute `path`, the file's size and
    modification time (`stamp`), the `offsets` and `sizes` of its records in bytes, and the function
    `convert` from a raw record to a canonical one.

    Raises:
        DataError: on access, if the file has changed since it was indexed.
    """

    def __init__(
        self, path: Path, stamp: Stamp, convert: RecordConverter, offsets: array, sizes: array
    ) -> None:
        self.path = path
        self.stamp = stamp
        self.convert = convert
        self.offsets = offsets
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | LazyRecords":
        if isinstance(index, slice):
            places = self.offsets[index], self.sizes[index]
            return LazyRecords(self.path, self.stamp, self.convert, *places)
        text = _read_part(self.path, self.stamp, self.offsets[index], self.sizes[index])
        return self.convert(parse(text))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"LazyRecords({str(self.path)!r}, {len(self)} records)"


def _read_part(path: Path, stamp: Stamp, offset: int, size: int) -> bytes:
    """Return a part of an indexed file; raise `DataError` if the file has changed."""
    # Opened each time: threads and forked processes would share the position of one file object.
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        reason = "it was removed after it was indexed; put it back, or index another file"
        raise DataError(f"{path}: {reason}") from None
    with file:
        found = _stamp(os.fstat(file.fileno()))
        if found != stamp:
            sizes = f"{stamp[0]} bytes then, {found[0]} now"
            raise DataError(f"{path}: it changed after it was indexed ({sizes}); index it again")
        file.seek(offset)
        return file.read(size)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns


def _load(
    source: Source, format: Format | None, skip_bad: bool, split: str, check: Check
) -> list[Record]:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "records"
    records: list[Record] = []
    with closing(_locate(source, split)) as located:  # an error would keep the file open
        _read(located, name, format, check, skip_bad, lambda record, _: records.append(record))
    return records


def _index(path: FilePath, format: Format | None, skip_bad: bool, check: Check) -> LazyRecords:
    if path == "" or not isinstance(path, str | os.PathLike):
        remedy = "" if path == "" else "; for records in memory call load_…"
        raise (ValueError if path == "" else TypeError)(
            f"path: got {short_repr(path)}, expected the path of a JSON or JSON-lines file{remedy}"
        )
    offsets, sizes = array("Q"), array("I")

    def keep(_: Record, place: Located) -> None:
        offsets.append(place.offset)
        sizes.append(place.size)

    stamp = _stamp(os.stat(path))
    with closing(_records_of(Path(path))) as located:
        convert = _read(located, os.fspath(path), format, check, skip_bad, keep)
    _read_part(Path(path), stamp, 0, 0)  # raises if the file has changed meanwhile
    return LazyRecords(Path(path).absolute(), stamp, convert, offsets, sizes)


def _locate(source: Source, split: str) -> Generator[Located, None, None]:
    """Return the raw records of a source and their places."""
    if isinstance(source, Mapping):
        first = next(iter(source), "train")
        remedy = "pick one of its splits, or wrap a record in a list"
        if hasattr(source.get(first), "column_names"):  # a DatasetDict of the package datasets
            remedy = f"pick one of its splits: source[{first!r}]"
        raise TypeError(
            f"source: got a {type(source).__name__} with keys {list(source)}, expected a path, a "
            f"hub name or records; {remedy}"
        )
    named = isinstance(source, str | os.PathLike)
    if source == "" or not (named or isinstance(source, Iterable)):
        raise (ValueError if named else TypeError)(
            f"source: got {short_repr(source)}, expected a path, the name of a hub dataset, or "
            "records"
        )
    if not isinstance(source, str | os.PathLike):
        return (Located(f"records[{index}]", record) for index, record in enumerate(source))
    path = Path(source)
    if path.is_file() or path.is_dir():
        return _records_of(path)
    if not isinstance(source, str) or path.suffix in (".json", *LINES):
        raise FileNotFoundError(f"source: there is no file {path} (looked in {Path.cwd()})")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source: there is no file {source!r}; to read a hub dataset of that name, install the "
            "package datasets (pip install 'mossrlhf[data]')"
        ) from error
    rows = enumerate(datasets.load_dataset(source, split=split))
    return (Located(f"{source}[{split}][{index}]", row) for index, row in rows)


def _read(
    located: Iterator[Located],
    name: str,
    format: Format | None,
    check: Check,
    skip_bad: bool,
    keep: Callable[[Record, Located], None],
) -> RecordConverter:
    """Convert raw records and `keep` the good ones; raise at the first bad one, or skip it."""
    detected = format is None
    if format is None:
        located, ahead = tee(located)
        format = detect_format(ahead, check, name)
        del ahead  # otherwise `tee` would keep every record for it
    if not callable(format):
        raise TypeError(
            f"format: got {short_repr(format)}, expected a function from a record to a dict, such "
            "as mossrlhf.data.formats.alpaca, or None to detect the format"
        )
    convert = RecordConverter(format, check)
    count = bad = opened_by_assistant = 0
    first: DataError | None = None
    for item in located:
        count += 1
        try:
            record = convert(item.raw)
        except DataError as error:
            problem = DataError(f"{item.where}: {error}")
            if not skip_bad:
                raise DataError(f"{problem}; skip_bad=True skips such records") from None
            bad += 1
            first = first or problem
            continue
        if format is moss_prompts:
            opened_by_assistant += record["prompt"][0]["role"] == "assistant"
        keep(record, item)
    if count == 0:
        raise DataError(f"{name}: empty, expected at least one record")
    if first is not None and bad == count:
        raise first
    if bad:
        message = f"skipped {bad} of {count} records; the first: {first}"
        warnings.warn(message, UserWarning, stacklevel=4)  # at the caller of load_… or stream_…
    if detected and opened_by_assistant:
        warnings.warn(
            f"{name}: {opened_by_assistant} of {count - bad} dialogues start with the assistant, "
            "since their last utterance is read as the user's. If the first one is the user's, "
            "pass format=moss_dialogues; otherwise pass format=moss_prompts",
            UserWarning,
            stacklevel=4,
        )
    return convert


_OTHERS = {
    b"\x1f\x8b": "it is compressed by gzip, expected JSON text; unpack it first: gunzip",
    b"PK\x03\x04": "it is a zip archive, expected JSON text; unpack it first: unzip",
    b"BZh": "it is compressed by bzip2, expected JSON text; unpack it first: bunzip2",
    b"\xfd7zXZ": "it is compressed by xz, expected JSON text; unpack it first: unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd, expected JSON text; unpack it first: unzstd",
    b"PAR1": "it is a Parquet file, expected JSON text; pass "
    "datasets.load_dataset('parquet', data_files=path, split='train')",
}
_CUT = "; the file ends within this record; was a download or a write cut short?"
_CONTINUED = "; the record goes on in the next line, expected all of it in one"
_EXPECTED = "expected one JSON record per line, or a list"
# A string, the beginning of one without an end, or what nests and separates values.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|"|[][{},]', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")


def _open(path: Path) -> BinaryIO:
    """Open a file of JSON text; raise `DataError` for a directory or another kind of file."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".json", *LINES))
        raise DataError(
            f"{path}: it is a directory, expected a file; pass one of its files"
            + (f" ({', '.join(files[:3])}{', …' if files[3:] else ''})" if files else "")
            + ", or read it with the package datasets and pass what that returns"
        )
    file = path.open("rb")
    head = file.read(max(map(len, _OTHERS)))
    file.seek(0)
    for magic, reason in _OTHERS.items():
        if head.startswith(magic):
            file.close()
            raise DataError(f"{path}: {reason}")
    return file


def _records_of(path: Path) -> Generator[Located, None, None]:
    """Yield the records of a file of lines, or of one JSON list; one is in memory at a time."""
    with _open(path) as file:
        head = b""
        if path.suffix not in LINES:
            head = file.read(2**12).removeprefix(codecs.BOM_UTF8)
            while head.isspace():
                head = file.read(2**12)
            file.seek(0)
        is_list = head.lstrip().startswith(b"[")
        yield from _elements(file, path) if is_list else _lines(file, path)


def _lines(file: BinaryIO, path: Path) -> Iterator[Located]:
    """Yield the lines that are not blank, counted from 1."""
    number = offset = 0
    # Not str.splitlines, which also breaks at U+2028: JSON strings may hold that.
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size = len(line)
        where = f"{path}:{number}"
        if size > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(2**20)):
                size += len(line)
            error = (
                f"the line has {size} bytes, expected at most {MAX_LINE_BYTES} "
                "(readers.MAX_LINE_BYTES) in a record; is it a list of many records on one line? "
                "then name it .json"
            )
            yield Located(where, DataError(error))
        elif not line.isspace():
            hint = _CONTINUED if line.endswith(b"\n") else _CUT
            yield Located(where, parse(line, hint), offset, size)
        offset += size


def _elements(file: BinaryIO, path: Path) -> Iterator[Located]:
    """Yield the elements of a JSON list, counted from 0; a bad one does not end it."""
    text = mmap(file.fileno(), 0, access=ACCESS_READ)  # it may be larger than memory
    start = depth = number = 0
    mark = b""
    for place, mark in _marks(text):
        depth += (mark in b"[{") - (mark in b"]}")
        if not start:
            start = place + 1
        elif depth == 0 or (depth == 1 and mark == b","):
            element = text[start:place]
            if number or mark == b"," or not _SPACE.fullmatch(element):  # the list is not empty
                where = f"{path}: record {number}"
                yield Located(where, parse(element), start, len(element))
            start, number = place + 1, number + 1
        if depth == 0:
            break
    if depth:
        reason = f"malformed JSON (record {number} has no end), {_EXPECTED}{_CUT}"
        raise DataError(f"{path}: {reason}")
    if mark == b"}" or not _SPACE.fullmatch(text, start):
        reason = f"malformed JSON (Extra data after byte {start}), {_EXPECTED}"
        raise DataError(f"{path}: {reason} (one record per line? then name it .jsonl)")


def parse(text: bytes, hint: str = "") -> Any:
    """Return the value of a JSON text, or a `DataError` instead of it.

    The error of a text that ends too early includes the `hint`.
    """
    text = text.removeprefix(codecs.BOM_UTF8)  # of each line: files may have been joined
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        return DataError(f"lists and objects more than {MAX_DEPTH} deep, expected a record")
    try:
        decoded = text.decode()
        if "\0" in decoded:
            return DataError(
                f"a NUL byte at offset {text.index(0)}, expected text saved as UTF-8; was it "
                "saved as UTF-16, or did a write break off?"
            )
        return _DECODER.decode(decoded)
    except UnicodeDecodeError as error:
        place = f"byte {text[error.start]:#04x} at offset {error.start}"
        return DataError(f"not UTF-8 ({place}), expected text saved as UTF-8")
    except JSONDecodeError as error:
        if text.strip() == b"[":
            hint = " (one list of all records? then name it .json)"
        elif error.pos < len(error.doc.rstrip()) and not error.msg.startswith("Unterminated"):
            hint = ""
        return DataError(f"malformed JSON ({error}), {_EXPECTED}{hint}")
    except ValueError as error:  # of `_integer`, `_real` or `_constant`
        return DataError(str(error))


def _marks(text: bytes | mmap) -> Iterator[tuple[int, bytes]]:
    """Yield place and text of the brackets, braces and commas that are not within strings."""
    for token in _TOKEN.finditer(text):
        if token[0] == b'"':  # of a string without an end
            return
        if not token[0].startswith(b'"'):
            yield token.start(), token[0]


def _depth(text: bytes) -> int:
    steps = ((mark in b"[{") - (mark in b"]}") for _, mark in _marks(text))
    return max(accumulate(steps), default=0)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(
            f"the number {digits:.20} is too large for a float; write null or a string"
        )
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON, expected a number; write null or a string")


_DECODER = JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_real)
