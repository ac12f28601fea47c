"""Prompts: dialogue templates, token ids, checks of lengths, shuffled streams."""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from mossrlhf.data.formats import Message, Prompt

_SPEAKERS = {"en": ("Human: ", "Assistant: "), "zh": ("<|Human|>", "<|MOSS|>")}
_SPELLINGS = {
    "en": "en", "english": "en", "en-us": "en",
    "zh": "zh", "chinese": "zh", "zh-cn": "zh", "cn": "zh",
}  # fmt: skip


def dialogue_template(language: str) -> str:
    """Return the Jinja chat template of the released MOSS-RLHF models.

    ``en``: ``Human: prompt</s>Assistant: response</s>``; ``zh``: ``<|Human|>…</s><|MOSS|>…</s>``,
    where ``</s>`` is the tokenizer's eos, and its bos, if any, comes first. The generation prompt
    is ``Assistant:`` without the space: byte-level BPE joins a space to the word after it, so the
    space is the response's first character. Contents are stripped. A system turn is only its text.
    Another `language` is a ``ValueError``.

    Source: MOSS-RLHF's code, except for the space after the colon and the system turn.
    """
    human, assistant = _speakers(language)
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{{{{ {human!r} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{{{{ {assistant!r} }}}}"
        "{% endif %}"
        "{{ message['content'] | trim + eos_token }}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant.rstrip()!r} }}}}{{% endif %}}"
    )


def set_dialogue_template(tokenizer: PreTrainedTokenizerBase, language: str) -> int:
    """Set the dialogue template of a tokenizer, and for ``zh`` add its two special tokens.

    Args:
        tokenizer: changed in place.
        language: ``"en"`` or ``"zh"``.

    Returns:
        Number of added tokens; unless 0, call ``model.resize_token_embeddings(len(tokenizer))``.

    Raises:
        ValueError: if there is no such template, or no eos token.
    """
    template = dialogue_template(language)
    _require_eos(tokenizer)
    tokenizer.chat_template = template
    if language == "en":
        return 0
    return tokenizer.add_tokens(list(_speakers(language)), special_tokens=True)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int | None = None
) -> list[int]:
    """Return the token ids of a prompt, ready for a response to follow.

    A string is tokenized unchanged (with bos, if the tokenizer adds one). Messages go through the
    chat template, generation prompt included; a dialogue that is too long loses its oldest
    exchanges, then its system message, never its last user turn.

    Args:
        tokenizer: with a chat template, for messages.
        prompt: a string, or messages that end with a user turn.
        max_length: in tokens, generation prompt included; None for no limit.

    Raises:
        ValueError: if what cannot be dropped is too long, or the chat template is missing.
    """
    ids: list[int] = []
    for ids in prompt_encodings(tokenizer, prompt):
        if max_length is None or len(ids) <= max_length:
            return ids
    what = "a string" if isinstance(prompt, str) else "the last user turn alone"
    raise ValueError(
        f"prompt: {what} takes {len(ids)} tokens, expected at most max_length={max_length}; "
        "raise max_length, or leave such prompts out"
    )


def prompt_encodings(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Iterator[list[int]]:
    """Yield the token ids of a prompt: all of it, then without more and more of its oldest turns.

    Args: those of `encode_prompt`.
    """
    if isinstance(prompt, str):
        yield _encode_string(tokenizer, prompt)
    else:
        for kept in suffixes(prompt):
            yield _ids(tokenizer, _render(tokenizer, kept))


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> list[int]:
    """Return the token ids of a response after `prompt`, ended by one eos.

    The response is what the rendered dialogue adds to the rendered prompt. Its ids follow those of
    `encode_prompt`, and nothing is tokenized twice. An eos inside the response ends it.

    Args:
        tokenizer: with an eos token.
        prompt: as for `encode_prompt`, before anything was dropped.
        response: the assistant's text. After a string prompt it is used unchanged: put a space that
            separates the two in one of them, preferably at the start of the response.

    Raises:
        ValueError: if there is no eos token or chat template, or the template renders the prompt
            differently once a response follows.
    """
    _require_eos(tokenizer)
    before, after = _texts(tokenizer, prompt, response)
    prefix, whole = _ids(tokenizer, before), _ids(tokenizer, before + after)
    # Tokenized in context if possible: SentencePiece would open a separate text with a space.
    ids = whole[len(prefix) :] if whole[: len(prefix)] == prefix else _ids(tokenizer, after)
    end = tokenizer.eos_token_id
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a document `text`: as a string prompt, ended by eos.

    Raises:
        ValueError: if the `tokenizer` has no eos token.
    """
    _require_eos(tokenizer)
    return [*_encode_string(tokenizer, text), tokenizer.eos_token_id]


def suffixes(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield a dialogue, then its part from each later user turn on, last without a system turn."""
    yield messages
    lead = 1 if messages[0]["role"] == "system" else 0
    system, turns = messages[:lead], messages[lead:]
    for start in range(1, len(turns)):
        if turns[start]["role"] == "user":
            yield [*system, *turns[start:]]
    if system:
        yield messages[-1:]


def _texts(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> tuple[str, str]:
    """Return the rendered prompt, and what the rendered dialogue adds to it."""
    if isinstance(prompt, str):
        return prompt, response
    before = _render(tokenizer, prompt)
    whole = _render(tokenizer, [*prompt, {"role": "assistant", "content": response}], False)
    if not whole.startswith(before):
        raise ValueError(
            f"prompt: the tokenizer's chat template ends it with {before[-40:]!r} without a "
            f"response and with {whole[len(before) - 40 : len(before)]!r} before one, so it is "
            "unknown where the response begins; set another template (set_dialogue_template has "
            "two), or pass rendered strings as prompts"
        )
    return before, whole[len(before) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation_prompt: bool = True
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: has no chat_template, which messages need; call "
            "set_dialogue_template(tokenizer, 'en') or 'zh', or pass strings as prompts"
        )
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )


def _encode_string(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bare = _ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is None or bare[:1] == [bos]:
        return bare
    # Only the bos: some tokenizers would end the prompt with eos as well.
    return [bos, *bare] if tokenizer(text)["input_ids"][:1] == [bos] else bare


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _speakers(language: str) -> tuple[str, str]:
    if language in _SPEAKERS:
        return _SPEAKERS[language]
    close = difflib.get_close_matches(str(language).lower(), _SPELLINGS, n=1)
    hint = f"; did you mean {_SPELLINGS[close[0]]!r}?" if close else ""
    raise ValueError(f"language: got {language!r}, expected 'en' or 'zh'{hint}")


def _require_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: has no eos_token, which ends every response; set tokenizer.eos_token"
        )


RESERVED = ("prompts", "completions", "completion_ids")  # arguments of rewards, not columns
FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
MAX_CHECKED = 1000  # of the longest prompts, by `require_fitting_prompts`


@runtime_checkable
class Records(Protocol):
    """A list of dicts, a `datasets.Dataset`, a map-style dataset of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class PromptBatch:
    """Token `ids` for the sampler, and for the reward the dataset's `columns` as lists."""

    ids: list[list[int]]
    columns: dict[str, list[Any]]


@dataclass(eq=False, repr=False)
class Shuffled:
    """An endless iterator over a dataset, in a new order every epoch.

    All processes share one order and each takes its part of it, so that a number of records means
    the same on one process and on eight.

    Args:
        dataset: a `datasets.Dataset` or any sequence of dicts.
        seed: seed of the order.
        process_index: index of this process.
        num_processes: number of processes that share the dataset.

    Raises:
        ValueError: if the dataset is empty.
    """

    dataset: Sequence[Mapping[str, Any]]
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if len(self.dataset) == 0:
            raise ValueError("dataset: it is empty, expected at least one record")
        self.position = 0
        self.dealt: list[int] = []  # the rows that `next` returned last
        self._epoch: int | None = None
        self._order: list[int] = []

    def next(self, count: int) -> list[dict[str, Any]]:
        """Return the next `count` records of this process, and skip those of the others."""
        start = self.position + self.process_index * count
        self.position += count * self.num_processes
        self.dealt = [self._row(start + i) for i in range(count)]
        return [dict(self.dataset[row]) for row in self.dealt]

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.dataset))
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._order = torch.randperm(len(self.dataset), generator=generator).tolist()
            self._epoch = epoch
        return int(self._order[offset])

    def state_dict(self) -> dict[str, int]:
        """Return how many records have been used, over all processes."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Resume at the position of a `state` that `state_dict` returned."""
        self.position = state["position"]


def prompt_batch(
    records: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    copies: int = 1,
) -> PromptBatch:
    """Tokenize the prompts of records by `encode_prompt`, which drops the oldest turns.

    Args:
        records: with a ``prompt`` each: a string or a list of messages.
        tokenizer: the policy's.
        max_length: of a prompt, in tokens; None for no limit.
        copies: of each record, one after the other.

    Raises:
        ValueError: if `require_record` refuses a record, a prompt has no tokens, or its part that
            cannot be dropped is too long.
    """
    for record in records:
        require_record(record, "records: a record")
    repeated = [record for record in records for _ in range(copies)]
    names = dict.fromkeys(name for record in records for name in record)
    encoded = [encode_prompt(tokenizer, record["prompt"], max_length) for record in records]
    for ids, record in zip(encoded, records, strict=True):
        if not ids:
            raise ValueError(
                f"records: the prompt {record['prompt']!r} has no tokens, expected at least one to "
                "sample a response after; leave such records out, or open prompts with a "
                "begin-of-sequence token"
            )
    return PromptBatch(
        ids=[ids for ids in encoded for _ in range(copies)],
        columns={name: [record.get(name) for record in repeated] for name in names},
    )


def require_records(
    dataset: Any, name: str, *, prompts: bool = True, reader: str = "load_prompts"
) -> None:
    """Refuse a dataset that is not a sequence of usable records.

    Args:
        dataset: a sequence of dicts, a `datasets.Dataset`, a map-style dataset of torch.
        name: of the dataset, for the error.
        prompts: whether its records are prompts, whose columns are passed to the rewards.
        reader: function of `mossrlhf.data` that the error recommends for the path of a file.

    Raises:
        TypeError: if it is something else; the error says how to convert it.
        ValueError: if it is empty, or `require_record` refuses a record.
    """
    if remedy := _remedy(dataset, reader):
        raise TypeError(
            f"{name}: got {type(dataset).__name__}, expected a sequence of records (dicts); "
            f"{remedy}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name}: it is empty, expected at least one record")
    records = enumerate(_prompts(dataset) if prompts else ())
    for index, record in chain([(0, dataset[0])], records):
        where = f"{name}: record {index}"
        if not isinstance(record, Mapping):
            remedy = "; write [{'prompt': text} for text in texts]"
            raise TypeError(
                f"{where} is of type {type(record).__name__}, expected a dict"
                + (remedy if prompts and isinstance(record, str) else "")
            )
        if prompts:
            require_record(record, where)


def require_record(record: Mapping[str, Any], where: str) -> None:
    """Refuse a `record` without a usable prompt; `where` is its place, for the error.

    Raises:
        ValueError: if there is no prompt or a column has a name in `RESERVED`; if the
            prompt is empty, neither a string nor messages, without a user turn, or ends with a
            response.
    """
    prompt = _prompt_of(record, where)
    if taken := [column for column in RESERVED if column in record]:
        raise ValueError(
            f"{where} has a column called {taken[0]!r}, but {', '.join(RESERVED)} are what reward "
            "functions get from the trainer; rename the column"
        )
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where} has an empty prompt, expected a string, or messages")
        return
    for turn in prompt:
        _require_message(turn, where)
    if all(turn["role"] == "system" for turn in prompt):
        raise ValueError(
            f"{where} has no user turn, so there is nothing to respond to: {prompt!r:.80}; leave "
            "such records out"
        )
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends with the assistant's {prompt[-1].get('content')!r:.60}, expected a user "
            "turn last; drop the response: prompt[:-1]"
        )


