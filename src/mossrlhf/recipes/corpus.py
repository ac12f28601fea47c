"""A file of preference pairs made ready to learn everything from: split, tokenizer, lengths."""

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
    """Preference pairs in two parts, and a tokenizer that has seen the first alone.

    Args:
        lang: "en" or "zh".
        tokenizer: byte-level BPE with the dialogue template of the language.
        train: pairs to learn from.
        held_out: the last pairs of the file, for measuring alone.

    Source: ours.
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
        held_out: how many to hold out: the last ones, a sixth of the file at most.
        vocabulary: tokens, the 256 bytes and the special ones included.
        turn_length: tokens of the last human turn; of a longer one the end is kept.
        lang: "en" or "zh"; None to look at the text.

    Raises:
        ValueError: where there are too few pairs to hold one out.

    Source: ours.
    """
    train, kept = split(pairs, held_out)
    lang = lang or detect_language(train)
    tokenizer = train_tokenizer(_texts(train), vocabulary, lang)
    return Corpus(
        lang=lang,
        tokenizer=tokenizer,
        train=[_shortened(record, tokenizer, turn_length) for record in train],
        held_out=[_shortened(record, tokenizer, turn_length) for record in kept],
    )


def split(pairs: Pairs, held_out: int) -> tuple[list[Record], list[Record]]:
    """Hold the last pairs out, and leave out of the others what opens with the same words.

    Several pairs of a file may come from one dialogue, broken off at different turns.

    Args:
        pairs: at least six, in the order of the file; string prompts become a human turn.
        held_out: how many at most; never more than a sixth.

    Returns:
        pairs to learn from, and pairs held out.

    Raises:
        ValueError: where there are fewer than six pairs.

    Source: ours.
    """
    count = min(held_out, len(pairs) // 6)
    if count < 1:
        raise ValueError(
            f"pairs: got {len(pairs)} with held_out={held_out}, expected six at least and one to "
            "hold out; give a longer file"
        )
    records = [_as_dialogue(record) for record in pairs]
    kept = records[-count:]
    openings = {record["prompt"][0]["content"] for record in kept}
    rest = records[:-count]
    return [record for record in rest if record["prompt"][0]["content"] not in openings], kept


def detect_language(pairs: Pairs) -> str:
    """Return "zh" where a third of the letters are Chinese characters, else "en".

    Args:
        pairs: canonical records; the responses are looked at.

    Source: ours.
    """
    letters = [c for record in pairs for c in record["chosen"] if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return "zh" if 3 * chinese > len(letters) else "en"


def train_tokenizer(texts: Iterator[str], vocabulary: int, lang: str) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, which knows every text there is.

    Args:
        texts: to be trained on.
        vocabulary: tokens in all.
        lang: of the dialogue template.

    Returns:
        it, with ``</s>`` to end turns and ``<pad>``.

    Source: ours; byte-level BPE as in GPT-2.
    """
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
    """Everything the training dialogues say, for a language model to read.

    Chosen and rejected responses count alike: a model that has seen the chosen ones alone knows
    the training pairs' labels by heart, and a reward model made of it would learn nothing else.

    Args:
        corpus: its training part is used.
        max_length: tokens; dialogues lose their oldest exchanges until they fit.

    Returns:
        for each pair its dialogue with the chosen response, as a text, and the rejected response
        as an answer to the prompt, which is not to be learned twice.

    Source: ours.
    """
    records: list[Record] = []
    for pair in corpus.train:
        answered = [*pair["prompt"], {"role": "assistant", "content": pair["chosen"]}]
        records.append({"text": _rendered(answered, corpus.tokenizer, max_length)})
        records.append({"prompt": pair["prompt"], "response": pair["rejected"]})
    return records


def _rendered(messages: list[Record], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    text = ""
    for start, message in enumerate(messages):
        if message["role"] == "user":
            text = tokenizer.apply_chat_template(messages[start:], tokenize=False)
            if len(tokenizer(text)["input_ids"]) <= max_length:
                break
    return text.removesuffix(str(tokenizer.eos_token))  # whoever reads a text ends it


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
    # Bytes of a character cut in two decode to U+FFFD.
    content = tokenizer.decode(ids[-length:]).lstrip("\ufffd")
    return {**record, "prompt": [*before, {**last, "content": content}]}


def _texts(pairs: Pairs) -> Iterator[str]:
    """Turns as they stand behind ``Human:`` and ``Assistant:``, which are to be tokens too."""
    for record in pairs:
        for message in record["prompt"]:
            speaker = "Assistant" if message["role"] == "assistant" else "Human"
            yield f"{speaker}: {message['content']}"
        yield f"Assistant: {record['chosen']}"
        yield f"Assistant: {record['rejected']}"
