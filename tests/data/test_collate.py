import pytest
import torch

from mossrlhf.data import (
    PairCollator,
    SFTCollator,
    encode_prompt,
    encode_response,
    encode_text,
    load_pairs,
    pad,
    pad_id,
    set_dialogue_template,
)

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


def test_any_token_pads(tokenizer):
    tokenizer.pad_token = "<unk>"
    assert pad_id(tokenizer) == tokenizer.unk_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0


def test_sft_learns_the_response_alone(english):
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


def test_sft_learns_all_of_a_document(english):
    batch = SFTCollator(english)([{"text": "Hi there"}, {"text": "Hi there, how are you?"}])
    for row, text in enumerate(["Hi there", "Hi there, how are you?"]):
        expected = encode_text(english, text)
        kept = batch["labels"][row] != -100
        assert batch["labels"][row][kept].tolist() == expected
        assert batch["attention_mask"][row].tolist() == kept.long().tolist()
    cut = SFTCollator(english, max_length=3)([{"text": "Hi there, how are you?"}])
    assert cut["input_ids"].tolist() == [encode_text(english, "Hi there, how are you?")[:3]]


def test_sft_cuts_old_turns_first_and_then_the_response(english):
    record = {"prompt": PROMPT, "response": "Sure. Sure. Sure."}
    response = encode_response(english, PROMPT, record["response"])
    short = encode_prompt(english, PROMPT[2:])
    for limit in (len(short) + len(response), len(short) + len(response) - 1, len(short) + 1):
        batch = SFTCollator(english, max_length=limit)([record])
        assert batch["input_ids"].tolist() == [(short + response)[:limit]]
        assert batch["labels"].tolist() == [([-100] * len(short) + response)[:limit]]
    with pytest.raises(ValueError, match="leave no room for a response within max_length"):
        SFTCollator(english, max_length=len(short))([record])


def test_pairs_are_all_chosen_then_all_rejected(english):
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


def test_both_sides_of_a_pair_keep_the_same_prompt(english):
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
def test_records_that_are_none_of_theirs_are_refused(english, collator):
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
            r"chosen is a list .*expected a string.*load_pairs \(PairCollator\), which make",
        ),
        (
            PairCollator,
            {"prompt": "Hi", "chosen": " yes", "rejected": PROMPT[1]},
            "rejected is a dict .*expected a string, that text alone",
        ),
    ],
)
def test_answers_that_are_no_text_are_refused(english, collator, record, message):
    """Also after good ones: not the first record of a dataset alone is looked at."""
    good = {"prompt": "Hi", "response": " Ho", "chosen": " yes", "rejected": " no"}
    with pytest.raises(ValueError, match=f"records: {message}"):
        collator(english)([good, record])


def test_pairs_that_become_alike_are_told_of_once(english):
    collator = PairCollator(english, max_length=16)
    record = {"prompt": "q", "chosen": "a " * 30 + "yes", "rejected": "a " * 30 + "no"}
    with pytest.warns(UserWarning, match=r"both responses to 'q' have the same 1\d tokens") as seen:
        collator([record])
    assert len(seen) == 1
    batch = collator([record, {**record, "prompt": "p"}])  # not again, or it would be an error
    assert torch.equal(batch["input_ids"][:2], batch["input_ids"][2:])


def test_real_pairs_fit(shared, english):
    pairs = load_pairs(shared / "data" / "llama-factory" / "dpo_en_demo.json")
    pairs = [pair for pair in pairs if len(encode_prompt(english, pair["prompt"][-1:])) < 256][:32]
    batch = PairCollator(english, max_length=256)(pairs)
    assert batch["input_ids"].shape[0] == 2 * len(pairs)
    assert batch["input_ids"].shape[1] == 256
