"""Record formats: functions from a raw record to a canonical one.

A canonical record is a dict. It has a `prompt` (a string, or a list of messages
``{"role": "system|user|assistant", "content": str}`` that ends with a user turn) and, if the
raw record has them, `response`, or `chosen` and `rejected` (only the assistant's text). A document
is ``{"text": str}``. Every other column of the raw record is kept.

A format is any function from a raw record to a dict; pass your own to the readers. Those here raise
`DataError` if the record is malformed.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import Any

Message = dict[str, str]
Prompt = str | list[Message]
Record = dict[str, Any]
Format = Callable[[Any], Record]

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_MARKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
_RESPONSES = ("response", "completion", "output")
_SIDES = ("chosen", "rejected")


class DataError(ValueError):
    """A file or record that cannot be used: its place, the value, what was expected."""


def plain_text(record: Mapping[str, Any]) -> Record:
    """Read ``{"text": …}``, a document for language modelling."""
    return {**record, "text": _string(record, "text")}


def standard(record: Mapping[str, Any]) -> Record:
    """Read ``prompt`` alone, with ``response`` / ``completion``, or with a pair.

    Each is a string or a list of messages. Responses may be whole dialogues, as messages or as
    HH-RLHF strings: then the prompt is what they share. A ``system`` column becomes the first
    message if the prompt is messages without a system turn; otherwise it stays a column.
    """
    prompt = record.get("prompt")
    if prompt is None and "chosen" not in record:
        raise DataError(f"got keys {sorted(record)}, expected a prompt")
    if all(_is_hh_string(record.get(side)) for side in _SIDES):
        return hh_strings(record)
    if not isinstance(prompt, str | None):
        prompt = messages(prompt)
    canonical = _assemble(record, prompt, used=("prompt",))
    turns = canonical["prompt"]
    if isinstance(turns, list) and turns[0]["role"] != "system" and (lead := _system(record)):
        del canonical["system"]
        canonical["prompt"] = [*lead, *turns]
    return canonical


def alpaca(record: Mapping[str, Any]) -> Record:
    """Read Alpaca's ``instruction``, ``input`` and ``output``; the first two make one user turn.

    ``system``, and ``history`` as a list of (user, assistant) texts, come before it.
    """
    question = "\n".join(filter(None, (_string(record, "instruction"), record.get("input"))))
    past = [text for exchange in record.get("history") or () for text in exchange]
    turns = [*_system(record), *utterances(past, user_first=True), _message("user", question)]
    return _assemble(record, turns, used=("instruction", "input", "history", "system"))


def sharegpt(record: Mapping[str, Any]) -> Record:
    """Read ``conversations`` (or ``messages``), with or without ``chosen`` and ``rejected``.

    Without a pair, a last turn of the assistant is the response.
    """
    key = "conversations" if "conversations" in record else "messages"
    turns = [*_system(record), *messages(record.get(key))]
    canonical = _assemble(record, turns, used=("conversations", "messages", "system"))
    return canonical if "chosen" in canonical else {**canonical, **_split_last(turns)}


def hh_strings(record: Mapping[str, Any]) -> Record:
    r"""Read HH-RLHF's ``chosen`` and ``rejected``, each ``\n\nHuman: … \n\nAssistant: …``.

    The prompt is the longest shared run of turns that ends with a user turn. The rest is the
    response, with the markers of any further turns. Consecutive turns of a speaker are joined.
    """
    chosen, rejected = (_hh_turns(_string(record, side)) for side in _SIDES)
    shared = _shared_turns(chosen, rejected)
    return {
        **record,
        "prompt": chosen[:shared],
        "chosen": _hh_text(chosen[shared:]),
        "rejected": _hh_text(rejected[shared:]),
    }


def moss_prompts(record: Sequence[Any]) -> Record:
    """Read MOSS-RLHF's prompts: lists of utterances, the last the user's, roles alternating."""
    return {"prompt": utterances(record, user_first=len(record) % 2 == 1)}


def moss_dialogues(record: Sequence[Any]) -> Record:
    """Read MOSS-RLHF's SFT data: lists of utterances, the first the user's, roles alternating."""
    return _split_last(utterances(record, user_first=True))


def moss_pairs(record: Mapping[str, Any]) -> Record:
    """Read MOSS-RLHF's pairs: two lists of utterances, the last of each the assistant's."""
    sides = {side: utterances(record[side], len(record[side]) % 2 == 0) for side in _SIDES}
    return _assemble({**record, **sides}, None)


def messages(turns: object) -> list[Message]:
    """Return messages (``role``/``content`` or ``from``/``value``), one, or a text, as a list."""
    if isinstance(turns, str):
        return [_message("user", turns)]
    if isinstance(turns, Mapping):
        turns = [turns]
    if not isinstance(turns, list | tuple) or not turns:
        raise DataError(f"got {turns!r:.80}, expected a list of messages")
    result = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {index} is {turn!r:.80}, expected a message with role, content")
        speaker = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise DataError(f"turn {index} is by {speaker!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"turn {index} has content {content!r:.80}, expected a string")
        result.append(_message(ROLES[speaker], content))
    return result


def utterances(texts: object, user_first: bool) -> list[Message]:
    """Return a list of texts as messages with alternating roles."""
    if not isinstance(texts, list | tuple):
        raise DataError(f"got {texts!r:.80}, expected a list of utterances")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"utterance {index} is {text!r:.80}, expected a non-empty string")
    roles = ("user", "assistant") if user_first else ("assistant", "user")
    return [_message(role, text) for role, text in zip(cycle(roles), texts, strict=False)]


def _assemble(record: Mapping[str, Any], prompt: Prompt | None, used: Sequence[str] = ()) -> Record:
    """Join a prompt, the responses of `record`, and its columns that are not `used`."""
    dropped = (*used, *_RESPONSES, *_SIDES)
    rest = {key: value for key, value in record.items() if key not in dropped}
    if "chosen" in record or "rejected" in record:
        return {**rest, **_pair(record, prompt)}
    given = [record[key] for key in _RESPONSES if key in record]
    response = next((text for text in given if text is not None), None)
    if response is None or isinstance(response, str):
        return {**rest, "prompt": prompt, **({"response": response} if given else {})}
    return {**rest, **_split_last(_dialogue(prompt, response))}


def _pair(record: Mapping[str, Any], prompt: Prompt | None) -> Record:
    for side in _SIDES:
        if record.get(side) is None:
            got = f"is {record[side]}" if side in record else "is missing"
            raise DataError(f"{side} {got}, expected a response: a string, or messages")
    if all(isinstance(record[side], str) for side in _SIDES):
        return {"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]}
    chosen, rejected = (_dialogue(prompt, record[side]) for side in _SIDES)
    shared = _shared_turns(chosen, rejected)
    return {
        "prompt": chosen[:shared],
        "chosen": _only_text(chosen[shared:]),
        "rejected": _only_text(rejected[shared:]),
    }


def _dialogue(prompt: Prompt | None, response: object) -> list[Message]:
    """Return prompt and response as one dialogue; a response may contain the prompt already."""
    turns = [_message("assistant", response)] if isinstance(response, str) else messages(response)
    if turns[0]["role"] != "assistant" or prompt is None:
        return turns
    return [*messages(prompt), *turns]


def _split_last(turns: list[Message]) -> Record:
    if turns and turns[-1]["role"] == "assistant":
        return {"prompt": turns[:-1], "response": turns[-1]["content"]}
    return {"prompt": turns}


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Return the length of the longest shared run of turns that ends with a user turn."""
    shared = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if left != right:
            break
        if left["role"] == "user":
            shared = index
    if shared == 0:
        raise DataError("chosen and rejected share no user turn, expected one prompt for both")
    return shared


