"""What a dataset of prompts has to be, and what to make of one that is not."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

GIVEN = ("prompts", "completions", "completion_ids")
"""What reward functions get beside the dataset's columns, and no column may be called."""

OF_OTHER_FORMATS = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Names of roles that chat templates do not know, and theirs."""


def require_records(
    dataset: Any, name: str, *, prompts: bool = True, reader: str = "load_prompts"
) -> None:
    """Refuse what is no dataset of records, and prompts that no response can follow.

    Args:
        dataset: a sequence of dicts, a `datasets.Dataset`, a map-style dataset of torch.
        name: what the error calls it.
        prompts: whether its records are prompts, whose columns reach the rewards.
        reader: of `mossrlhf.data`, for who gives the name of a file.

    Raises:
        TypeError: where it is something else; the error says what to make of it.
        ValueError: where it is empty, or a record is of no use (`require_record`).

    Source: ours.
    """
    if remedy := _remedy(dataset, reader):
        raise TypeError(
            f"{name}: got {type(dataset).__name__}, expected a sequence of records (dicts); "
            f"{remedy}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: it is empty, expected at least one record")
    _require_dict(dataset[0], f"{name}: record 0", prompts)
    if not prompts:
        return
    require_record(dataset[0], f"{name}: record 0")
    for index, record in enumerate(_prompts(dataset)):
        _require_dict(record, f"{name}: record {index}", prompts)
        require_record(record, f"{name}: record {index}")


def _require_dict(record: Any, where: str, prompts: bool) -> None:
    if not isinstance(record, Mapping):
        remedy = "; write [{'prompt': text} for text in texts]"
        raise TypeError(
            f"{where} is of type {type(record).__name__}, expected a dict"
            + (remedy if prompts and isinstance(record, str) else "")
        )


def require_record(record: Mapping[str, Any], where: str) -> None:
    """Refuse a record that no response can follow, or whose columns rewards cannot get.

    Args:
        record: with a ``prompt``: a string, or a list of messages that ends with the user's.
        where: what the error calls it.

    Raises:
        ValueError: where it has no prompt or a column called as one of `GIVEN`; where the prompt is
            empty, no text and no messages, without a user turn, or ends with an answer.

    Source: ours.
    """
    if "prompt" not in record:
        raise ValueError(
            f"{where} has the columns {sorted(record)}, expected one called 'prompt' (a string, or "
            "a list of messages that ends with the user's)"
        )
    if taken := [column for column in GIVEN if column in record]:
        raise ValueError(
            f"{where} has a column called {taken[0]!r}, which is what reward functions get from "
            f"the trainer, as they do {', '.join(GIVEN)}; rename the column"
        )
    prompt = record["prompt"]
    if isinstance(prompt, str) and prompt:
        return
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(
            f"{where} has the prompt {prompt!r:.60}, expected a text, or a list of messages that "
            "ends with the user's"
        )
    for turn in prompt:
        _require_message(turn, where)
    if all(turn["role"] == "system" for turn in prompt):
        raise ValueError(
            f"{where} has no user turn, so there is nothing to answer: {prompt!r:.80}; leave such "
            "records out"
        )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends with the assistant's {prompt[-1].get('content')!r:.60}, expected a user "
            "turn last, so that there is something to answer; cut the answer off: prompt[:-1]"
        )


def _require_message(turn: Any, where: str) -> None:
    known = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
    # A turn that calls tools may say nothing.
    if not known or not (isinstance(turn.get("content"), str) or turn.get("tool_calls")):
        raise ValueError(
            f"{where} has the message {turn!r:.80}, expected {{'role': 'user', 'content': text}}; "
            "of several parts of text make one"
        )
    if turn["role"] in OF_OTHER_FORMATS:
        raise ValueError(
            f"{where} has a message of {turn['role']!r}, which chat templates do not know; write "
            f"'role': {OF_OTHER_FORMATS[turn['role']]!r}, or read the file with data.load_prompts"
        )


def _prompts(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every record, or of a `datasets.Dataset` what is read of it at once: the prompts."""
    if "prompt" in getattr(dataset, "column_names", ()):
        yield from ({"prompt": prompt} for prompt in dataset["prompt"])
    else:
        yield from (dataset[index] for index in range(len(dataset)))


def _remedy(dataset: Any, reader: str) -> str:
    """Say what to make of something that is no dataset of records; "" where it is one."""
    if isinstance(dataset, str | Path):
        return f"read the file: mossrlhf.data.{reader}({str(dataset)!r})"
    if isinstance(dataset, Mapping):
        return (
            f"pick one of its parts, of {list(dataset)[:5]}: dataset[{next(iter(dataset), '')!r}]"
        )
    if hasattr(dataset, "iloc"):
        return "write frame.to_dict('records')"
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return "it has no length and no index, so read it first: list(dataset)"
    return ""
