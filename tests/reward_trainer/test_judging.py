"""Scores of texts against one sequence at a time."""

import copy

import pytest
import torch
from preferences import pairs, reward_model

from mossrlhf import score_responses
from mossrlhf.data import PairCollator, set_dialogue_template
from mossrlhf.judging import pair_margins


def test_scores_are_those_of_each_response_alone(tokenizer):
    model, records = reward_model().train(), pairs(7)
    prompts, responses = [r["prompt"] for r in records], [r["chosen"] for r in records]
    found = score_responses(model, tokenizer, prompts, responses, batch_size=3)
    for record, score in zip(records, found, strict=True):
        ids = tokenizer(f"{record['prompt']} {record['chosen']} </s>", return_tensors="pt")
        with torch.no_grad():
            alone = model.eval()(ids["input_ids"], ids["attention_mask"])
        assert score.item() == pytest.approx(alone.item(), abs=1e-5)


def test_messages_are_rendered_and_the_mode_is_left(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    set_dialogue_template(tokenizer, "en")
    model = reward_model().train()
    asked = [{"role": "user", "content": "a b"}]
    first, second = score_responses(model, tokenizer, [asked, asked], ["good", "bad"])
    assert first != second
    assert model.training
    assert score_responses(model, tokenizer, [], []).shape == (0,)


@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing_are_refused(tokenizer, size):
    with pytest.raises(ValueError, match="batch_size"):
        score_responses(reward_model(), tokenizer, ["a"], ["b"], batch_size=size)
    with pytest.raises(ValueError, match="batch_size"):
        pair_margins(reward_model(), pairs(2), PairCollator(tokenizer), batch_size=size)


def test_what_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_responses(reward_model(), tokenizer, ["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"number 1 takes 4 tokens.*at most 3"):
        score_responses(reward_model(), tokenizer, ["a", "a b"], ["c", "c"], max_length=3)


def test_a_text_in_place_of_a_list_is_refused(tokenizer):
    for prompts, responses, name in (("hi", ["yo"], "prompts"), (["hi"], "yo", "responses")):
        with pytest.raises(ValueError, match=f"{name}: got one text, expected a list"):
            score_responses(reward_model(), tokenizer, prompts, responses)