def _prompt_of(record: Mapping[str, Any], where: str) -> Any:
    """Return the prompt of a record; raise unless it is a string, or a list that is not empty."""
    expected = "a string, or a list of messages that ends with the user's"
    if "prompt" not in record:
        raise ValueError(
            f"{where} has the columns {sorted(record)}, expected one called 'prompt' ({expected})"
        )
    prompt = record["prompt"]
    is_list = isinstance(prompt, Sequence) and len(prompt) > 0
    if not (isinstance(prompt, str) or is_list):
        raise ValueError(f"{where} has the prompt {prompt!r:.60}, expected {expected}")
    return prompt


def _require_message(turn: Any, where: str) -> None:
    has_role = isinstance(turn, Mapping) and isinstance(turn.get("role"), str)
    # A turn that calls tools may have no content.
    if not has_role or not (isinstance(turn.get("content"), str) or turn.get("tool_calls")):
        raise ValueError(
            f"{where} has the message {turn!r:.80}, expected {{'role': 'user', 'content': text}}; "
            "join several parts of text into one"
        )
    if turn["role"] in FOREIGN_ROLES:
        raise ValueError(
            f"{where} has a message of {turn['role']!r}, which chat templates do not know; write "
            f"'role': {FOREIGN_ROLES[turn['role']]!r}, or read the file with data.load_prompts"
        )