def _only_text(turns: list[Message]) -> str:
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise DataError(
            f"{len(turns)} turns follow those that chosen and rejected share, expected one, the "
            "assistant's; the two dialogues differ before their last turn"
        )
    return turns[0]["content"]


def _is_hh_string(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def _hh_turns(text: str) -> list[Message]:
    lead, *parts = _HH_TURN.split(text)
    if lead.strip() or not parts:
        raise DataError(f"got {text!r:.80}, expected a dialogue that opens with '\\n\\nHuman:'")
    turns = zip(parts[::2], map(str.strip, parts[1::2]), strict=True)
    return [
        _message(ROLES[speaker.lower()], "\n\n".join(text for _, text in run).strip())
        for speaker, run in groupby(turns, key=lambda turn: turn[0])
    ]


def _hh_text(turns: list[Message]) -> str:
    text = "".join(_HH_MARKERS[turn["role"]] + turn["content"] for turn in turns)
    return text.removeprefix(_HH_MARKERS["assistant"])


def _system(record: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _string(record, "system"))] if record.get("system") else []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        raise DataError(f"{key} is {record.get(key)!r:.80}, expected a string")
    return record[key]


def format_of(record: object) -> Format | None:
    """Return the format of a raw record, or None if it has none of these."""
    if isinstance(record, list | tuple):
        return moss_prompts
    if not isinstance(record, Mapping):
        return None
    if "conversations" in record or "messages" in record:
        return sharegpt
    if "instruction" in record:
        return alpaca
    if "prompt" in record:
        return standard
    if "chosen" in record and "rejected" in record:
        chosen = record["chosen"]
        if isinstance(chosen, str):
            return hh_strings
        is_moss = isinstance(chosen, list) and all(isinstance(turn, str) for turn in chosen)
        return moss_pairs if is_moss else standard
    return plain_text if "text" in record else None


