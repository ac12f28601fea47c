"""JSON text: the records of a file one by one, each as a value or as what is wrong with it."""

import codecs
from collections.abc import Callable, Generator, Iterator
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mossrlhf.data.formats import DataError

MAX_LINE_BYTES = 2**24
"""A longer line, 16 MiB, is no record but an accident, and is never held in memory."""

MAX_DEPTH = 100
"""Lists and objects within each other, at most: what parses can be shown, copied and pickled."""

MAX_DIGITS = 4300
"""Of an integer: Python's own limit, which not all its releases have; beyond it time is squared."""

LINES = (".jsonl", ".ndjson")
"""Names of files that hold a record per line, whatever these begin with."""

Located = tuple[str, Any]
"""Where a raw record stands, and the record (or the `DataError` that it deserves)."""

_OTHERS = {
    b"\x1f\x8b": "it is compressed by gzip, expected JSON text; unpack it first: gunzip",
    b"PK\x03\x04": "it is a zip archive, expected JSON text; unpack it first: unzip",
    b"BZh": "it is compressed by bzip2, expected JSON text; unpack it first: bunzip2",
    b"\xfd7zXZ": "it is compressed by xz, expected JSON text; unpack it first: unxz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd, expected JSON text; unpack it first: unzstd",
    b"PAR1": "it is a Parquet file, expected JSON text; pass "
    "datasets.load_dataset('parquet', data_files=path, split='train')",
}


def open_text(path: Path) -> BinaryIO:
    """Open a file of JSON text.

    Args:
        path: of the file.

    Raises:
        DataError: where it is a directory, or a file of another kind.

    Source: ours.
    """
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


def is_list(path: Path, file: BinaryIO) -> bool:
    """Return whether a file is one JSON list, not a record per line; it is read from its start.

    Args:
        path: of the file; its name decides where it is one of `LINES`.
        file: the same, open.

    Source: ours.
    """
    if path.suffix in LINES:
        return False
    head = file.read(2**12).removeprefix(codecs.BOM_UTF8)
    while head.isspace():
        head = file.read(2**12)
    file.seek(0)
    return head.lstrip().startswith(b"[")


def records_of(path: Path) -> Generator[Located, None, None]:
    """Yield the records of a file, in lines or a list.

    Args:
        path: of the file.

    Raises:
        DataError: where nothing of it can be read; a bad line is yielded as what is wrong with it.

    Source: ours.
    """
    with open_text(path) as file:
        if is_list(path, file):
            yield from ((f"{path}: record {i}", raw) for i, raw in enumerate(_list(path, file)))
        else:
            yield from ((f"{path}:{number}", raw) for number, _, raw in lines(file))


def lines(file: BinaryIO) -> Iterator[tuple[int, int, Any]]:
    r"""Yield number (from 1), offset and value of the lines of a file that are not blank.

    No more than a line is in memory, and none beyond `MAX_LINE_BYTES`. Lines end with "\n" alone:
    ``str.splitlines`` also breaks at U+2028, which JSON strings may hold.

    Args:
        file: open for reading bytes, at its start.

    Source: ours.
    """
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size = len(line)
        if size > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(2**20)):
                size += len(line)
            yield number, offset, _too_long(size)
        elif not line.isspace():
            yield number, offset, parse(line)
        offset += size


def parse(line: bytes) -> Any:
    """Return the value that a line of JSON text stands for, or the `DataError` that it deserves.

    Args:
        line: with its end, where it has one.

    Source: ours.
    """
    line = line.removeprefix(codecs.BOM_UTF8)  # of each line: files may have been joined
    whole = line.endswith(b"\n")
    cut = "the record goes on in the next line, expected all of it in one" if whole else _CUT
    try:
        value = _decode(_text(line), _STRICT, cut)
    except DataError as error:
        return error
    # Brackets are counted much faster than levels.
    deep = line.count(b"[") + line.count(b"{") > MAX_DEPTH
    return (_fault(value) if deep else None) or value


_CUT = "the file ends within this record; was a download or a write cut short?"


def _list(path: Path, file: BinaryIO) -> Iterator[Any]:
    try:
        # Not to be named: bytes, text and records together would be three times the file.
        records = _decode(_text(file.read().removeprefix(codecs.BOM_UTF8)), _MARKING, _CUT)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for record in records:
        yield _fault(record) or record


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {data[error.start]:#04x} at offset {error.start}"
        before = data.count(b"\n", 0, error.start)
        place += f", line {before + 1}" if before else ""
        raise DataError(f"not UTF-8 ({place}), expected text saved as UTF-8") from None
    if "\0" in text:
        raise DataError(
            f"a NUL byte at offset {data.index(0)}, expected text saved as UTF-8; was it saved as "
            "UTF-16, or did a write break off?"
        )
    return text


def _decode(text: str, decoder: JSONDecoder, cut: str) -> Any:
    try:
        return decoder.decode(text)
    except JSONDecodeError as error:
        reason = f"malformed JSON ({error}), expected one JSON record per line, or a list"
        if decoder is _MARKING and error.msg == "Extra data":
            reason += " (one record per line? then name it .jsonl)"
        elif decoder is _STRICT and text.strip() == "[":
            reason += " (one list of all records? then name it .json)"
        elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            reason += f"; {cut}"
        raise DataError(reason) from None
    except RecursionError:
        raise _too_deep() from None


def _decoder(bad: Callable[[str], Any]) -> JSONDecoder:
    def integer(digits: str) -> Any:
        if len(digits) > MAX_DIGITS:
            return bad(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
        return int(digits)

    def real(digits: str) -> Any:
        number = float(digits)
        if abs(number) == float("inf"):
            return bad(f"the number {digits:.20} is too large for a float; write null or a string")
        return number

    def constant(name: str) -> Any:
        return bad(f"{name} is no JSON, expected a number; write null or a string")

    return JSONDecoder(parse_constant=constant, parse_int=integer, parse_float=real)


def _raise(reason: str) -> NoReturn:
    raise DataError(reason)


# A line is one record, and bad if a number in it is. Of a list it has to be known which record is:
# the error stands in the place of the number.
_STRICT, _MARKING = _decoder(_raise), _decoder(DataError)


def _fault(value: Any) -> DataError | None:
    """Return what is wrong with a parsed value: an error within it, or its depth."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if error := next((item for item in level if isinstance(item, DataError)), None):
            return error
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return None
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for part in parts for child in part]
    return _too_deep()


def _too_deep() -> DataError:
    return DataError(f"lists and objects more than {MAX_DEPTH} deep, expected a record")


def _too_long(size: int) -> DataError:
    return DataError(
        f"the line has {size} bytes, expected at most {MAX_LINE_BYTES} (jsontext.MAX_LINE_BYTES) "
        "in a record; is it a list of many records on one line? then name it .json"
    )
