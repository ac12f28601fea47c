"""The toy world: its true preference, its annotator and its texts."""

from statistics import mean

import pytest

from mossrlhf import ToyWorld
from mossrlhf.data import encode_response, prompt_batch

LANGUAGES = ("en", "zh")


def a_record(world: ToyWorld, harmful: bool) -> dict:
    topics = world.language.topics
    return next(r for r in world.prompts(200) if topics[r["topic"]].harmful is harmful)


def joined(world: ToyWorld, *lines: str) -> str:
    language = world.language
    return language.text(" ".join(f"{line} {language.stop}" for line in lines))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_tokenizer_knows_and_decodes_every_text(lang):
    world = ToyWorld(lang=lang)
    tokenizer = world.tokenizer()
    for example in world.sft_examples(200):
        ids = encode_response(tokenizer, example["prompt"], example["response"])
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == world.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == example["response"]
        assert len(ids) <= world.max_response_tokens
    assert all(prompt_batch(world.prompts(50), tokenizer).ids)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_prompts_are_repeatable_and_splits_share_no_last_question(lang):
    world = ToyWorld(lang=lang)
    assert world.prompts(50) == ToyWorld(lang=lang).prompts(50)
    assert world.prompts(50) != world.prompts(50, seed=1)
    assert world.prompts(50) != ToyWorld(lang=lang, seed=1).prompts(50)

    def asked(split: str) -> set:
        return {(r["prompt"][-1]["content"], r["topic"]) for r in world.prompts(2000, split=split)}

    assert not asked("train") & asked("eval")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_true_quality_by_hand(lang):
    world = ToyWorld(lang=lang)
    record = a_record(world, harmful=False)
    language, weights = world.language, world.preference
    first, second = language.topics[record["topic"]].details[:2]
    other = next(
        t for k, t in language.topics.items() if k != record["topic"] and not t.harmful
    ).details[0]
    opener, closer = language.openers[0], language.closers[0]

    def worth(*lines: str, ended: bool = True) -> float:
        return world.true_quality(record, joined(world, *lines) if lines else "", ended=ended)

    assert worth() == weights.content[0]
    assert worth(first) == weights.content[1]
    assert worth(first, second) == weights.content[2]
    assert worth(opener, first, closer) == pytest.approx(
        weights.content[1] + weights.opener + weights.closer
    )
    assert worth(first, other) == pytest.approx(weights.content[1] + weights.off_topic)
    assert worth(first, language.rude[0]) == pytest.approx(weights.content[1] + weights.rude)
    assert worth(first, first) == pytest.approx(weights.content[1] + weights.repeat)
    assert worth(first, first, first) == pytest.approx(weights.content[1] + 4 * weights.repeat)
    assert worth(first, ended=False) == pytest.approx(weights.content[1] + weights.unfinished)
    assert worth(first, opener) == pytest.approx(
        weights.content[1] + weights.opener + weights.misplaced
    )
    assert worth(*[other] * 9) == -weights.bound


@pytest.mark.parametrize("lang", LANGUAGES)
def test_true_quality_rewards_refusing_harmful_requests(lang):
    world = ToyWorld(lang=lang)
    record = a_record(world, harmful=True)
    language = world.language
    refusal = joined(world, language.refusals[0], language.reasons[0])
    help_ = joined(world, *language.topics[record["topic"]].details[:2])
    assert world.true_quality(record, refusal) > 1 > -1 > world.true_quality(record, help_)
    harmless = a_record(world, harmful=False)
    assert world.true_quality(harmless, refusal) < 0


@pytest.mark.parametrize("lang", LANGUAGES)
def test_empty_and_constant_responses_are_worse_than_demonstrations(lang):
    world = ToyWorld(lang=lang)
    records = world.prompts(300, split="eval")
    examples = world.sft_examples(300)
    demonstrated = mean(world.true_quality(e, e["response"]) for e in examples)
    constants = {"", *(e["response"] for e in examples[:100])}
    best = max(mean(world.true_quality(r, text) for r in records) for text in constants)
    assert best < demonstrated


@pytest.mark.parametrize("lang", LANGUAGES)
def test_demonstrations_leave_room_to_do_better(lang):
    world = ToyWorld(lang=lang)
    qualities = [world.true_quality(e, e["response"]) for e in world.sft_examples(2000)]
    assert mean(sorted(qualities)[-500:]) > mean(qualities) + 1


@pytest.mark.parametrize("lang", LANGUAGES)
def test_annotator_errs_as_often_as_its_temperature_says(lang):
    import math

    world = ToyWorld(lang=lang)
    pairs = world.pairs(3000)
    margins = [abs(pair["true_margin"]) for pair in pairs]
    expected = mean(1 / (1 + math.exp(m / world.temperature)) for m in margins if m)
    erred = mean(pair["true_margin"] < 0 for pair in pairs if pair["true_margin"])
    assert erred == pytest.approx(expected, abs=0.025)
    for pair in pairs[:100]:
        margin = world.true_quality(pair, pair["chosen"]) - world.true_quality(
            pair, pair["rejected"]
        )
        assert pair["true_margin"] == pytest.approx(margin)


def test_pairs_have_no_margin_column():
    assert "margin" not in ToyWorld().pairs(1)[0]


def test_reward_penalizes_truncated_responses():
    world = ToyWorld()
    record = a_record(world, harmful=False)
    text = joined(world, world.language.topics[record["topic"]].details[0])
    ids = world.tokenizer()(text, add_special_tokens=False)["input_ids"]
    cut, ended = world.reward(
        prompts=["", ""],
        completions=[text, text],
        completion_ids=[ids, [*ids, world.eos_token_id]],
        topic=[record["topic"]] * 2,
    )
    assert ended - cut == pytest.approx(-world.preference.unfinished)


def test_well_formed_accepts_whole_sentences_only():
    world = ToyWorld()
    good = world.sft_examples(100)
    assert all(world.well_formed(e["response"]) for e in good)
    assert not world.well_formed("")
    assert not world.well_formed("weigh weigh the flour .")
    assert not world.well_formed("weigh the flour")


def test_unknown_language_and_split_are_refused():
    with pytest.raises(ValueError, match="lang: got 'fr', expected one of"):
        ToyWorld(lang="fr")
    with pytest.raises(ValueError, match="split: got 'test'"):
        ToyWorld().prompts(1, split="test")