def detect_format(
    located: Iterable[Sequence[Any]], check: Callable[[Record], Record], name: str
) -> Format:
    """Return the format of the first recognizable record among (place, raw record, …) tuples."""
    first: tuple[str, Any] | None = None
    for where, raw, *_ in located:
        if (found := format_of(raw)) is not None:
            return moss_dialogues if found is moss_prompts and check is as_example else found
        first = first or (where, raw)
    if first is None:
        raise DataError(f"{name}: empty, expected at least one record")
    where, raw = first
    if isinstance(raw, DataError):
        raise DataError(f"{where}: {raw}")
    got = f"keys {_keys(raw)}" if isinstance(raw, Mapping) else short_repr(raw)
    raise DataError(
        f"{where}: got {got}, expected prompt, chosen and rejected, conversations, messages, "
        "instruction or text among the keys, or a list of utterances; for another format pass "
        "format=, a function from a record to a dict"
    )


@dataclass(frozen=True)
class RecordConverter:
    """Convert raw records by a format, and check them by `as_prompt`, `as_pair` or `as_example`.

    Raises nothing but `DataError`, whatever the record.
    """

    format: Format
    check: Callable[[Record], Record]

    def __call__(self, raw: Any) -> Record:
        """Return the canonical record; a `raw` that is a `DataError` is raised."""
        if isinstance(raw, DataError):
            raise raw
        try:
            record = self.check(self.format(raw))
            _require_unicode(record)
            return record
        except DataError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            name = getattr(self.format, "__name__", type(self.format).__name__)
            reason = f"{short_repr(raw)} is not in the format {name}: {short_repr(error)}"
        if not isinstance(raw, Mapping | list | tuple):
            reason = f"got {short_repr(raw)}, expected a record: an object, or a list of utterances"
        raise DataError(reason)


def as_prompt(record: Record) -> Record:
    """Return a canonical record without its responses; raise `DataError` without a user turn."""
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError("the prompt is empty")
    elif prompt is None:
        raise DataError(f"got keys {_keys(record)}, expected a prompt that is not null")
    elif not prompt:
        raise DataError("the prompt has no user turn, so there is nothing to respond to")
    elif prompt[-1]["role"] != "user":
        role = prompt[-1]["role"]
        raise DataError(f"the prompt ends with a turn of the {role}, expected the user")
    elif not prompt[-1]["content"].strip():
        raise DataError("the last user turn is empty")
    return {key: value for key, value in record.items() if key not in ("response", *_SIDES)}


def as_pair(record: Record) -> Record:
    """Return a canonical record with two responses; raise `DataError` if they do not differ."""
    chosen, rejected = (_response(record, side) for side in _SIDES)
    if chosen.strip() == rejected.strip():
        raise DataError("chosen and rejected are identical, expected a preference")
    return {**as_prompt(record), "chosen": chosen, "rejected": rejected}


def as_example(record: Record) -> Record:
    """Return a canonical record with a response (of a pair, the chosen one), or a document."""
    if "text" in record and "prompt" not in record:
        _response(record, "text")
        return record
    key = "chosen" if "chosen" in record else "response"
    return {**as_prompt(record), "response": _response(record, key)}


def short_repr(value: object) -> str:
    """Return the beginning of a value's repr, or its type if repr fails."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # an integer of many digits, a list within itself
        return f"a {type(value).__name__}"


def _response(record: Record, key: str) -> str:
    if key not in record:
        raise DataError(f"got keys {_keys(record)}, expected {key}")
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{key} is {short_repr(text)}, expected a non-empty string")
    return text


def _require_unicode(record: Record) -> None:
    r"""Refuse half characters, which JSON can write (``"\ud800"``) and no tokenizer takes."""
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
