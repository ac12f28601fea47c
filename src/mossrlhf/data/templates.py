"""Dialogue templates, and the one way from a prompt or a response to token ids."""

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
    """Return the Jinja chat template of the released dialogue models.

    ``en``: ``Human: question</s>Assistant: answer</s>``; ``zh``: ``<|Human|>…</s><|MOSS|>…</s>``,
    with the tokenizer's own end of sequence for ``</s>`` and its beginning, if any, before all.
    The generation prompt is ``Assistant:`` without the space: byte-level BPE joins a space to the
    word after it, so the space is the response's first character. Contents are stripped.

    Args:
        language: ``"en"`` or ``"zh"``.

    Raises:
        ValueError: where there is no template for the language.

    Source: C; the space after the colon, and a system turn (its text alone), are ours.
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
    """Put the dialogue template on a tokenizer, and for ``zh`` its two special tokens.

    Args:
        tokenizer: changed in place.
        language: ``"en"`` or ``"zh"``.

    Returns:
        How many tokens were added: where not 0, ``model.resize_token_embeddings(len(tokenizer))``.

    Raises:
        ValueError: where there is no such template, or no end-of-sequence token.

    Source: C.
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

    A string is tokenized as it is (with the beginning of sequence, where the tokenizer adds one).
    Messages go through the chat template, the generation prompt included; a dialogue that is too
    long loses its oldest exchanges, then its system message, never its last human turn.

    Args:
        tokenizer: with a chat template, for messages.
        prompt: a string, or messages that end with a user turn.
        max_length: in tokens, generation prompt included; None for no limit.

    Raises:
        ValueError: where what cannot be dropped is too long, or the chat template is missing.

    Source: ours; the order of dropping: C.
    """
    ids: list[int] = []
    for ids in prompt_encodings(tokenizer, prompt):
        if max_length is None or len(ids) <= max_length:
            return ids
    what = "a string" if isinstance(prompt, str) else "the last human turn alone"
    raise ValueError(
        f"prompt: {what} takes {len(ids)} tokens, expected at most max_length={max_length}; "
        "raise max_length, or leave such prompts out"
    )


def prompt_encodings(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Iterator[list[int]]:
    """Yield the token ids of a prompt: whole, then with ever fewer of its oldest turns.

    Args:
        tokenizer: as for `encode_prompt`.
        prompt: as for `encode_prompt`.

    Source: ours.
    """
    if isinstance(prompt, str):
        yield _encode_string(tokenizer, prompt)
    else:
        for kept in suffixes(prompt):
            yield _ids(tokenizer, _render(tokenizer, kept))


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> list[int]:
    """Return the token ids of a response as they stand after `prompt`, ended by one eos.

    The response is what the rendered dialogue has beyond the rendered prompt, so the ids follow
    those of `encode_prompt` as they are and nothing is ever tokenized again. An end of sequence
    inside the response ends it.

    Args:
        tokenizer: with an end-of-sequence token.
        prompt: as for `encode_prompt`, before anything was dropped.
        response: the assistant's text. After a string prompt it is taken as it is: a space that
            should part the two must be in one of them, best at the start of the response.

    Raises:
        ValueError: where there is no eos token, or the chat template is missing, or renders the
            prompt differently once it is answered.

    Source: ours.
    """
    _require_eos(tokenizer)
    before, after = _texts(tokenizer, prompt, response)
    prefix, whole = _ids(tokenizer, before), _ids(tokenizer, before + after)
    # In context where the boundary holds: SentencePiece would open a lone text with a space.
    ids = whole[len(prefix) :] if whole[: len(prefix)] == prefix else _ids(tokenizer, after)
    end = tokenizer.eos_token_id
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a document: as a string prompt, ended by eos.

    Args:
        tokenizer: with an end-of-sequence token.
        text: the document.

    Raises:
        ValueError: where there is no eos token.

    Source: ours.
    """
    _require_eos(tokenizer)
    return [*_encode_string(tokenizer, text), tokenizer.eos_token_id]


def _texts(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: str) -> tuple[str, str]:
    if isinstance(prompt, str):
        return prompt, response
    before = _render(tokenizer, prompt)
    whole = _render(tokenizer, [*prompt, {"role": "assistant", "content": response}], answer=False)
    if not whole.startswith(before):
        raise ValueError(
            f"prompt: the tokenizer's chat template ends it with {before[-40:]!r} before an "
            f"answer, and with {whole[len(before) - 40 : len(before)]!r} once it is answered, so "
            "where the response begins cannot be told; set another template "
            "(set_dialogue_template has two), or give rendered strings as prompts"
        )
    return before, whole[len(before) :]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], answer: bool = True
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: has no chat_template, which messages need; call "
            "set_dialogue_template(tokenizer, 'en') or 'zh', or give strings as prompts"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)


def suffixes(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the dialogue whole, then from each later human turn on; at last without a system."""
    yield messages
    lead = 1 if messages[0]["role"] == "system" else 0
    system, turns = messages[:lead], messages[lead:]
    for start in range(1, len(turns)):
        if turns[start]["role"] == "user":
            yield [*system, *turns[start:]]
    if system:
        yield messages[-1:]


def _encode_string(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bare = _ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    if bos is None or bare[:1] == [bos]:
        return bare
    # Only the beginning of sequence: some tokenizers would end the prompt with eos as well.
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
