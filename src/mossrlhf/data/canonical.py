"""What a canonical record has to be, and the sieve that records go through."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mossrlhf.data.formats import DataError, RecordFormat, moss_dialogues, moss_prompts, sniff
from mossrlhf.data.jsontext import Located

Record = dict[str, Any]

_ANSWERS = ("response", "chosen", "rejected")


@dataclass(frozen=True)
class Reading:
    """From a raw record to a canonical one that is fit for its purpose.

    Args:
        convert: the format.
        check: `as_prompt`, `as_pair` or `as_example`.

    Raises:
        DataError: and nothing else, whatever the record.

    Source: ours.
    """

    convert: RecordFormat
    check: Callable[[Record], Record]

    def __call__(self, raw: Any) -> Record:
        """Return the canonical record.

        Args:
            raw: the record, or the `DataError` that stands in its place.
        """
        if isinstance(raw, DataError):
            raise raw
        try:
            record = self.check(self.convert(raw))
            _require_unicode(record)
            return record
        except DataError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            name = getattr(self.convert, "__name__", type(self.convert).__name__)
            reason = f"{shown(raw)} is not in the format {name}: {shown(error)}"
        if not isinstance(raw, Mapping | list | tuple):
            reason = f"got {shown(raw)}, expected a record: an object, or a list of utterances"
        raise DataError(reason)


@dataclass
class Sieve:
    """Lets good records through, and stops at bad ones or counts them.

    Args:
        reading: of raw records.
        skip_bad: whether to count the bad ones instead of stopping.

    Raises:
        DataError: naming the place and what is wrong there.

    Source: ours.
    """

    reading: Reading
    skip_bad: bool
    count: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)
    opening: int = field(default=0, init=False)
    first: DataError | None = field(default=None, init=False)

    def __call__(self, where: str, raw: Any) -> Record | None:
        """Return the canonical record, or None for one that is left out.

        Args:
            where: what errors call its place.
            raw: the record, or what is wrong with it.
        """
        self.count += 1
        try:
            record = self.reading(raw)
        except DataError as error:
            problem = DataError(f"{where}: {error}")
        else:
            if self.reading.convert is moss_prompts:
                self.opening += record["prompt"][0]["role"] == "assistant"
            return record
        if not self.skip_bad:
            raise DataError(f"{problem}; skip_bad=True leaves such records out")
        self.bad += 1
        self.first = self.first or problem
        return None

    def finish(self, name: str, *, told: bool, stacklevel: int) -> None:
        """Say what there is to say once all records have been through.

        Args:
            name: of the source.
            told: whether the format was told from the records, and not given.
            stacklevel: of warnings, counted from here.
        """
        if self.count == 0:
            raise empty(name)
        if self.first is not None and self.bad == self.count:
            raise self.first
        if self.bad:
            warnings.warn(
                f"skipped {self.bad} of {self.count} records; the first: {self.first}",
                UserWarning,
                stacklevel=stacklevel + 1,
            )
        if told and self.opening:
            warnings.warn(
                f"{name}: with the last utterance taken for the human's, {self.opening} of "
                f"{self.count - self.bad} dialogues open with the assistant. If the first one is "
                "the human's, pass format=moss_dialogues; if they are right so, pass "
                "format=moss_prompts",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def told_format(
    located: Iterable[Located], check: Callable[[Record], Record], name: str
) -> RecordFormat:
    """Return the format in which the first recognizable record is written.

    Args:
        located: raw records; no more are asked for than it takes.
        check: what they are for: lists of utterances begin with the human where it is
            `as_example`.
        name: of the source.

    Raises:
        DataError: where there is none.

    Source: ours; lists of utterances as in C.
    """
    first: Located | None = None
    for place, raw in located:
        if (found := sniff(raw)) is not None:
            return moss_dialogues if found is moss_prompts and check is as_example else found
        first = first or (place, raw)
    if first is None:
        raise empty(name)
    where, raw = first
    if isinstance(raw, DataError):
        raise DataError(f"{where}: {raw}")
    got = f"keys {_keys(raw)}" if isinstance(raw, Mapping) else shown(raw)
    raise DataError(
        f"{where}: got {got}, expected prompt, chosen and rejected, conversations, messages, "
        "instruction or text among the keys, or a list of utterances; for another format pass "
        "format=, a function from a record to a dict"
    )


def require_format(format: object) -> None:
    """Refuse what cannot be called for a format, before any record is read by it.

    Args:
        format: as readers are given it.

    Raises:
        TypeError: where it is neither a function nor None.

    Source: ours.
    """
    if format is not None and not callable(format):
        raise TypeError(
            f"format: got {shown(format)}, expected a function from a record to a dict, such as "
            "mossrlhf.data.formats.alpaca, or None to tell the format from the records"
        )


def as_prompt(record: Record) -> Record:
    """Return a record to answer, without its answers.

    Args:
        record: a canonical one.

    Raises:
        DataError: where there is nothing to answer.

    Source: ours.
    """
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("the prompt is empty")
    elif prompt is None:
        raise DataError(f"no prompt in a record of {', '.join(_keys(record))}")
    elif not prompt:
        raise DataError("there is no user turn, so nothing to answer")
    elif prompt[-1]["role"] != "user":
        raise DataError(
            f"the prompt ends with the {prompt[-1]['role']}'s turn, expected the user's"
        )
    elif not prompt[-1]["content"].strip():
        raise DataError("the last human turn is empty")
    return {key: value for key, value in record.items() if key not in _ANSWERS}


def as_pair(record: Record) -> Record:
    """Return a record with a preference.

    Args:
        record: a canonical one.

    Raises:
        DataError: where an answer is missing or empty, or the two are the same.

    Source: ours.
    """
    answers = {"chosen": _answer(record, "chosen"), "rejected": _answer(record, "rejected")}
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise DataError("chosen and rejected are identical, expected a preference")
    return {**as_prompt(record), **answers}


def as_example(record: Record) -> Record:
    """Return a record to imitate: with a response, or all text.

    Args:
        record: a canonical one; of a pair, the chosen answer is the response.

    Raises:
        DataError: where there is nothing to imitate.

    Source: ours.
    """
    if "text" in record and "prompt" not in record:
        _answer(record, "text")
        return record
    key = "chosen" if "chosen" in record else "response"
    return {**as_prompt(record), "response": _answer(record, key)}


def empty(name: str) -> DataError:
    """Return the error of a source without records.

    Args:
        name: of the source.

    Source: ours.
    """
    return DataError(f"{name}: empty, expected at least one record")


def shown(value: object) -> str:
    """Return the beginning of a value's repr, or its type where it has none.

    Args:
        value: anything.

    Source: ours.
    """
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # an integer of many digits, a list within itself
        return f"a {type(value).__name__}"


def _answer(record: Record, key: str) -> str:
    if key not in record:
        raise DataError(f"no {key} in a record of {', '.join(_keys(record))}")
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{key} is {shown(text)}, expected a non-empty string")
    return text


def _require_unicode(record: Record) -> None:
    r"""Refuse halves of characters, which JSON can write (``"\ud800"``) and no tokenizer take."""
    for key, value in record.items():
        turns = value if key == "prompt" and not isinstance(value, str) else ()
        for text in (value, *(turn["content"] for turn in turns)):
            if not isinstance(text, str) or text.isascii():
                continue
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise DataError(
                    f"{key} holds {half} at character {error.start}, half of a surrogate pair, "
                    "expected Unicode text; was a text cut within an emoji?"
                ) from None


def _keys(record: Mapping[Any, Any]) -> list[str]:
    return sorted(map(str, record))
