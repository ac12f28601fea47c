"""Rewards of texts against one sequence at a time."""

import copy

import pytest
from preferences import pairs, reward_model, reward_of

from mossrlhf import score_responses
from mossrlhf.data import PairCollator, set_dialogue_template
from mossrlhf.reward_modeling.scoring import pair_margins


def test_score_responses_equals_each_response_alone(tokenizer):
    model, records = reward_model().train(), pairs(7)
    prompts, responses = [r["prompt"] for r in records], [r["chosen"] for r in records]
    found = score_responses(model, tokenizer, prompts, responses, batch_size=3)
    alone = [reward_of(model.eval(), tokenizer, record, "chosen") for record in records]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)


def test_pair_margins_equal_the_difference_of_rewards(tokenizer):
    model, records = reward_model(), pairs(7)
    found = pair_margins(model, records, PairCollator(tokenizer), batch_size=3)
    expected = [
        reward_of(model, tokenizer, r, "chosen") - reward_of(model, tokenizer, r, "rejected")
        for r in records
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_score_responses_renders_messages_and_restores_the_mode(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    set_dialogue_template(tokenizer, "en")
    model = reward_model().train()
    prompt = [{"role": "user", "content": "a b"}]
    first, second = score_responses(model, tokenizer, [prompt, prompt], ["good", "bad"])
    assert first != second
    assert model.training
    assert score_responses(model, tokenizer, [], []).shape == (0,)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_below_one_are_refused(tokenizer, size):
    with pytest.raises(ValueError, match="batch_size"):
        score_responses(reward_model(), tokenizer, ["a"], ["b"], batch_size=size)
    with pytest.raises(ValueError, match="batch_size"):
        pair_margins(reward_model(), pairs(2), PairCollator(tokenizer), batch_size=size)


def test_unequal_lists_and_long_sequences_are_refused(tokenizer):
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_responses(reward_model(), tokenizer, ["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"number 1 takes 4 tokens.*at most 3"):
        score_responses(reward_model(), tokenizer, ["a", "a b"], ["c", "c"], max_length=3)


def test_a_text_instead_of_a_list_is_refused(tokenizer):
    for prompts, responses, name in (("hi", ["yo"], "prompts"), (["hi"], "yo", "responses")):
        with pytest.raises(ValueError, match=f"{name}: got one text, expected a list"):
            score_responses(reward_model(), tokenizer, prompts, responses)
