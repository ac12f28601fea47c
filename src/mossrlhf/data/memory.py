"""What records were encoded to: an epoch after the first renders and tokenizes nothing again."""

import hashlib
from array import array
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

DEFAULT_BYTES = 2**28
"""Room for encodings, 256 MiB: some 50 million tokens of dialogues of a few hundred."""

_OVERHEAD = 500  # bytes of a record's key, tuple and arrays, their ids apart


class Encodings:
    """Remembers the token ids that records were encoded to, as long as there is room.

    Records are known by what they say, so that copies and readings from disk are the same and a
    changed one is another. Once it is full, what is in it stays: in a shuffled epoch no record is
    likelier to come next than another.

    Copies begin empty. Worker processes of a data loader have one each, for as long as they live
    (``dataloader_persistent_workers`` of `transformers.TrainingArguments`).

    Args:
        size: bytes, about; None or 0 remembers nothing.

    Attributes:
        used: bytes, about.
        told: whether its collator has warned of what it does once.

    Source: ours.
    """

    def __init__(self, size: int | None = DEFAULT_BYTES) -> None:
        self.size = size
        self.used = 0
        self.told = False
        self._rows: dict[bytes, tuple[array[int], ...]] = {}
        self._state: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type["Encodings"], tuple[int | None]]:
        return Encodings, (self.size,)

    def __len__(self) -> int:
        return len(self._rows)

    def follow(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Forget everything where the tokenizer's template or tokens are not what they were.

        Args:
            tokenizer: that encodes what comes next.
        """
        special = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = tuple(tokenizer.added_tokens_encoder)
        state = (tokenizer, tokenizer.chat_template, special, added)
        if state != self._state:
            self._rows, self.used, self._state = {}, 0, state

    def __call__(self, said: Any, encode: Callable[[], list[list[int]]]) -> list[list[int]]:
        """Return what `encode` returns, without calling it where that is known.

        Args:
            said: all of the record that it encodes: texts, messages.
            encode: gives lists of token ids.
        """
        if not self.size:
            return encode()
        key = hashlib.blake2b(repr(said).encode(), digest_size=16).digest()
        known = self._rows.get(key)
        if known is not None:
            return [ids.tolist() for ids in known]
        rows = encode()
        weight = _OVERHEAD + 4 * sum(map(len, rows))
        if self.used + weight <= self.size:
            self._rows[key] = tuple(array("i", ids) for ids in rows)
            self.used += weight
        return rows
