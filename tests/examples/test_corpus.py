"""What is held out stays unseen, and what is too long is shortened at the right end."""

import pytest
from support.corpus import detect_language, language_records, make_corpus, split

from mossrlhf.data import encode_prompt


def pair(question, chosen="Yes, of course.", rejected="No.", before=()):
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        "chosen": chosen,
        "rejected": rejected,
    }


@pytest.fixture
def pairs():
    return [
        pair(f"May I ask question number {i}?", f"Answer {i}.", f"Go away {i}.") for i in range(24)
    ]


def test_the_last_pairs_are_held_out(pairs):
    train, held_out = split(pairs, 3)
    assert (train, held_out) == (pairs[:-3], pairs[-3:])


def test_at_most_a_sixth_is_held_out(pairs):
    train, held_out = split(pairs, 300)
    assert (len(train), len(held_out)) == (20, 4)


def test_too_few_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="got 5 with held_out=3"):
        split(pairs[:5], 3)


def test_a_dialogue_is_on_one_side_only(pairs):
    opening = pairs[-1]["prompt"] + [{"role": "assistant", "content": "Do."}]
    earlier = pair("Thank you.", before=opening)
    train, _ = split([earlier, *pairs], 3)
    assert train == pairs[:-3]


def test_a_string_is_a_human_turn(pairs):
    (record, *_), _ = split([{**pairs[0], "prompt": "Hello"}, *pairs], 3)
    assert record["prompt"] == [{"role": "user", "content": "Hello"}]


def test_the_tokenizer_has_not_seen_what_is_held_out(pairs):
    secret = [pair("Where is the rhododendron?", "Rhododendron!", "Rhododendron?")] * 3
    corpus = make_corpus([*pairs, *secret], 3, 600, 32)
    everything = make_corpus([*secret, *secret, *pairs], 3, 600, 32)
    assert len(corpus.tokenizer.tokenize(" rhododendron")) > 2
    assert len(everything.tokenizer.tokenize(" rhododendron")) <= 2


def test_the_language_is_told_by_the_answers(pairs):
    chinese = [pair("讲个笑话", "好的，这是一个 BBC 的笑话。")]
    assert detect_language(pairs) == "en"
    assert detect_language(chinese) == "zh"


def test_chinese_speakers_are_tokens_of_their_own():
    corpus = make_corpus([pair("讲个笑话", "好的", "不行")] * 6 + [pair("你好")], 1, 400, 32)
    assert corpus.lang == "zh"
    ids = encode_prompt(corpus.tokenizer, [{"role": "user", "content": "讲"}])
    tokens = corpus.tokenizer.convert_ids_to_tokens(ids)
    assert (tokens[0], tokens[-2:]) == ("<|Human|>", ["</s>", "<|MOSS|>"])


def test_of_a_long_turn_the_end_is_kept(pairs):
    long = pair("ä" * 50 + " and this is what I want to know?")
    corpus = make_corpus([long, *pairs], 3, 400, 12)
    content = corpus.train[0]["prompt"][-1]["content"]
    assert content.endswith("this is what I want to know?")
    assert len(corpus.tokenizer.tokenize(content)) <= 12
    assert "\ufffd" not in content


def test_a_text_loses_its_oldest_exchange_and_no_response(pairs):
    before = [
        {"role": "user", "content": "An old question " * 10},
        {"role": "assistant", "content": "An old answer."},
    ]
    corpus = make_corpus([pair("A new question?", "New!", "Old!", before), *pairs], 3, 400, 64)
    whole, rejected = language_records(corpus, 1000)[:2]
    cut, _ = language_records(corpus, 30)[:2]
    end = "Human: A new question?</s>Assistant: New!"
    assert whole["text"] == f"Human: {'An old question ' * 10}".strip() + (
        f"</s>Assistant: An old answer.</s>{end}"
    )
    assert cut["text"] == end
    assert rejected["response"] == "Old!"
