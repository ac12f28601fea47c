"""`RewardSet`: what functions get, what they may return, weights and names."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mossrlhf.metrics import rollout_metrics
from mossrlhf.models import RewardModel, ValueHead
from mossrlhf.rewards import RESERVED, ModelReward, RewardSet, reward_name, reward_pairs
from mossrlhf.types import Rollout

DENSE = torch.tensor([[1.0, torch.nan, 2.0], [3.0, torch.inf, 9.0]])
"""A reward per token; the second and the two last are outside the mask."""


def fine(*, completions, **columns):
    """2 if the completion has "thanks", else −1."""
    return [2.0 if "thanks" in text else -1.0 for text in completions]


# Functions


def test_functions_are_called_by_keyword_with_every_column(tokenizer, rollout):
    seen = {}

    def watch(**everything):
        seen.update(everything)
        return [0.0, 0.0]

    RewardSet(watch, tokenizer)(rollout)
    assert seen == {
        "prompts": ["hi there", "how are you"],
        "completions": ["fine thanks", "fine"],  # without special tokens
        "completion_ids": rollout.completions(),
        "answer": ["A", "B"],
    }


def test_functions_may_have_arguments_with_defaults_and_need_those_without(tokenizer, rollout):
    def plus(completions, bonus=1.0):
        return [bonus for _ in completions]

    def hinted(completions, hint):
        return [hint for _ in completions]

    rewards, _, _ = RewardSet(plus, tokenizer)(rollout)
    assert rewards.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="reward 'hinted': got a parameter 'hint'"):
        RewardSet(hinted, tokenizer)(rollout)


def test_functions_get_decoded_prompts_if_the_dataset_has_none(tokenizer, rollout):
    bare = Rollout(**{**vars(rollout), "columns": {}})
    seen = []
    RewardSet(lambda prompts, **_: seen.extend(prompts) or [0.0, 0.0], tokenizer)(bare)
    assert seen == ["hi there", "how are you"]
    special = bare.input_ids.clone()
    special[0, 0] = tokenizer.eos_token_id
    RewardSet(lambda prompts, **_: seen.extend(prompts) or [0.0, 0.0], tokenizer)(
        replace(bare, input_ids=special)
    )
    assert seen[2] == "</s> there"


def test_functions_get_rendered_messages(tokenizer, rollout):
    chats = [[{"role": "user", "content": text}] for text in ("hi there", "how are you")]
    chatty = Rollout(**{**vars(rollout), "columns": {"prompt": chats}})
    seen = []
    RewardSet(lambda prompts, **_: seen.extend(prompts) or [0.0, 0.0], tokenizer)(chatty)
    assert seen == ["user : hi there assistant :", "user : how are you assistant :"]


def test_functions_may_name_only_the_arguments_they_need(tokenizer, rollout):
    def short(completions, answer):
        return [float(len(text) + (a == "B")) for text, a in zip(completions, answer, strict=True)]

    totals, _, _ = RewardSet(short, tokenizer)(rollout)
    assert totals.tolist() == [11, 5]
    fewer, _, _ = RewardSet(lambda completions: [len(t) for t in completions], tokenizer)(rollout)
    assert fewer.tolist() == [11, 4]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_functions_may_return_any_sequence_of_numbers(tokenizer, rollout, kind):
    totals, token_totals, by_name = RewardSet(lambda **_: kind([1.0, 2.0]), tokenizer)(rollout)
    assert totals.tolist() == [1, 2]
    assert totals.dtype == torch.float32
    assert token_totals is None
    assert [value.tolist() for value in by_name.values()] == [[1, 2]]


def test_rewards_carry_no_gradient(tokenizer, rollout):
    given = torch.ones(2, requires_grad=True)
    totals, _, _ = RewardSet(lambda **_: given, tokenizer)(rollout)
    assert not totals.requires_grad


def test_none_means_not_applicable(tokenizer, rollout):
    totals, _, by_name = RewardSet(lambda **_: [None, 3.0], tokenizer)(rollout)
    assert totals.isnan().tolist() == [True, False]
    assert totals[1] == by_name["<lambda>"][1] == 3.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"'broken' returned \(1,\) values for 2 completions"),
        ({0: 0.5, 1: 0.5}, "'broken' returned dict, expected a list of 2 numbers"),
        ({0.5, 0.6}, "'broken' returned set, expected a list of 2 numbers"),
        ("12", "'broken' returned str, expected .*its order is not that"),
        (b"12", "'broken' returned bytes, expected .*its order is not that"),
        (["1", "2"], "'broken' returned list, expected .*'1' is no number"),
        (torch.zeros(2, 2), r"'broken' returned \(2, 2\) values .* or \(2, 3\) for one reward"),
        (
            [1.0, float("inf")],
            "'broken' returned inf for sample 1, 'fine', expected finite",
        ),
        ([float("nan"), 1.0], "'broken' returned nan for sample 0"),
        (torch.tensor([1.0, float("nan")]), "'broken' returned nan for sample 1"),
        (torch.full((2, 3), -torch.inf), r"'broken' returned \[-inf.* for sample 0"),
        (None, "'broken' returned NoneType, expected a list of 2 numbers"),
        (5.0, "'broken' returned float, expected a list of 2 numbers"),
        (["good", "bad"], "'broken' returned list, expected a list of 2 numbers .*'good'"),
    ],
)
def test_unusable_results_are_refused(tokenizer, rollout, returned, message):
    def broken(**_):
        return returned

    with pytest.raises(ValueError, match=message):
        RewardSet(broken, tokenizer)(rollout)


def test_errors_of_a_function_are_named(tokenizer, rollout):
    def broken(completions, **columns):
        return [columns["missing"]]

    message = (
        r"'broken' raised KeyError: 'missing'.* for 2 completions with \['completion_ids', "
        r"'completions', 'prompts'\] and the columns \['answer'\]"
    )
    with pytest.raises(ValueError, match=message) as caught:
        RewardSet(broken, tokenizer)(rollout)
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_count_completions_even_if_the_function_does_not_get_them(tokenizer, rollout):
    def broken(prompts):
        raise RuntimeError("no")

    with pytest.raises(ValueError, match=r"for 2 completions with \['prompts'\] and"):
        RewardSet(broken, tokenizer)(rollout)


def test_a_column_named_like_an_argument_is_refused(tokenizer, rollout):
    clash = replace(rollout, columns={"prompt": ["a", "b"], "completions": ["x", "y"]})
    with pytest.raises(ValueError, match=r"column 'completions' .*passes to the reward 'fine'"):
        RewardSet(fine, tokenizer)(clash)


def test_token_rewards_count_inside_the_mask_only(tokenizer, rollout):
    totals, token_totals, by_name = RewardSet(lambda **_: DENSE, tokenizer)(rollout)
    assert totals is None
    assert token_totals.tolist() == [[1, 0, 2], [3, 0, 0]]
    assert by_name["<lambda>"].tolist() == [3, 3]


def test_token_rewards_and_response_rewards_are_summed_separately(tokenizer, rollout):
    def dense(**_):
        return DENSE

    def more(**_):
        return torch.ones(2, 3)

    reward_set = RewardSet([(dense, 2.0), more, (fine, 0.5)], tokenizer)
    totals, token_totals, _ = reward_set(rollout)
    assert token_totals.tolist() == [[3, 0, 5], [7, 0, 0]]
    assert totals.tolist() == [1.0, -0.5]


# Weights and names


def test_reward_pairs_accepts_names_models_and_functions(classifier):
    given = ["a/name", Path("a/folder"), ModelReward(model=classifier), classifier, fine]
    assert reward_pairs([*given, (fine, 2)]) == [*((g, 1.0) for g in given), (fine, 2.0)]
    assert reward_pairs(fine) == [(fine, 1.0)]
    with pytest.raises(TypeError, match="reward: got 3, expected a reward model"):
        reward_pairs([fine, 3])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_reward_pairs_refuses_weights_that_are_not_numbers(weight):
    with pytest.raises(ValueError, match=r"reward: the weight of .* expected a number"):
        reward_pairs([(fine, weight)])


def test_rewards_are_summed_by_weight(tokenizer, rollout):
    def length(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    reward_set = RewardSet([fine, (length, -0.5)], tokenizer)
    totals, _, by_name = reward_set(rollout)
    assert totals.tolist() == [2 - 1.5, -1 - 0.5]
    assert by_name["length"].tolist() == [3, 1]  # unweighted
    assert reward_set.weights == {"fine": 1.0, "length": -0.5}


def test_a_reward_that_does_not_apply_leaves_the_others(tokenizer, rollout):
    def first(**_):
        return [1.0, None, None]

    def second(**_):
        return [None, None, 2.0]

    three = rollout.select(torch.tensor([0, 1, 1]))
    totals, _, _ = RewardSet([first, second], tokenizer)(three)
    assert totals[[0, 2]].tolist() == [1.0, 2.0]
    assert totals[1].isnan()


def test_weight_zero_is_measured_and_not_summed(tokenizer, rollout):
    def nothing(**_):
        return [None, 7.0]

    totals, _, by_name = RewardSet([fine, (nothing, 0)], tokenizer)(rollout)
    assert totals.tolist() == [2, -1]
    assert by_name["nothing"][1] == 7.0


def test_weight_zero_alone_gives_no_sum(tokenizer, rollout):
    totals, token_totals, by_name = RewardSet([(fine, 0)], tokenizer)(rollout)
    assert (totals, token_totals) == (None, None)
    assert by_name["fine"].tolist() == [2, -1]


def test_a_non_finite_reward_of_a_model_is_refused(tokenizer, rollout, classifier):
    nn.init.constant_(classifier.score.weight, torch.nan)
    with pytest.raises(ValueError, match="'reward_model' returned nan for sample 0"):
        RewardSet(classifier, tokenizer)(rollout)


def test_other_modules_are_refused(tokenizer):
    with pytest.raises(ValueError, match="reward: got Linear, expected a RewardModel"):
        RewardSet(nn.Linear(2, 1), tokenizer)


def test_names_are_those_of_functions_classes_and_models(tokenizer, classifier):
    class Length:
        def __call__(self, **_):
            return []

    reward_set = RewardSet(
        [fine, Length(), ModelReward(model=classifier, name="helpful"), partial(fine)], tokenizer
    )
    assert reward_set.names == ["fine", "Length", "helpful", "partial"]
    assert reward_name(ModelReward(model=classifier)) == "reward_model"


def test_equal_names_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"names must differ.*\['fine', 'fine'\]"):
        RewardSet([fine, (fine, 2.0)], tokenizer)


@pytest.mark.parametrize("name", [*sorted(RESERVED), "kl/mine"])
def test_names_of_other_metrics_are_refused(tokenizer, classifier, name):
    named = ModelReward(model=classifier, name=name)
    with pytest.raises(ValueError, match=f"{name!r} cannot be .*another name=.*perplexity"):
        RewardSet([fine, named], tokenizer)


def test_reserved_names_are_those_of_the_other_metrics(rollout):
    ones = torch.ones(2, 3)
    names = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropies", "values")
    annotated = replace(rollout, **dict.fromkeys((*names, "advantages", "returns"), ones))
    described = {name.split("/")[0] for name in rollout_metrics(annotated)}
    assert described == RESERVED


def test_an_empty_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match="got an empty list"):
        RewardSet([], tokenizer)


def test_a_number_is_refused(tokenizer):
    with pytest.raises(TypeError, match="reward: got 5, expected a reward model"):
        RewardSet([5], tokenizer)


def test_to_moves_the_models(tokenizer, classifier):
    model = RewardModel(classifier.model, ValueHead(16))
    reward_set = RewardSet([model, fine], tokenizer).to("meta")
    assert reward_set.models()[0].device.type == "meta"
    assert reward_set.same_tokenizer() == reward_set.models()


@pytest.mark.parametrize(
    "wrong", [torch.ones(2), torch.tensor(1j), torch.ones(0), np.ones(1), np.complex64(1)]
)
def test_a_reward_is_one_real_number_per_response(tokenizer, rollout, wrong):
    with pytest.raises(ValueError, match="is no number"):
        RewardSet(lambda completions, **_: [torch.ones(1), wrong], tokenizer)(rollout)
    rewards, _, _ = RewardSet(lambda completions, **_: [torch.ones(1), 2], tokenizer)(rollout)
    assert rewards.tolist() == [1.0, 2.0]
