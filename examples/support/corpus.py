"""A file of preference pairs, ready for training: split, with a tokenizer, at bounded lengths."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mossrlhf.data import set_dialogue_template

Record = dict[str, Any]
Pairs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Corpus:
    """Preference pairs in two parts, and a tokenizer trained on the first part.

    Args:
        lang: "en" or "zh".
        tokenizer: byte-level BPE with the dialogue template of the language.
        train: pairs to train on.
        held_out: the last pairs of the file, for evaluation only.
    """

    lang: str
    tokenizer: PreTrainedTokenizerBase
    train: list[Record]
    held_out: list[Record]


def make_corpus(
    pairs: Pairs, held_out: int, vocabulary: int, turn_length: int, lang: str | None = None
) -> Corpus:
    """Split pairs, and train a tokenizer on the first part.

    Args:
        pairs: as `load_pairs` returns them, in the order of the file.
        held_out: how many of the last pairs to hold out; at most a sixth of the file.
        vocabulary: tokens, the 256 bytes and the special ones included.
        turn_length: tokens of the last human turn; a longer one loses its beginning.
        lang: "en" or "zh"; None to detect it.

    Raises:
        ValueError: for too few pairs to hold one out.
    """
    train, kept = split(pairs, held_out)
    lang = lang or detect_language(train)
    tokenizer = train_tokenizer(_turns(train), vocabulary, lang)
    return Corpus(
        lang=lang,
        tokenizer=tokenizer,
        train=[_shortened(record, tokenizer, turn_length) for record in train],
        held_out=[_shortened(record, tokenizer, turn_length) for record in kept],
    )


def split(pairs: Pairs, held_out: int) -> tuple[list[Record], list[Record]]:
    """Hold out the last pairs, at most a sixth; return the pairs to train on, and these.

    Several pairs of a file may come from one dialogue, cut at different turns. So the first part
    loses every pair that begins like a held-out one. A string prompt becomes a human turn.

    Raises:
        ValueError: for fewer than six pairs.
    """
    count = min(held_out, len(pairs) // 6)
    if count < 1:
        raise ValueError(
            f"pairs: got {len(pairs)} with held_out={held_out}, expected at least six and one to "
            "hold out; give a longer file"
        )
    records = [_as_dialogue(record) for record in pairs]
    kept = records[-count:]
    openings = {record["prompt"][0]["content"] for record in kept}
    rest = records[:-count]
    return [record for record in rest if record["prompt"][0]["content"] not in openings], kept


def detect_language(pairs: Pairs) -> str:
    """Return "zh" if a third of the chosen responses' letters are Chinese, else "en"."""
    letters = [c for record in pairs for c in record["chosen"] if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return "zh" if 3 * chinese > len(letters) else "en"


def train_tokenizer(texts: Iterator[str], vocabulary: int, lang: str) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, as GPT-2's; ``</s>`` ends turns, ``<pad>`` pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    set_dialogue_template(fast, lang)
    return fast


def language_records(corpus: Corpus, max_length: int) -> list[Record]:
    """Return all training dialogues, for a language model.

    Chosen and rejected responses count alike: a model that reads only the chosen ones memorizes the
    labels, and a reward model initialized from it learns nothing else.

    Returns:
        two records for each pair: the dialogue with the chosen response, as a text that lost its
        oldest exchanges until it fits ``max_length`` tokens, and the rejected response to the
        prompt, which is not to be learned twice.
    """
    records: list[Record] = []
    for pair in corpus.train:
        messages = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
        records.append({"text": _rendered(messages, corpus.tokenizer, max_length)})
        records.append({"prompt": pair["prompt"], "response": pair["rejected"]})
    return records


def _rendered(messages: list[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    text = ""
    for start, message in enumerate(messages):
        if message["role"] == "user":
            text = tokenizer.apply_chat_template(messages[start:], tokenize=False)
            if len(tokenizer(text)["input_ids"]) <= max_length:
                break
    return text.removesuffix(str(tokenizer.eos_token))  # the collator appends it


def _as_dialogue(record: Mapping[str, Any]) -> Record:
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]}


def _shortened(record: Record, tokenizer: PreTrainedTokenizerBase, length: int) -> Record:
    *before, last = record["prompt"]
    ids = tokenizer(last["content"])["input_ids"]
    if len(ids) <= length:
        return record
    # The bytes of a character cut in two decode to U+FFFD.
    content = tokenizer.decode(ids[-length:]).lstrip("\ufffd")
    return {**record, "prompt": [*before, {**last, "content": content}]}


def _turns(pairs: Pairs) -> Iterator[str]:
    """Yield all turns with their speakers, which are to be tokens too."""
    for record in pairs:
        for message in record["prompt"]:
            speaker = "Assistant" if message["role"] == "assistant" else "Human"
            yield f"{speaker}: {message['content']}"
        yield f"Assistant: {record['chosen']}"
        yield f"Assistant: {record['rejected']}"
