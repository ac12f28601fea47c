"""Readers: a file, a hub dataset or a sequence of dicts in, a list of canonical records out."""

import codecs
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mossrlhf.data.formats import DataError, RecordFormat, moss_dialogues, moss_prompts, sniff

Source = str | os.PathLike[str] | Iterable[Any]
Record = dict[str, Any]
Located = tuple[str, Any]  # where a raw record stands, and the record (or what is wrong with it)

_ANSWERS = ("response", "chosen", "rejected")
_LINES = (".jsonl", ".ndjson")


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
        source: path of a JSON or JSON-lines file, name of a hub dataset, or records.
        format: from a raw record to a canonical one, one of `mossrlhf.data.formats` or your own;
            None: the one in which the first recognizable record is written.
        skip_bad: leave unusable records out, with one warning that counts them.
        split: of the hub dataset.

    Returns:
        The records, in their order.

    Raises:
        DataError: naming file and line (or record), the reason, and what was expected.
        FileNotFoundError: where `source` is a path and there is nothing.
        ImportError: where `source` is a hub dataset and `datasets` is not installed.

    Source: ours; lists of utterances as in C.
    """
    located = _read(source, split)
    convert = format or _sniffed(located)
    records = _convert(located, convert, _as_prompt, skip_bad)
    opening = sum(
        not isinstance(record["prompt"], str) and record["prompt"][0]["role"] == "assistant"
        for record in records
    )
    if format is None and convert is moss_prompts and opening:
        warnings.warn(
            f"{_name(source)}: with the last utterance taken for the human's, {opening} of "
            f"{len(records)} dialogues open with the assistant. If the first one is the human's, "
            "pass format=moss_dialogues; if they are right so, pass format=moss_prompts",
            UserWarning,
            stacklevel=2,
        )
    return records


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
    located = _read(source, split)
    return _convert(located, format or _sniffed(located), _as_pair, skip_bad)


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
    located = _read(source, split)
    if format is None:
        format = _sniffed(located)
        format = moss_dialogues if format is moss_prompts else format
    return _convert(located, format, _as_example, skip_bad)


def _convert(
    located: list[Located],
    convert: RecordFormat,
    check: Callable[[Record], Record],
    skip_bad: bool,
) -> list[Record]:
    records, problems = [], []
    for where, raw in located:
        try:
            if isinstance(raw, DataError):
                raise raw
            records.append(check(convert(raw)))
        except DataError as error:
            problems.append(DataError(f"{where}: {error}"))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"{raw!r:.80} is not in the format {convert.__name__}: {error!r}"
            problems.append(DataError(f"{where}: {reason}"))
        if problems and not skip_bad:
            raise DataError(f"{problems[0]}; skip_bad=True leaves such records out")
    if problems and not records:
        raise problems[0]
    if problems:
        warnings.warn(
            f"skipped {len(problems)} of {len(located)} records; the first: {problems[0]}",
            UserWarning,
            stacklevel=3,
        )
    return records


def _sniffed(located: list[Located]) -> RecordFormat:
    for _, raw in located:
        if (found := sniff(raw)) is not None:
            return found
    where, raw = located[0]
    if isinstance(raw, DataError):
        raise DataError(f"{where}: {raw}")
    got = f"keys {sorted(raw)}" if isinstance(raw, Mapping) else f"{raw!r:.80}"
    raise DataError(
        f"{where}: got {got}, expected prompt, chosen and rejected, conversations, messages, "
        "instruction or text among the keys, or a list of utterances; for another format pass "
        "format=, a function from a record to a dict"
    )


def _as_prompt(record: Record) -> Record:
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("the prompt is empty")
    elif prompt is None:
        raise DataError(f"no prompt in a record of {', '.join(sorted(record))}")
    elif not prompt:
        raise DataError("there is no user turn, so nothing to answer")
    elif prompt[-1]["role"] != "user":
        raise DataError(
            f"the prompt ends with the {prompt[-1]['role']}'s turn, expected the user's"
        )
    elif not prompt[-1]["content"].strip():
        raise DataError("the last human turn is empty")
    return {key: value for key, value in record.items() if key not in _ANSWERS}


def _as_pair(record: Record) -> Record:
    answers = {"chosen": _answer(record, "chosen"), "rejected": _answer(record, "rejected")}
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise DataError("chosen and rejected are identical, expected a preference")
    return {**_as_prompt(record), **answers}


def _as_example(record: Record) -> Record:
    if "text" in record and "prompt" not in record:
        _answer(record, "text")
        return record
    key = "chosen" if "chosen" in record else "response"
    return {**_as_prompt(record), "response": _answer(record, key)}


def _answer(record: Record, key: str) -> str:
    if key not in record:
        raise DataError(f"no {key} in a record of {', '.join(sorted(record))}")
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{key} is {text!r:.80}, expected a non-empty string")
    return text


def _read(source: Source, split: str) -> list[Located]:
    located = list(_located(source, split))
    if not located:
        raise DataError(f"{_name(source)}: empty, expected at least one record")
    return located


def _located(source: Source, split: str) -> Iterator[Located]:
    if isinstance(source, Mapping):
        raise TypeError(
            f"source: got a {type(source).__name__} with keys {list(source)}, expected a path, a "
            "hub name or a sequence of records; pass one of its splits, or wrap a record in a list"
        )
    if not isinstance(source, str | os.PathLike):
        return ((f"records[{index}]", record) for index, record in enumerate(source))
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if not isinstance(source, str) or path.suffix in (".json", *_LINES):
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


def _read_file(path: Path) -> Iterator[Located]:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix in _LINES or not data.lstrip().startswith(b"["):
        # Split bytes at "\n": str.splitlines also breaks at U+2028, which JSON strings may hold.
        lines = ((f"{path}:{n}", line) for n, line in enumerate(data.split(b"\n"), start=1))
        return ((where, _parse(line)) for where, line in lines if line.strip())
    records = _parse(data)
    if isinstance(records, DataError):
        raise DataError(f"{path}: {records} (one record per line? then name it .jsonl)")
    return ((f"{path}: record {index}", record) for index, record in enumerate(records))


def _parse(data: bytes) -> Any:
    """Return the value that JSON text stands for, or the `DataError` that it deserves."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at offset {error.start}"
        return DataError(f"not UTF-8 ({byte}), expected text saved as UTF-8")
    except json.JSONDecodeError as error:
        return DataError(f"malformed JSON ({error}), expected one JSON record per line, or a list")


def _name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "records"
