"""Records of files larger than memory: indexed in one pass, each parsed when it is asked for."""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, overload

from mossrlhf.data.canonical import (
    Reading,
    Record,
    Sieve,
    as_example,
    as_pair,
    as_prompt,
    require_format,
    shown,
    told_format,
)
from mossrlhf.data.formats import DataError, RecordFormat
from mossrlhf.data.jsontext import MAX_LINE_BYTES, is_list, lines, open_text, parse

Stamp = tuple[int, int]  # size in bytes, time of the last change in nanoseconds


class LazyRecords(Sequence[Record]):
    """The records of a JSON-lines file, parsed when they are asked for: a map-style dataset.

    8 bytes of memory a record. Slices are views, which read as lazily; so
    ``records[1000:]`` and ``records[:1000]`` make a training and a held-out set of a file of any
    size. Copies, pickles, and the workers of a data loader, forked or spawned, each open the file
    for themselves. Made by `stream_prompts`, `stream_pairs` and `stream_sft`.

    Args:
        file: where the lines are.
        reading: what is made of a line.
        offsets: where in the file the records begin, in bytes.

    Raises:
        DataError: on access, where the file is no longer what was indexed.

    Source: ours.
    """

    def __init__(self, file: "IndexedFile", reading: Reading, offsets: "array[int]") -> None:
        self.file = file
        self.reading = reading
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | LazyRecords":
        if isinstance(index, slice):
            return LazyRecords(self.file, self.reading, self.offsets[index])
        return self.reading(parse(self.file.line(self.offsets[index])))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"LazyRecords({self.file.name!r}, {len(self)} records)"


class IndexedFile:
    """A file that is expected to stay as it was when it was indexed, open once in each process.

    Args:
        name: what errors call it.
        path: of the file, absolute: it is opened again by other processes.
        stamp: its size in bytes and time of change in nanoseconds.

    Raises:
        DataError: where the file was changed, replaced or removed.

    Source: ours.
    """

    def __init__(self, name: str, path: Path, stamp: Stamp) -> None:
        self.name = name
        self.path = path
        self.stamp = stamp
        # By process: a forked one inherits the parent's handles, and with them the places these
        # stand at, which the two would move under each other.
        self._handles: dict[int, _Handle] = {}

    def __reduce__(self) -> tuple[type["IndexedFile"], tuple[str, Path, Stamp]]:
        return IndexedFile, (self.name, self.path, self.stamp)

    def line(self, offset: int) -> bytes:
        """Return the line at a place.

        Args:
            offset: of its first byte.
        """
        self.require_same()
        process = os.getpid()
        if process not in self._handles:
            self._handles.setdefault(process, _Handle(self.path))  # of two threads, one wins
        return self._handles[process].line(offset)

    def require_same(self) -> None:
        """Refuse a file that is no longer what was indexed.

        A change within its size is told from the time of change, as fine as the file system
        keeps that.
        """
        try:
            found = _stamp(os.stat(self.path))
        except FileNotFoundError:
            raise DataError(
                f"{self.name}: it was removed after it was indexed, expected it to stay where it "
                "is; put it back, or index another"
            ) from None
        if found != self.stamp:
            sizes = f"{self.stamp[0]} bytes then, {found[0]} now"
            raise DataError(
                f"{self.name}: it changed after it was indexed ({sizes}), expected it to stay as "
                "it is; index it again"
            )


class _Handle:
    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.lock = Lock()  # threads would move its place under each other too

    def line(self, offset: int) -> bytes:
        with self.lock:
            self.file.seek(offset)
            return self.file.readline(MAX_LINE_BYTES + 1)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


def stream_prompts(
    path: str | os.PathLike[str], *, format: RecordFormat | None = None, skip_bad: bool = False
) -> LazyRecords:
    """Read prompts as `load_prompts` does, from a JSON-lines file of any size.

    The file is read through once: every record is checked, and where it begins is kept. Bad ones
    stop it, or are left out and counted, as by `load_prompts`.

    Args:
        path: of a file with a record per line.
        format: from a raw record to a canonical one, as for `load_prompts`. Workers that are
            spawned, not forked, need one that can be pickled: no lambda.
        skip_bad: leave unusable records out, with one warning that counts them.

    Returns:
        The records, in their order, each parsed when it is asked for.

    Raises:
        DataError: naming file and line, the reason, and what was expected; where the file is one
            JSON list, which can only be read whole.
        FileNotFoundError: where there is no such file.
        TypeError: where `path` is no path, or `format` no function.

    Source: ours.
    """
    return _index(path, format, skip_bad, as_prompt)


def stream_pairs(
    path: str | os.PathLike[str], *, format: RecordFormat | None = None, skip_bad: bool = False
) -> LazyRecords:
    """Read preferences as `load_pairs` does, from a JSON-lines file of any size.

    Args:
        path: as for `stream_prompts`; so are the others.
        format: a function from a raw record to a canonical one, or None.
        skip_bad: leave unusable records out, with one warning that counts them.

    Returns:
        The records, in their order, each parsed when it is asked for.

    Source: ours.
    """
    return _index(path, format, skip_bad, as_pair)


def stream_sft(
    path: str | os.PathLike[str], *, format: RecordFormat | None = None, skip_bad: bool = False
) -> LazyRecords:
    """Read examples to imitate as `load_sft` does, from a JSON-lines file of any size.

    Args:
        path: as for `stream_prompts`; so are the others.
        format: a function from a raw record to a canonical one, or None.
        skip_bad: leave unusable records out, with one warning that counts them.

    Returns:
        The records, in their order, each parsed when it is asked for.

    Source: ours.
    """
    return _index(path, format, skip_bad, as_example)


def _index(
    source: str | os.PathLike[str],
    format: RecordFormat | None,
    skip_bad: bool,
    check: Callable[[Record], Record],
) -> LazyRecords:
    require_format(format)
    if not isinstance(source, str | os.PathLike) or source == "":
        remedy = "" if source == "" else "; records in memory are read by load_…"
        raise (ValueError if source == "" else TypeError)(
            f"path: got {shown(source)}, expected the path of a JSON-lines file{remedy}"
        )
    path, name = Path(source), os.fspath(source)
    offsets = array("Q")
    with open_text(path) as file:
        indexed = IndexedFile(name, path.absolute(), _stamp(os.fstat(file.fileno())))
        if is_list(path, file):
            raise DataError(
                f"{name}: it is one JSON list, which can only be read whole, expected one record "
                f"per line; read it by load_…, or write it anew: jq -c '.[]' {path.name} > "
                f"{path.stem}.jsonl"
            )
        convert = format
        if convert is None:
            raws = ((f"{name}:{number}", raw) for number, _, raw in lines(file))
            convert = told_format(raws, check, name)
            file.seek(0)
        reading = Reading(convert, check)
        sieve = Sieve(reading, skip_bad)
        for number, offset, raw in lines(file):
            if sieve(f"{name}:{number}", raw) is not None:
                offsets.append(offset)
    indexed.require_same()
    sieve.finish(name, told=format is None, stacklevel=3)
    return LazyRecords(indexed, reading, offsets)


def _stamp(status: Any) -> Stamp:
    return status.st_size, status.st_mtime_ns
