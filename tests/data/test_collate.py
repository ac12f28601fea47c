"""Collation: padding, masks, labels, the cache of token ids, batches by token count."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mossrlhf.data import (
    PairCollator,
    SFTCollator,
    TokenBatches,
    TokenBatchSampler,
    encode_prompt,
    encode_response,
    encode_text,
    load_pairs,
    load_prompts,
    load_sft,
    pad,
    pad_id,
    prompt_batch,
    set_dialogue_template,
    stream_pairs,
    stream_prompts,
    stream_sft,
)
from mossrlhf.data.collate import LENGTH_STEP, EncodingCache
from mossrlhf.data.formats import moss_dialogues

PROMPT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "how are you?"},
]


@pytest.fixture
def english(tokenizer):
    set_dialogue_template(tokenizer, "en")
    return tokenizer


def test_pad_masks_come_from_lengths():
    ids, mask = pad([[7, 2], [5, 6, 2]], pad_id=2)
    assert ids.tolist() == [[7, 2, 2], [5, 6, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert ids.dtype == mask.dtype == torch.long


def test_pad_on_the_left():
    ids, mask = pad([[7, 2], [5, 6, 2], []], pad_id=2, left=True)
    assert ids.tolist() == [[2, 7, 2], [5, 6, 2], [2, 2, 2]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_pad_needs_a_sequence():
    with pytest.raises(ValueError, match="sequences: got none"):
        pad([], pad_id=0)


def test_pad_id_falls_back_to_eos_then_zero(tokenizer):
    tokenizer.pad_token = "<unk>"
    assert pad_id(tokenizer) == tokenizer.unk_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_sft_labels_cover_the_response_only(english):
    records = [{"prompt": PROMPT, "response": "Sure."}, {"prompt": "Hi", "response": " there"}]
    batch = SFTCollator(english)(records)
    for row, record in enumerate(records):
        prompt = encode_prompt(english, record["prompt"])
        response = encode_response(english, record["prompt"], record["response"])
        spare = batch["input_ids"].shape[1] - len(prompt) - len(response)
        ids, mask, labels = (
            batch[k][row].tolist() for k in ("input_ids", "attention_mask", "labels")
        )
        assert ids == prompt + response + [english.eos_token_id] * spare
        assert mask == [1] * len(prompt + response) + [0] * spare
        assert labels == [-100] * len(prompt) + response + [-100] * spare


def test_sft_labels_cover_all_of_a_document(english):
    batch = SFTCollator(english)([{"text": "Hi there"}, {"text": "Hi there, how are you?"}])
    for row, text in enumerate(["Hi there", "Hi there, how are you?"]):
        expected = encode_text(english, text)
        kept = batch["labels"][row] != -100
        assert batch["labels"][row][kept].tolist() == expected
        assert batch["attention_mask"][row].tolist() == kept.long().tolist()
    cut = SFTCollator(english, max_length=3)([{"text": "Hi there, how are you?"}])
    assert cut["input_ids"].tolist() == [encode_text(english, "Hi there, how are you?")[:3]]


def test_sft_drops_old_turns_before_it_cuts_the_response(english):
    record = {"prompt": PROMPT, "response": "Sure. Sure. Sure."}
    response = encode_response(english, PROMPT, record["response"])
    short = encode_prompt(english, PROMPT[2:])
    for limit in (len(short) + len(response), len(short) + len(response) - 1, len(short) + 1):
        batch = SFTCollator(english, max_length=limit)([record])
        assert batch["input_ids"].tolist() == [(short + response)[:limit]]
        assert batch["labels"].tolist() == [([-100] * len(short) + response)[:limit]]
    with pytest.raises(ValueError, match="leave no room for a response within max_length"):
        SFTCollator(english, max_length=len(short))([record])


def test_pair_batch_is_all_chosen_then_all_rejected(english):
    records = [
        {"prompt": PROMPT, "chosen": "Sure.", "rejected": "how are you? how are you?"},
        {"prompt": "Hi", "chosen": " there", "rejected": " you"},
    ]
    batch = PairCollator(english)(records)
    sequences = [
        encode_prompt(english, record["prompt"])
        + encode_response(english, record["prompt"], record[side])
        for side in ("chosen", "rejected")
        for record in records
    ]
    ids, mask = pad(sequences, english.eos_token_id)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["attention_mask"], mask)
    assert batch["chosen_labels"].shape == (2, ids.shape[1])
    for row, record in enumerate(records):
        labels = batch["chosen_labels"][row]
        response = encode_response(english, record["prompt"], record["chosen"])
        start = len(encode_prompt(english, record["prompt"]))
        assert labels[start : start + len(response)].tolist() == response
        assert (labels == -100).sum() == len(labels) - len(response)


def test_pair_sides_keep_the_same_prompt(english):
    record = {"prompt": PROMPT, "chosen": "Sure.", "rejected": "how are you? " * 3}
    whole, short = (encode_prompt(english, prompt) for prompt in (PROMPT, PROMPT[2:]))
    chosen, rejected = (encode_response(english, PROMPT, record[k]) for k in ("chosen", "rejected"))
    assert len(whole) + len(chosen) < len(whole) + len(rejected) - 1
    batch = PairCollator(english, max_length=len(whole) + len(rejected) - 1)([record])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [len(short) + len(chosen), len(short) + len(rejected)]
    batch = PairCollator(english, max_length=len(whole) + len(rejected))([record])
    assert batch["input_ids"].tolist()[1] == whole + rejected
    batch = PairCollator(english, max_length=len(short) + 2)([record])
    assert batch["input_ids"].tolist() == [short + chosen[:2], short + rejected[:2]]


@pytest.mark.parametrize("collator", [SFTCollator, PairCollator])
def test_collators_refuse_records_without_their_columns(english, collator):
    with pytest.raises(ValueError, match="missing among"):
        collator(english)([{"prompt": "Hi", "answer": "Ho"}])


@pytest.mark.parametrize(
    ("collator", "record", "message"),
    [
        (SFTCollator, {"prompt": "Hi", "response": PROMPT[1:2]}, r"response is a list \(\[{'role'"),
        (SFTCollator, {"prompt": "Hi", "response": None}, r"response is a NoneType \(None\)"),
        (SFTCollator, {"text": ["Hi"]}, r"text is a list"),
        (
            PairCollator,
            {"prompt": PROMPT, "chosen": PROMPT[:2], "rejected": " no"},
            r"chosen is a list .*expected a string.*load_pairs \(PairCollator\), which convert",
        ),
        (
            PairCollator,
            {"prompt": "Hi", "chosen": " yes", "rejected": PROMPT[1]},
            "rejected is a dict .*expected a string, the text alone",
        ),
    ],
)
def test_collators_refuse_responses_that_are_not_text(english, collator, record, message):
    """Also after good ones: not the first record of a dataset alone is looked at."""
    good = {"prompt": "Hi", "response": " Ho", "chosen": " yes", "rejected": " no"}
    with pytest.raises(ValueError, match=f"records: {message}"):
        collator(english)([good, record])


def test_pairs_cut_to_equal_responses_warn_once(english):
    collator = PairCollator(english, max_length=16)
    record = {"prompt": "q", "chosen": "a " * 30 + "yes", "rejected": "a " * 30 + "no"}
    with pytest.warns(UserWarning, match=r"both responses to 'q' have the same 1\d tokens") as seen:
        collator([record])
    assert len(seen) == 1
    batch = collator([record, {**record, "prompt": "p"}])  # not again, or it would be an error
    assert torch.equal(batch["input_ids"][:2], batch["input_ids"][2:])


def test_real_pairs_fit_max_length(shared, english):
    pairs = load_pairs(shared / "data" / "llama-factory" / "dpo_en_demo.json")
    pairs = [pair for pair in pairs if len(encode_prompt(english, pair["prompt"][-1:])) < 256][:32]
    batch = PairCollator(english, max_length=256)(pairs)
    assert batch["input_ids"].shape[0] == 2 * len(pairs)
    assert batch["input_ids"].shape[1] == 256


CHAT_TEMPLATE = (
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
        tokenizer.chat_template = CHAT_TEMPLATE
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


def test_sft_batches_match_a_construction_by_hand(templated):
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


def test_pair_batches_match_a_construction_by_hand(templated):
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


def test_prompt_batches_are_not_padded_or_cut_at_separators(templated):
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
def test_prompts_of_every_format_lose_their_oldest_turns(tmp_path, templated, kind, read):
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
    with pytest.raises(ValueError, match="the last user turn alone takes"):
        prompt_batch([record], templated, sizes[-1] - 1)


DIALOGUE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "how are you?"},
]


SFT = [
    {"prompt": DIALOGUE, "response": "Sure."},
    {"prompt": "Hi", "response": " there"},
    {"text": "Hi there, how are you?"},
    {"text": "('Hi', ' there')"},
    {"prompt": DIALOGUE[2:], "response": "Sure. 你好"},
]


PAIRS = [
    {"prompt": DIALOGUE, "chosen": "Sure.", "rejected": "how are you? how are you?"},
    {"prompt": "Hi", "chosen": " there", "rejected": " you"},
]


@pytest.fixture
def calls(english, monkeypatch):
    """Counts how often the tokenizer tokenizes."""
    counted = []
    kind = type(english)
    original = kind.__call__

    def counting(self, *args, **kwargs):
        counted.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return counted


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(("kind", "records"), [(SFTCollator, SFT), (PairCollator, PAIRS)])
@pytest.mark.parametrize("max_length", [None, 12])
def test_cached_batches_equal_uncached_ones(english, calls, kind, records, max_length):
    plain = kind(english, max_length=max_length, cache_bytes=None)
    remembering = kind(english, max_length=max_length)
    for _ in range(3):
        for some in (records, records[::-1], copy.deepcopy(records[:1])):
            assert same(remembering(some), plain(some))
    calls.clear()
    remembering(records)
    assert not calls
    plain(records)
    assert calls


def test_cache_survives_changes_to_a_batch(english):
    collate = SFTCollator(english)
    first = collate(SFT[:1])
    expected = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.zero_()
    assert same(collate(SFT[:1]), expected)


def test_cache_misses_changed_records(english):
    collate = SFTCollator(english)
    record = {"prompt": copy.deepcopy(DIALOGUE), "response": "Sure."}
    collate([record])
    record["prompt"][2]["content"] = "you there?"
    assert same(collate([record]), SFTCollator(english)([record]))
    record["response"] = "how?"
    assert same(collate([record]), SFTCollator(english)([record]))


def test_cache_ignores_other_columns(english, calls):
    collate = PairCollator(english)
    collate(PAIRS)
    calls.clear()
    collate([{**pair, "input_ids": torch.ones(3), "margin": 2.0} for pair in PAIRS])
    assert not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}"),
        lambda tokenizer: tokenizer.add_tokens(["there"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<unk>"),
        lambda tokenizer: setattr(tokenizer, "bos_token", "</s>"),
    ],
    ids=["template", "tokens", "eos", "bos"],
)
def test_cache_is_cleared_when_the_tokenizer_changes(english, calls, change):
    collate = SFTCollator(english)
    collate(SFT[:3])
    change(english)
    calls.clear()
    assert same(collate(SFT[:3]), SFTCollator(english, cache_bytes=None)(SFT[:3]))
    assert len(calls) > 6


def test_cache_is_bounded():
    """What it holds stays, however much goes by; what does not fit is encoded again."""
    rows = [[1, 2, 3], [4] * 97]  # 500 bytes and 4 for each of 100 ids
    known = EncodingCache(2000)
    asked = []
    for number in [*range(9), *range(9)]:
        assert known(number, lambda n=number: asked.append(n) or rows) == rows
    assert asked == [*range(9), *range(2, 9)]
    assert (len(known), known.used) == (2, 1800)


@pytest.mark.parametrize("size", [None, 0])
def test_cache_can_be_switched_off(size):
    known = EncodingCache(size)
    known("Hi", lambda: [[1]])
    assert len(known) == 0


def test_cache_keeps_no_errors():
    known = EncodingCache()

    def broken():
        raise ValueError("too long")

    for _ in range(2):
        with pytest.raises(ValueError, match="too long"):
            known("Hi", broken)
    assert len(known) == 0


def test_copied_collators_have_empty_caches(english):
    collate = SFTCollator(english, max_length=14)
    collate(SFT[:2])
    assert len(collate._cache) == 2
    for other in (pickle.loads(pickle.dumps(collate)), copy.deepcopy(collate)):
        assert (len(other._cache), other._cache.size) == (0, collate.cache_bytes)
        assert other.max_length == 14
        assert same(other(SFT[:2]), collate(SFT[:2]))
    assert len(replace(collate, max_length=8)._cache) == 0


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def sampler(lengths, **options):
    rest = {k: options.pop(k) for k in ("seed", "processes", "process") if k in options}
    return TokenBatchSampler(lengths, TokenBatches(**options), **rest)


@given(LENGTHS, st.integers(1, 4000), st.integers(1, 5), st.integers(0, 20))
def test_token_batches_hold_every_pair_once_within_bounds(lengths, budget, least, more):
    made = sampler(lengths, max_tokens=budget, min_pairs=least, max_pairs=least + more)
    batches = list(made)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == len(made)
    short = [batch for batch in batches if len(batch) < least]
    assert len(short) <= 1  # what is left over
    for batch in batches:
        longest = max(-(-lengths[i] // LENGTH_STEP) * LENGTH_STEP for i in batch)
        assert len(batch) <= least + more
        assert len(batch) <= least or 2 * len(batch) * longest <= budget


@given(LENGTHS, st.integers(1, 4))
def test_token_batches_divide_evenly_among_processes(lengths, processes):
    if len(lengths) < processes:
        with pytest.raises(ValueError, match=f"got {len(lengths)} pairs for {processes}"):
            sampler(lengths, processes=processes)
        return
    parts = [list(sampler(lengths, processes=processes, process=p)) for p in range(processes)]
    assert len({len(part) for part in parts}) == 1
    everything = [i for part in parts for batch in part for i in batch]
    assert sorted(everything) == list(range(len(lengths)))
    assert all(batch for part in parts for batch in part)


def test_token_batches_refuse_uneven_single_pairs():
    with pytest.raises(ValueError, match="5 pairs form batches of one, which 2 processes"):
        sampler([9] * 5, max_pairs=1, min_pairs=1, processes=2)


def test_token_batches_differ_by_epoch_and_seed():
    made = sampler(list(range(1, 200)), max_tokens=900)
    first = list(made)
    assert list(made) == first
    made.set_epoch(1)
    second = list(made)
    assert second != first
    assert len(second) == len(first)
    members = [{frozenset(batch) for batch in epoch} for epoch in (first, second)]
    assert not members[0] <= members[1]  # not the same batches in another order
    made.set_epoch(0)
    assert list(made) == first
    other = sampler(list(range(1, 200)), max_tokens=900, seed=1)
    assert list(other) != first


def test_token_batches_fill_the_budget():
    made = sampler([16] * 64, max_tokens=2 * 16 * 8, min_pairs=1)
    assert [len(batch) for batch in made] == [8] * 8


@pytest.mark.parametrize(
    "options", [dict(max_tokens=0), dict(min_pairs=0), dict(min_pairs=5, max_pairs=4)]
)
def test_token_batches_refuse_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        TokenBatches(**options)
