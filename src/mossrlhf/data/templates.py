"""Dialogue templates, and the conversion of prompts and responses to token ids."""

import difflib
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mossrlhf.data.formats import Message, Prompt

_SPEAKERS = {"en": ("Human: ", "Assistant: "), "zh": ("<|Human|>", "<|MOSS|>")}
_SPELLINGS = {
    "en": "en", "english": "en", "en-us": "en",
    "zh": "zh", "chinese": "zh", "zh-cn": "zh", "cn": "zh",
}  # fmt: skip


def dialogue_template(language: str) -> str:
    """Return the Jinja chat template of the released MOSS-RLHF models.

    ``en``: ``Human: question</s>Assistant: answer</s>``; ``zh``: ``<|Human|>…</s><|MOSS|>…</s>``,
    where ``</s>`` is the tokenizer's eos, and its bos, if any, comes first. The generation prompt
    is ``Assistant:`` without the space: byte-level BPE joins a space to the word after it, so the
    space is the response's first character. Contents are stripped. A system turn is its text alone.
    Another `language` is a ``ValueError``.

    Source: MOSS-RLHF's code, but for the space after the colon and the system turn.
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
        ValueError: where there is no such template, or no eos token.
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

    A string is tokenized as it is (with bos, where the tokenizer adds one). Messages go through the
    chat template, generation prompt included; a dialogue that is too long loses its oldest
    exchanges, then its system message, never its last user turn.

    Args:
        tokenizer: with a chat template, for messages.
        prompt: a string, or messages that end with a user turn.
        max_length: in tokens, generation prompt included; None for no limit.

    Raises:
        ValueError: where what cannot be dropped is too long, or the chat template is missing.
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
    """Yield the token ids of a prompt: whole, then with fewer and fewer of its oldest turns.

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
        response: the assistant's text. After a string prompt it is used as it is: put a space that
            separates the two in one of them, best at the start of the response.

    Raises:
        ValueError: where there is no eos token or chat template, or the template renders the prompt
            differently once a response follows.
    """
    _require_eos(tokenizer)
    before, after = _texts(tokenizer, prompt, response)
    prefix, whole = _ids(tokenizer, before), _ids(tokenizer, before + after)
    # In context where the boundary holds: SentencePiece would open a lone text with a space.
    ids = whole[len(prefix) :] if whole[: len(prefix)] == prefix else _ids(tokenizer, after)
    end = tokenizer.eos_token_id
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a document `text`: as a string prompt, ended by eos.

    Raises:
        ValueError: where the `tokenizer` has no eos token.
    """
    _require_eos(tokenizer)
    return [*_encode_string(tokenizer, text), tokenizer.eos_token_id]


def suffixes(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield a dialogue whole, then from each later user turn on, at last without a system turn."""
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
