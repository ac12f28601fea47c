"""Masks come from lengths and places, never from what the ids are: with pad = eos, and separators
within texts, each batch is what a construction token by token says."""

import json

import pytest

from mossrlhf.data import (
    PairCollator,
    SFTCollator,
    encode_prompt,
    encode_response,
    encode_text,
    load_pairs,
    load_prompts,
    load_sft,
    prompt_batch,
    set_dialogue_template,
    stream_pairs,
    stream_prompts,
    stream_sft,
)
from mossrlhf.data.formats import moss_dialogues

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
WITHIN = "Human: Hi</s>Assistant: <|Human|>Sure.<|MOSS|></s></s> 你好 <assistant>"
"""A text with the separators of all templates, and the eos that pads."""


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(params=["en", "zh", "chat"])
def templated(request, tokenizer):
    if request.param == "chat":
        tokenizer.chat_template = CHAT
    else:
        set_dialogue_template(tokenizer, request.param)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


PROMPTS = [
    [user(WITHIN), assistant(WITHIN), user(WITHIN)],
    [user("Hi")],
    [{"role": "system", "content": WITHIN}, user("</s>")],
    f"{WITHIN}</s>",
    "Hi",
]


def row(prompt, answer, width, eos):
    """Ids, mask and labels of one row, by hand."""
    spare = width - len(prompt) - len(answer)
    ids = prompt + answer + [eos] * spare
    return ids, [1] * (width - spare) + [0] * spare, [-100] * len(prompt) + answer + [-100] * spare


def test_sft(templated):
    eos = templated.eos_token_id
    records = [{"prompt": p, "response": r} for p in PROMPTS for r in (WITHIN, " Sure.", " </s>")]
    records += [{"text": WITHIN}, {"text": "</s></s>"}, {"text": "Hi"}]
    batch = SFTCollator(templated)(records)
    width = batch["input_ids"].shape[1]
    for i, record in enumerate(records):
        if "text" in record:
            parts = [], encode_text(templated, record["text"])
        else:
            parts = (
                encode_prompt(templated, record["prompt"]),
                encode_response(templated, record["prompt"], record["response"]),
            )
        expected = row(*parts, width, eos)
        found = [batch[key][i].tolist() for key in ("input_ids", "attention_mask", "labels")]
        assert found == list(expected)
        if "prompt" in record:  # the end is learned, though it is what pads
            learned = [label for label in found[2] if label != -100]
            assert learned.count(eos) == 1
            assert learned[-1] == eos
    inside = encode_text(templated, "</s></s>")
    assert inside.count(eos) == 3
    kept = batch["labels"][-2] != -100
    assert int(kept.sum()) == len(inside)


def test_pairs(templated):
    eos = templated.eos_token_id
    records = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p in PROMPTS
        for c, r in [(WITHIN, " Sure."), (" Hi", " </s>"), (" </s></s>", " Hi there, how are you?")]
    ]
    batch = PairCollator(templated)(records)
    width, count = batch["input_ids"].shape[1], len(records)
    for i, record in enumerate(records):
        prompt = encode_prompt(templated, record["prompt"])
        for side, key in enumerate(("chosen", "rejected")):
            answer = encode_response(templated, record["prompt"], record[key])
            ids, mask, labels = row(prompt, answer, width, eos)
            assert batch["input_ids"][i + side * count].tolist() == ids
            assert batch["attention_mask"][i + side * count].tolist() == mask
            if key == "chosen":
                assert batch["chosen_labels"][i].tolist() == labels


def test_prompts(templated):
    """Nothing is padded yet, and no separator within a text cuts it."""
    batch = prompt_batch([{"prompt": prompt} for prompt in PROMPTS], templated)
    for ids, prompt in zip(batch.ids, PROMPTS, strict=True):
        text = (
            prompt
            if isinstance(prompt, str)
            else templated.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        )
        assert ids == templated(text, add_special_tokens=False)["input_ids"]
        assert ids.count(templated.eos_token_id) == text.count("</s>")


TURNS = ["how are you? " * 3, "Sure. " * 3, "Hi there", "Sure.", "how are you?"]
HH = "".join(
    f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {text.strip()}" for i, text in enumerate(TURNS)
)
SPOKEN = [
    {"from": "human" if i % 2 == 0 else "gpt", "value": text.strip()}
    for i, text in enumerate(TURNS)
]
MESSAGES = [
    {"role": "user" if i % 2 == 0 else "assistant", "content": text.strip()}
    for i, text in enumerate(TURNS)
]
FILES = {
    "hh": {"chosen": HH + "\n\nAssistant: Sure.", "rejected": HH + "\n\nAssistant: Hi"},
    "sharegpt": {
        "conversations": SPOKEN,
        "chosen": {"from": "gpt", "value": "Sure."},
        "rejected": {"from": "gpt", "value": "Hi"},
    },
    "alpaca": {
        "instruction": TURNS[4],
        "input": "",
        "output": "Sure.",
        "history": [[text.strip() for text in TURNS[i : i + 2]] for i in (0, 2)],
    },
    "moss": [text.strip() for text in TURNS],
    "moss pairs": {
        "chosen": [*(text.strip() for text in TURNS), "Sure."],
        "rejected": [*(text.strip() for text in TURNS), "Hi"],
    },
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("read", ["load", "stream"])
def test_files_of_every_format_lose_their_oldest_turns(tmp_path, templated, kind, read):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(FILES[kind]) + "\n")
    readers = {"load": (load_prompts, load_sft, load_pairs),
               "stream": (stream_prompts, stream_sft, stream_pairs)}  # fmt: skip
    prompts, sft, pairs = readers[read]
    (record,) = prompts(path)
    assert record["prompt"] == MESSAGES
    if kind == "moss":  # as an example it ends with an answer
        path.write_text(json.dumps([*FILES[kind], "Sure."]) + "\n")
        assert prompts(path, format=moss_dialogues)[0]["prompt"] == MESSAGES
    sizes = [len(encode_prompt(templated, MESSAGES[start:])) for start in (0, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)
    (example,) = sft(path)
    answer = encode_response(templated, MESSAGES, "Sure.")
    for start, size in zip((0, 2, 4), sizes, strict=True):
        kept = encode_prompt(templated, MESSAGES[start:])
        for limit in (size, size + 1):
            assert prompt_batch([record], templated, limit).ids == [kept]
        width = size + len(answer)
        batch = SFTCollator(templated, max_length=width)([example])
        assert batch["input_ids"].tolist() == [kept + answer]
        assert batch["labels"].tolist() == [[-100] * size + answer]
        if "chosen" in FILES[kind]:
            batch = PairCollator(templated, max_length=width)(list(pairs(path)))
            assert batch["input_ids"][0].tolist() == kept + answer
            assert batch["chosen_labels"].tolist() == [[-100] * size + answer]
    with pytest.raises(ValueError, match="the last human turn alone takes"):
        prompt_batch([record], templated, sizes[-1] - 1)
