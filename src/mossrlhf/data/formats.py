"""Record formats: one small function each, from a raw record to a canonical one.

A canonical record is a plain dict. It has a `prompt` (a string, or a list of messages
``{"role": "system|user|assistant", "content": str}`` that ends with a user turn) and, as far as
the raw record knows them, `response`, or `chosen` and `rejected` (texts of the assistant); or it
is one ``{"text": str}``. All other columns of the raw record travel along.

Any function with the signature ``raw record -> dict`` is a format: give the readers your own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

Message = dict[str, str]
Prompt = str | list[Message]
RecordFormat = Callable[[Any], dict[str, Any]]

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ANSWERS = ("response", "completion", "output", "chosen", "rejected")


class DataError(ValueError):
    """A file or record that cannot be used: where it is, what came, what was expected."""


def plain_text(record: Mapping[str, Any]) -> dict[str, Any]:
    """``{"text": …}``: a document, for language modelling. Source: ours."""
    return {**record, "text": _string(record, "text")}


def standard(record: Mapping[str, Any]) -> dict[str, Any]:
    """``prompt`` with ``response`` / ``completion``, or ``chosen`` and ``rejected``, or alone.

    Each is a string or a list of messages. Answers that are whole dialogues, of messages or in
    the strings of HH-RLHF, carry the prompt themselves: it is what they share. ``system`` opens
    messages that have no such turn, and is left alone beside a string. Source: ours, after the
    datasets on the hub.
    """
    prompt = record.get("prompt")
    if prompt is None and "chosen" not in record:
        raise DataError(f"got keys {sorted(record)}, expected a prompt")
    if all(_opens_hh(record.get(side)) for side in ("chosen", "rejected")):
        return hh_strings(record)
    if not isinstance(prompt, str | None):
        prompt = messages(prompt)
    canonical = _assemble(record, prompt, used=("prompt",))
    turns = canonical["prompt"]
    if isinstance(turns, list) and turns[0]["role"] != "system" and (lead := _system(record)):
        del canonical["system"]
        canonical["prompt"] = [*lead, *turns]
    return canonical


def alpaca(record: Mapping[str, Any]) -> dict[str, Any]:
    """``instruction``, ``input`` and ``output``: the first two, a line each, are one human turn.

    ``system``, and ``history`` as a list of (human, assistant) texts, come before it.
    Source: ours, after Stanford Alpaca and LLaMA-Factory.
    """
    question = "\n".join(filter(None, (_string(record, "instruction"), record.get("input"))))
    past = [text for exchange in record.get("history") or () for text in exchange]
    turns = [*_system(record), *utterances(past, human_first=True), _message("user", question)]
    return _assemble(record, turns, used=("instruction", "input", "history", "system"))


def sharegpt(record: Mapping[str, Any]) -> dict[str, Any]:
    """``conversations`` (or ``messages``), and maybe ``chosen`` and ``rejected``.

    Without the two, a dialogue that ends with the assistant is a prompt with its response.
    Source: ours, after LLaMA-Factory.
    """
    key = "conversations" if "conversations" in record else "messages"
    turns = [*_system(record), *messages(record.get(key))]
    canonical = _assemble(record, turns, used=("conversations", "messages", "system"))
    return canonical if "chosen" in canonical else {**canonical, **_split_last(turns)}


def hh_strings(record: Mapping[str, Any]) -> dict[str, Any]:
    r"""``chosen`` and ``rejected`` as ``\n\nHuman: … \n\nAssistant: …``, with a shared beginning.

    The prompt is the longest run of turns they share that ends with the human's; what follows is
    the answer, further turns and their markers included. A speaker's consecutive turns are one.
    Source: ours, after Anthropic's HH-RLHF.
    """
    chosen, rejected = (_hh_turns(_string(record, key)) for key in ("chosen", "rejected"))
    shared = _shared_turns(chosen, rejected)
    return {
        **record,
        "prompt": chosen[:shared],
        "chosen": _hh_text(chosen[shared:]),
        "rejected": _hh_text(rejected[shared:]),
    }


def moss_prompts(record: Sequence[Any]) -> dict[str, Any]:
    """A list of utterances whose last is the human's; roles alternate backwards from it.

    Source: C (prompt files).
    """
    return {"prompt": utterances(record, human_first=len(record) % 2 == 1)}


def moss_dialogues(record: Sequence[Any]) -> dict[str, Any]:
    """A list of utterances whose first is the human's; a last one by the assistant is a response.

    Source: C (SFT and pre-training files).
    """
    return _split_last(utterances(record, human_first=True))


def moss_pairs(record: Mapping[str, Any]) -> dict[str, Any]:
    """``chosen`` and ``rejected`` as lists of utterances, the last of each the assistant's.

    Source: C (reward-model files).
    """
    sides = {
        key: utterances(record[key], human_first=len(record[key]) % 2 == 0)
        for key in ("chosen", "rejected")
    }
    return _assemble({**record, **sides}, None)


def sniff(record: object) -> RecordFormat | None:
    """Return the format that a raw record is written in, or None if it is none of ours."""
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
        return _sniff_pair(record["chosen"])
    return plain_text if "text" in record else None


def _sniff_pair(chosen: object) -> RecordFormat:
    if isinstance(chosen, str):
        return hh_strings
    if isinstance(chosen, list) and all(isinstance(turn, str) for turn in chosen):
        return moss_pairs
    return standard


def messages(turns: object) -> list[Message]:
    """Turn messages (``role``/``content`` or ``from``/``value``), or one, or a text, into a list.

    Raises:
        DataError: where a speaker is unknown or a content is not a string.
    """
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


def utterances(texts: object, human_first: bool) -> list[Message]:
    """Give alternating roles to a list of texts, beginning with the human's or the assistant's.

    Raises:
        DataError: where it is no list, or holds anything but non-empty strings.
    """
    if not isinstance(texts, list | tuple):
        raise DataError(f"got {texts!r:.80}, expected a list of utterances")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"utterance {index} is {text!r:.80}, expected a non-empty string")
    roles = ("user", "assistant") if human_first else ("assistant", "user")
    return [_message(role, text) for role, text in zip(cycle(roles), texts, strict=False)]


def _assemble(
    record: Mapping[str, Any], prompt: Prompt | None, used: Sequence[str] = ()
) -> dict[str, Any]:
    """Put a prompt and the answers that `record` holds together, beside its other columns."""
    rest = {k: v for k, v in record.items() if k not in used and k not in _ANSWERS}
    if "chosen" in record or "rejected" in record:
        for key in ("chosen", "rejected"):
            if record.get(key) is None:
                got = f"is {record[key]}" if key in record else "is missing"
                raise DataError(f"{key} {got}, expected the answer: a text, or messages")
        sides = [record["chosen"], record["rejected"]]
        if all(isinstance(side, str) for side in sides):
            return {**rest, "prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        chosen, rejected = (_dialogue(prompt, side) for side in sides)
        shared = _shared_turns(chosen, rejected)
        answers = {"chosen": _only(chosen[shared:]), "rejected": _only(rejected[shared:])}
        return {**rest, "prompt": chosen[:shared], **answers}
    given = [record[key] for key in _ANSWERS if key in record]
    response = next((answer for answer in given if answer is not None), None)
    if response is None or isinstance(response, str):
        answer = {"response": response} if given else {}
        return {**rest, "prompt": prompt, **answer}
    return {**rest, **_split_last(_dialogue(prompt, response))}


def _dialogue(prompt: Prompt | None, answer: object) -> list[Message]:
    """Return prompt and answer as one dialogue; an answer may be the whole of it already."""
    turns = [_message("assistant", answer)] if isinstance(answer, str) else messages(answer)
    if turns[0]["role"] != "assistant" or prompt is None:
        return turns
    return [*messages(prompt), *turns]


def _split_last(turns: list[Message]) -> dict[str, Any]:
    if turns and turns[-1]["role"] == "assistant":
        return {"prompt": turns[:-1], "response": turns[-1]["content"]}
    return {"prompt": turns}


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """Return the length of the longest shared run of turns that ends with a human's."""
    shared = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False), start=1):
        if left != right:
            break
        if left["role"] == "user":
            shared = index
    if shared == 0:
        raise DataError("chosen and rejected share no human turn, expected one prompt for both")
    return shared


def _only(turns: list[Message]) -> str:
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise DataError(
            f"{len(turns)} turns follow what chosen and rejected share, expected one each, "
            "the assistant's: the two dialogues part before their last turn"
        )
    return turns[0]["content"]


def _opens_hh(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def _hh_turns(text: str) -> list[Message]:
    lead, *parts = _HH_TURN.split(text)
    if lead.strip() or not parts:
        raise DataError(f"got {text!r:.80}, expected a dialogue that opens with '\\n\\nHuman:'")
    turns = [
        _message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    return [
        _message(role, "\n\n".join(turn["content"] for turn in run).strip())
        for role, run in groupby(turns, key=lambda turn: turn["role"])
    ]


def _hh_text(turns: list[Message]) -> str:
    marker = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    text = "".join(marker[turn["role"]] + turn["content"] for turn in turns)
    return text.removeprefix(marker["assistant"])


def _system(record: Mapping[str, Any]) -> list[Message]:
    return [_message("system", _string(record, "system"))] if record.get("system") else []


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        raise DataError(f"{key} is {record.get(key)!r:.80}, expected a string")
    return record[key]