def _prompts(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every record; of a `datasets.Dataset`, the prompts alone, which are read at once."""
    if "prompt" in getattr(dataset, "column_names", ()):
        yield from ({"prompt": prompt} for prompt in dataset["prompt"])
    else:
        yield from (dataset[index] for index in range(len(dataset)))


def _remedy(dataset: Any, reader: str) -> str:
    """Return how to convert something else to a dataset of records; "" if it is one."""
    if isinstance(dataset, str | Path):
        return f"read the file: mossrlhf.data.{reader}({str(dataset)!r})"
    if isinstance(dataset, Mapping):
        first = next(iter(dataset), "")
        return f"pick one of its parts, of {list(dataset)[:5]}: dataset[{first!r}]"
    if hasattr(dataset, "iloc"):
        return "write frame.to_dict('records')"
    if not isinstance(dataset, Records):
        return "it has no length and no index, so read it first: list(dataset)"
    return ""


def overlong_prompts(
    dataset: Records,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    at_most: int | None = None,
) -> dict[int, int]:
    """Find the prompts that `encode_prompt` refuses: too long even without their oldest turns.

    Only prompts with more bytes than `max_length` are tokenized, the longest first, since a token
    has at least one byte. (If a tokenizer's normalization, such as NFKC, expands characters,
    `encode_prompt` refuses the prompts that were missed.)

    Args:
        dataset: records with a ``prompt``: a string, or messages; ``text`` records are skipped.
        tokenizer: as for `encode_prompt`.
        max_length: of a prompt, in tokens; None for no limit.
        at_most: how many prompts to tokenize; None for all candidates.

    Returns:
        index in the dataset → tokens of the part that cannot be dropped, the longest first.

    Raises:
        ValueError: if a record has no prompt, or messages come without a chat template.
    """
    if max_length is None:
        return {}
    candidates = _candidates(dataset, tokenizer, max_length)
    # No more than `at_most` are held: the candidates of a large file may not fit into memory.
    count = len(dataset) if at_most is None else at_most
    found: dict[int, int] = {}
    for _, index in nlargest(count, candidates, key=lambda pair: pair[0]):
        shortest = min(map(len, prompt_encodings(tokenizer, dataset[index]["prompt"])))
        if shortest > max_length:
            found[index] = shortest
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def require_fitting_prompts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    name: str = "train_dataset",
) -> None:
    """Refuse a dataset with a prompt that would stop the training when it is sampled.

    The `MAX_CHECKED` longest prompts, in bytes, are tokenized: quick for any number of prompts.

    Args: those of `overlong_prompts`. `dataset` may also be a dict of several by name; None and
    streams without a length pass. `name` is what the error calls it.

    Raises:
        ValueError: if the last turn of a prompt is too long, or a record has no prompt.
    """
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if not isinstance(part, Records):
            continue
        try:
            found = overlong_prompts(part, tokenizer, max_length, at_most=MAX_CHECKED)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if found:
            index, tokens = next(iter(found.items()))
            raise ValueError(
                f"{name}: {len(found)} of its longest prompts do not fit; that of record {index} "
                f"takes {tokens} tokens with nothing left to drop, expected at most {max_length}. "
                "Raise the limit, or leave them out: data.without_overlong(records, tokenizer, "
                f"max_length={max_length})"
            )


def without_overlong(
    dataset: Records, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[Mapping[str, Any]]:
    """Return the records whose prompts fit, with one warning that counts the others.

    Args: those of `overlong_prompts`.

    Raises:
        ValueError: if no prompt fits, or a record has none.
    """
    found = overlong_prompts(dataset, tokenizer, max_length)
    if found and len(found) == len(dataset):
        raise ValueError(
            f"dataset: none of its {len(dataset)} prompts fits into max_length={max_length} "
            f"tokens, the shortest has {min(found.values())}; raise max_length"
        )
    if found:
        warnings.warn(
            f"left out {len(found)} of {len(dataset)} records: their prompts take more than "
            f"{max_length} tokens with nothing left to drop",
            UserWarning,
            stacklevel=2,
        )
    return [dataset[index] for index in range(len(dataset)) if index not in found]


def _candidates(
    dataset: Records, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[int, int]]:
    """Yield bytes and index of the prompts that may have too many tokens."""
    frame: int | None = None
    for index in range(len(dataset)):
        record = dataset[index]
        if "prompt" not in record and "text" in record:
            continue
        prompt = _prompt_of(record, f"record {index}")
        if isinstance(prompt, str):
            texts, around = [prompt], 2  # bos, and the space that SentencePiece puts first
        else:
            *_, least = suffixes(list(prompt))  # what cannot be dropped
            texts = [str(turn["content"]) for turn in least]
            if frame is None:  # what the template writes around a turn, and before all of them
                turn = [{"role": "user", "content": ""}]
                frame = min(map(len, prompt_encodings(tokenizer, turn)))
            around = frame * len(least)
        size = sum(len(text.encode(errors="replace")) for text in texts)
        if size + around > max_length:
            yield size, index
