"""Readers: a file, a hub dataset or a sequence of dicts in, a list of canonical records out."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

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
from mossrlhf.data.formats import RecordFormat
from mossrlhf.data.jsontext import LINES, Located, records_of

Source = str | os.PathLike[str] | Iterable[Any]


def load_prompts(
    source: Source,
    *,
    format: RecordFormat | None = None,
    skip_bad: bool = False,
    split: str = "train",
) -> list[Record]:
    """Read prompts to answer: ``{"prompt": str | messages, **other columns}`` each.

    Pairs and SFT examples may serve too; their answers are left out (`load_sft` gives the
    response beside the prompt, and its records are good prompts as well).

    Args:
        source: path of a JSON or JSON-lines file, name of a hub dataset, or records: any iterable
            of dicts, a `datasets.Dataset` or `datasets.IterableDataset` included.
        format: from a raw record to a canonical one, one of `mossrlhf.data.formats` or your own;
            None: the one in which the first recognizable record is written.
        skip_bad: leave unusable records out, with one warning that counts them.
        split: of the hub dataset.

    Returns:
        The records, in their order.

    Raises:
        DataError: naming file and line (or record), the reason, and what was expected.
        TypeError: where `source` is a mapping (several splits, or one record), or neither a path
            nor records; where `format` is no function.
        FileNotFoundError: where `source` is a path and there is nothing.
        ImportError: where `source` is a hub dataset and `datasets` is not installed.

    Source: ours; lists of utterances as in C.
    """
    return _load(source, format, skip_bad, split, as_prompt)


def load_pairs(
    source: Source,
    *,
    format: RecordFormat | None = None,
    skip_bad: bool = False,
    split: str = "train",
) -> list[Record]:
    """Read preferences: ``{"prompt", "chosen": str, "rejected": str, **other columns}`` each.

    Args:
        source: as for `load_prompts`; so are the others.
        format: a function from a raw record to a canonical one, or None.
        skip_bad: leave unusable records out, with one warning that counts them.
        split: of the hub dataset.

    Returns:
        The records, in their order; `chosen` and `rejected` are the responses alone.

    Source: ours.
    """
    return _load(source, format, skip_bad, split, as_pair)


def load_sft(
    source: Source,
    *,
    format: RecordFormat | None = None,
    skip_bad: bool = False,
    split: str = "train",
) -> list[Record]:
    """Read examples to imitate, for SFT or PTX: ``{"prompt", "response": str}`` or ``{"text"}``.

    Of pairs, the chosen response is the one to imitate. Lists of utterances begin with the human.

    Args:
        source: as for `load_prompts`; so are the others.
        format: a function from a raw record to a canonical one, or None.
        skip_bad: leave unusable records out, with one warning that counts them.
        split: of the hub dataset.

    Returns:
        The records, in their order, other columns included.

    Source: ours; lists of utterances as in C.
    """
    return _load(source, format, skip_bad, split, as_example)


def _load(
    source: Source,
    format: RecordFormat | None,
    skip_bad: bool,
    split: str,
    check: Callable[[Record], Record],
) -> list[Record]:
    require_format(format)
    name, convert = _name(source), format
    with closing(_located(source, split)) as opened:  # an error would keep the file open
        located: Iterator[Located] = opened
        if convert is None:
            seen: list[Located] = []
            convert = told_format(_noting(opened, seen), check, name)
            located = chain(seen, opened)
        sieve = Sieve(Reading(convert, check), skip_bad)
        passed = (sieve(where, raw) for where, raw in located)
        records = [record for record in passed if record is not None]
    sieve.finish(name, told=format is None, stacklevel=3)
    return records


def _noting(located: Iterator[Located], seen: list[Located]) -> Iterator[Located]:
    for pair in located:
        seen.append(pair)
        yield pair


def _located(source: Source, split: str) -> Generator[Located, None, None]:
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
            f"source: got {shown(source)}, expected a path, the name of a hub dataset, or records"
        )
    if not isinstance(source, str | os.PathLike):
        return ((f"records[{index}]", record) for index, record in enumerate(source))
    path = Path(source)
    if path.is_file() or path.is_dir():
        return records_of(path)
    if not isinstance(source, str) or path.suffix in (".json", *LINES):
        raise FileNotFoundError(f"source: there is no file {path} (looked in {Path.cwd()})")
    rows = _read_hub(source, split)
    return ((f"{source}[{split}][{index}]", row) for index, row in enumerate(rows))


def _read_hub(name: str, split: str) -> Iterable[Record]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"source: {name!r} is no file here; reading it as a hub dataset takes the package "
            "datasets (pip install 'mossrlhf[data]')"
        ) from error
    return datasets.load_dataset(name, split=split)


def _name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "records"
