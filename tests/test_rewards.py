"""Rewards of every kind behind one door: what they are given, and what comes of what they say."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mossrlhf.metrics import rollout_metrics
from mossrlhf.models import RewardModel, ValueHead
from mossrlhf.rewards import (
    RESERVED,
    ModelReward,
    RewardSet,
    as_reward_model,
    as_scorer,
    reward_name,
    reward_pairs,
)
from mossrlhf.types import Rollout

WORDS = ["user", "assistant", ":", "hi", "there", "how", "are", "you", "fine", "thanks"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def word_tokenizer(words, eos="</s>", adds_eos=False):
    """One token a word; ids in the order of `words`, after the special tokens."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def rollout(tokenizer):
    """ "hi there" → "fine thanks </s>" and "how are you" → "fine", the first with a hole."""
    first, second = (tokenizer.encode(t) for t in ("hi there fine thanks </s>", "how are you fine"))
    return Rollout(
        input_ids=torch.tensor([first, [*second, 0]]),
        prompt_lengths=torch.tensor([2, 3]),
        response_lengths=torch.tensor([3, 1]),
        truncated=torch.tensor([False, True]),
        mask=torch.tensor([[True, False, True], [True, False, False]]),
        columns={"prompt": ["hi there", "how are you"], "answer": ["A", "B"]},
    )


def fine(*, completions, **columns):
    """2 where the completion is thankful, else −1."""
    return [2.0 if "thanks" in text else -1.0 for text in completions]


class TestFunctions:
    def test_are_called_by_keyword_with_every_column(self, tokenizer, rollout):
        seen = {}

        def watch(**everything):
            seen.update(everything)
            return [0.0, 0.0]

        RewardSet(watch, tokenizer)(rollout)
        assert seen == {
            "prompts": ["hi there", "how are you"],
            "completions": ["fine thanks", "fine"],  # special tokens are no text
            "completion_ids": rollout.completions(),
            "answer": ["A", "B"],
        }

    def test_prompts_are_decoded_where_the_dataset_has_none(self, tokenizer, rollout):
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

    def test_messages_are_rendered_for_functions(self, tokenizer, rollout):
        chats = [[{"role": "user", "content": text}] for text in ("hi there", "how are you")]
        chatty = Rollout(**{**vars(rollout), "columns": {"prompt": chats}})
        seen = []
        RewardSet(lambda prompts, **_: seen.extend(prompts) or [0.0, 0.0], tokenizer)(chatty)
        assert seen == ["user : hi there assistant :", "user : how are you assistant :"]

    def test_may_name_only_what_they_need(self, tokenizer, rollout):
        def short(completions, answer):
            return [
                float(len(text) + (a == "B")) for text, a in zip(completions, answer, strict=True)
            ]

        scores, _, _ = RewardSet(short, tokenizer)(rollout)
        assert scores.tolist() == [11, 5]
        fewer, _, _ = RewardSet(lambda completions: [len(t) for t in completions], tokenizer)(
            rollout
        )
        assert fewer.tolist() == [11, 4]

    @pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
    def test_may_return_any_row_of_numbers(self, tokenizer, rollout, kind):
        scores, token_scores, by_name = RewardSet(lambda **_: kind([1.0, 2.0]), tokenizer)(rollout)
        assert scores.tolist() == [1, 2]
        assert scores.dtype == torch.float32
        assert token_scores is None
        assert [value.tolist() for value in by_name.values()] == [[1, 2]]

    def test_gradients_stay_outside(self, tokenizer, rollout):
        given = torch.ones(2, requires_grad=True)
        scores, _, _ = RewardSet(lambda **_: given, tokenizer)(rollout)
        assert not scores.requires_grad

    def test_none_is_no_reward(self, tokenizer, rollout):
        scores, _, by_name = RewardSet(lambda **_: [None, 3.0], tokenizer)(rollout)
        assert scores.isnan().tolist() == [True, False]
        assert scores[1] == by_name["<lambda>"][1] == 3.0

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            ([1.0], r"'broken' returned \(1,\) values for 2 completions"),
            ({0: 0.5, 1: 0.5}, "'broken' returned dict, expected a list of 2 numbers"),
            ({0.5, 0.6}, "'broken' returned set, expected a list of 2 numbers"),
            ("12", "'broken' returned str, expected .*its order says nothing"),
            (b"12", "'broken' returned bytes, expected .*its order says nothing"),
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
    def test_answers_of_no_use_are_named(self, tokenizer, rollout, returned, message):
        def broken(**_):
            return returned

        with pytest.raises(ValueError, match=message):
            RewardSet(broken, tokenizer)(rollout)

    def test_what_they_raise_is_named(self, tokenizer, rollout):
        def broken(completions, **columns):
            return [columns["missing"]]

        message = (
            r"'broken' raised KeyError: 'missing'.* for 2 completions with \['completion_ids', "
            r"'completions', 'prompts'\] and the columns \['answer'\]"
        )
        with pytest.raises(ValueError, match=message) as caught:
            RewardSet(broken, tokenizer)(rollout)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_completions_are_counted_though_not_asked_for(self, tokenizer, rollout):
        def broken(prompts):
            raise RuntimeError("no")

        with pytest.raises(ValueError, match=r"for 2 completions with \['prompts'\] and"):
            RewardSet(broken, tokenizer)(rollout)

    def test_a_column_in_the_way_is_named(self, tokenizer, rollout):
        clash = replace(rollout, columns={"prompt": ["a", "b"], "completions": ["x", "y"]})
        with pytest.raises(ValueError, match=r"column 'completions' is what the reward 'fine'"):
            RewardSet(fine, tokenizer)(clash)


class TestTokenRewards:
    DENSE = torch.tensor([[1.0, torch.nan, 2.0], [3.0, torch.inf, 9.0]])

    def test_count_inside_the_mask(self, tokenizer, rollout):
        scores, token_scores, by_name = RewardSet(lambda **_: self.DENSE, tokenizer)(rollout)
        assert scores is None
        assert token_scores.tolist() == [[1, 0, 2], [3, 0, 0]]
        assert by_name["<lambda>"].tolist() == [3, 3]

    def test_add_up_beside_those_of_sequences(self, tokenizer, rollout):
        def dense(**_):
            return self.DENSE

        def more(**_):
            return torch.ones(2, 3)

        rewards = RewardSet([(dense, 2.0), more, (fine, 0.5)], tokenizer)
        scores, token_scores, _ = rewards(rollout)
        assert token_scores.tolist() == [[3, 0, 5], [7, 0, 0]]
        assert scores.tolist() == [1.0, -0.5]


class TestWeights:
    def test_what_may_be_a_reward(self, classifier):
        """Names are loaded by the trainer."""
        given = ["a/name", Path("a/folder"), ModelReward(model=classifier), classifier, fine]
        assert reward_pairs([*given, (fine, 2)]) == [*((g, 1.0) for g in given), (fine, 2.0)]
        assert reward_pairs(fine) == [(fine, 1.0)]
        with pytest.raises(TypeError, match="reward: got 3, expected a reward model"):
            reward_pairs([fine, 3])

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
    def test_weights_are_numbers(self, weight):
        with pytest.raises(ValueError, match=r"reward: the weight of .* expected a number"):
            reward_pairs([(fine, weight)])

    def test_sum(self, tokenizer, rollout):
        def length(completion_ids, **_):
            return [float(len(ids)) for ids in completion_ids]

        rewards = RewardSet([fine, (length, -0.5)], tokenizer)
        scores, _, by_name = rewards(rollout)
        assert scores.tolist() == [2 - 1.5, -1 - 0.5]
        assert by_name["length"].tolist() == [3, 1]  # unweighted
        assert rewards.weights == {"fine": 1.0, "length": -0.5}

    def test_what_does_not_apply_leaves_the_others(self, tokenizer, rollout):
        def first(**_):
            return [1.0, None, None]

        def second(**_):
            return [None, None, 2.0]

        three = rollout.select(torch.tensor([0, 1, 1]))
        scores, _, _ = RewardSet([first, second], tokenizer)(three)
        assert scores[[0, 2]].tolist() == [1.0, 2.0]
        assert scores[1].isnan()

    def test_weight_zero_is_measured_alone(self, tokenizer, rollout):
        def nothing(**_):
            return [None, 7.0]

        scores, _, by_name = RewardSet([fine, (nothing, 0)], tokenizer)(rollout)
        assert scores.tolist() == [2, -1]
        assert by_name["nothing"][1] == 7.0

    def test_measured_alone_there_is_no_score(self, tokenizer, rollout):
        scores, token_scores, by_name = RewardSet([(fine, 0)], tokenizer)(rollout)
        assert (scores, token_scores) == (None, None)
        assert by_name["fine"].tolist() == [2, -1]


TRUE = torch.tensor([True, True])

LLAMA = dict(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.3,
    pad_token_id=19,
)


@pytest.fixture
def classifier():
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))


BERT = dict(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=19,
    intermediate_size=8, initializer_range=0.5, max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture
def bert():
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=1)).eval()


def finished(rollout, **columns):
    """The same responses, none of them cut off."""
    return replace(rollout, columns=columns, truncated=torch.zeros(2, dtype=torch.bool))


def score(classifier, ids):
    """The oracle: transformers' own score of one sequence."""
    with torch.no_grad():
        return classifier.eval()(torch.tensor([ids])).logits.item()


class TestModels:
    def test_a_classifier_reads_the_policys_tokens(self, tokenizer, rollout, classifier):
        rewards = RewardSet(classifier, tokenizer)
        scores, _, by_name = rewards(rollout)
        rows = [p + c for p, c in zip(rollout.prompts(), rollout.completions(), strict=True)]
        expected = torch.tensor([score(classifier, row) for row in rows])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert list(by_name) == ["reward_model"]
        assert not scores.requires_grad

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_batches_change_nothing(self, tokenizer, rollout, classifier, batch_size):
        whole, _, _ = RewardSet(classifier, tokenizer)(rollout)
        reward = ModelReward(model=classifier, batch_size=batch_size)
        parts, _, _ = RewardSet(reward, tokenizer)(rollout)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "policy's tokens"])
    def test_scores_come_in_the_order_of_the_rollout(self, tokenizer, classifier, own, monkeypatch):
        """Asked by length; no order of these lengths is its own inverse."""
        lengths = [4, 9, 2, 7, 1, 6, 3]
        words = [[WORDS[(row + i) % len(WORDS)] for i in range(n)] for row, n in enumerate(lengths)]
        rows = [tokenizer.convert_tokens_to_ids(said) for said in words]
        order = torch.tensor(lengths).argsort()
        assert not torch.equal(order, order.argsort())
        rollout = Rollout(
            input_ids=torch.tensor([[3, *ids, *[0] * (9 - len(ids))] for ids in rows]),
            prompt_lengths=torch.ones(7, dtype=torch.long),
            response_lengths=torch.tensor(lengths),
            truncated=torch.ones(7, dtype=torch.bool),
            mask=torch.arange(9) < torch.tensor(lengths)[:, None],
            columns={"prompt": [tokenizer.decode([3]) + " "] * 7},
        )
        reward = ModelReward(model=classifier, batch_size=2, tokenizer=tokenizer if own else None)
        asked, forward = [], reward.model.forward
        monkeypatch.setattr(
            reward.model, "forward", lambda i, m: asked.append(tuple(i.shape)) or forward(i, m)
        )
        scores, _, _ = RewardSet(reward, tokenizer)(rollout)
        expected = torch.tensor([score(classifier, [3, *ids]) for ids in rows])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert len(expected.unique()) == 7
        assert asked == [(2, 3), (2, 5), (2, 8), (1, 10)]  # no wider than its longest

    def test_they_are_frozen_and_free_of_dropout(self, classifier):
        reward = ModelReward(model=classifier.train())
        assert not reward.model.training
        assert not any(p.requires_grad for p in reward.model.parameters())

    def test_another_tokenizer_is_scored_through_text(self, tokenizer, rollout, classifier):
        """Its ids run the other way; the end of the response is its own end token."""
        other = word_tokenizer(WORDS[::-1])
        rewards = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)
        scores, _, _ = rewards(finished(rollout, prompt=["hi there ", "how are you "]))
        texts = ["hi there fine thanks", "how are you fine"]
        expected = [score(classifier, [*other.encode(t), other.eos_token_id]) for t in texts]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
        assert rewards.same_tokenizer() == []
        assert len(rewards.models()) == 1

    @pytest.mark.parametrize("other", [{"adds_eos": True}, {"eos": None}], ids=str)
    def test_the_end_is_put_once_and_only_where_there_is_one(
        self, tokenizer, rollout, classifier, other
    ):
        theirs = word_tokenizer(WORDS[::-1], **other)
        rewards = RewardSet(ModelReward(model=classifier, tokenizer=theirs), tokenizer)
        scores, _, _ = rewards(finished(rollout, prompt=["", "hi "]))
        expected = [score(classifier, theirs.encode(t)) for t in ("fine thanks", "hi fine")]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("adds_eos", [False, True])
    def test_messages_go_through_its_own_template(self, tokenizer, rollout, classifier, adds_eos):
        """The template says where a turn ends; the tokenizer adds nothing to it."""
        other = word_tokenizer(WORDS[::-1], adds_eos=adds_eos)
        other.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
        chats = [[{"role": "user", "content": text}] for text in ("hi there", "how are you")]
        rewards = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)
        scores, _, _ = rewards(finished(rollout, prompt=chats))
        texts = ["hi there </s> fine thanks </s>", "how are you </s> fine </s>"]
        rows = [other.encode(text, add_special_tokens=False) for text in texts]
        expected = [score(classifier, row) for row in rows]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("adds_eos", [False, True])
    @pytest.mark.parametrize("truncated", [[False, True], [True, False], [True, True]])
    def test_a_truncated_response_is_not_ended(
        self, tokenizer, rollout, classifier, adds_eos, truncated
    ):
        theirs = word_tokenizer(WORDS[::-1], adds_eos=adds_eos)
        rewards = RewardSet(ModelReward(model=classifier, tokenizer=theirs), tokenizer)
        columns = {"prompt": ["hi there ", "how are you "]}
        cut = replace(rollout, columns=columns, truncated=torch.tensor(truncated))
        scores, _, _ = rewards(cut)
        texts = ["hi there fine thanks", "how are you fine"]
        rows = [theirs.encode(text, add_special_tokens=False) for text in texts]
        ends = [[] if row else [theirs.eos_token_id] for row in truncated]
        expected = [score(classifier, row + end) for row, end in zip(rows, ends, strict=True)]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("content", ["m['content']", "m['content'] | trim"])
    def test_nor_is_its_turn_in_a_dialogue(self, tokenizer, rollout, classifier, content):
        """Also where nothing but a special token was drawn: then its turn has begun, no more."""
        other = word_tokenizer([*WORDS[::-1], "<end>"])
        other.chat_template = "{% for m in messages %}: {{ " + content + " }} <end> {% endfor %}"
        chats = [[{"role": "user", "content": "how are"}]] * 2
        special = rollout.input_ids.clone()
        special[0, 2:] = tokenizer.eos_token_id
        cut = replace(rollout, input_ids=special, columns={"prompt": chats}, truncated=TRUE)
        scores, _, _ = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)(cut)
        texts = [": how are <end> :", ": how are <end> : fine"]
        expected = [score(classifier, other.encode(text)) for text in texts]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)

    def test_a_score_that_is_not_finite_is_not_taken_for_none(self, tokenizer, rollout, classifier):
        nn.init.constant_(classifier.score.weight, torch.nan)
        with pytest.raises(ValueError, match="'reward_model' returned nan for sample 0"):
            RewardSet(classifier, tokenizer)(rollout)

    def test_weights_are_shared(self, classifier):
        model = as_reward_model(classifier)
        assert model.score.weight is classifier.score.weight
        assert model.state_dict().keys() == classifier.state_dict().keys()
        assert model.backbone is classifier.model
        assert as_reward_model(model) is model

    def test_a_bias_counts(self):
        classifier = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))
        classifier.score = nn.Linear(16, 1, bias=True)
        nn.init.constant_(classifier.score.bias, 5.0)
        got = as_reward_model(classifier)(torch.tensor([[3, 4]]), torch.ones(1, 2))
        assert got.item() == pytest.approx(score(classifier, [3, 4]), abs=1e-5)

    def test_any_classifier_will_do(self, tokenizer, rollout, bert):
        """Its own forward says what it thinks of each sequence, alone and unpadded."""
        rewards = RewardSet(bert, tokenizer)
        scores, _, _ = rewards(rollout)
        rows = [p + c for p, c in zip(rollout.prompts(), rollout.completions(), strict=True)]
        expected = torch.tensor([score(bert, row) for row in rows])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert abs(expected[0] - expected[1]) > 1e-3
        assert rewards.same_tokenizer() == []  # a critic cannot be made of it
        assert not any(p.requires_grad for p in bert.parameters())
        assert rewards.to("meta").models()[0].model.device.type == "meta"

    def test_any_classifier_reads_text_with_its_own_tokenizer(self, tokenizer, rollout, bert):
        other = word_tokenizer(sorted(WORDS), adds_eos=True)
        reward = ModelReward(model=bert, tokenizer=other)
        scores, _, _ = RewardSet(reward, tokenizer)(finished(rollout, prompt=["hi ", "you "]))
        texts = ["hi fine thanks", "you fine"]
        expected = torch.tensor([score(bert, other.encode(text)) for text in texts])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)

    def test_a_classifier_knows_its_own_padding(self, bert):
        """Whatever stands under the mask, the model sees the padding it was trained with."""
        seen = []
        bert.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
        )
        as_scorer(bert)(torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, False]]))
        assert seen == [[[3, 4, 19]]]

    def test_more_than_a_classifier_reads_is_named(self, bert):
        with pytest.raises(ValueError, match=r"takes 13 tokens, BertForSeq.* at most 12; lower"):
            as_scorer(bert)(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13))
        assert as_scorer(bert)(torch.zeros(1, 12, dtype=torch.long), torch.ones(1, 12)).shape == (
            1,
        )

    def test_a_classifier_without_values_is_no_critic(self, bert):
        message = r"got BertForSeq\w+, which scores sequences as a whole; a critic needs a value at"
        with pytest.raises(ValueError, match=message):
            as_reward_model(bert, "critic")

    def test_what_scores_nothing_is_no_critic_either(self):
        with pytest.raises(ValueError, match="critic: got Linear, a critic needs a value at every"):
            as_reward_model(nn.Linear(2, 1), "critic")

    def test_several_labels_of_any_classifier_are_refused(self):
        with pytest.raises(ValueError, match="has 2 labels, expected 1"):
            ModelReward(model=BertForSequenceClassification(BertConfig(**BERT, num_labels=2)))

    def test_several_labels_are_refused(self):
        classifier = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3))
        with pytest.raises(ValueError, match=r"has 3 labels, expected 1; write a function"):
            ModelReward(model=classifier)

    def test_another_module_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="reward: got Linear, expected a RewardModel"):
            RewardSet(nn.Linear(2, 1), tokenizer)


class TestRewardSet:
    def test_names(self, tokenizer, classifier):
        class Judge:
            def __call__(self, **_):
                return []

        rewards = RewardSet(
            [fine, Judge(), ModelReward(model=classifier, name="helpful"), partial(fine)], tokenizer
        )
        assert rewards.names == ["fine", "Judge", "helpful", "partial"]
        assert reward_name(ModelReward(model=classifier)) == "reward_model"

    def test_names_must_differ(self, tokenizer):
        with pytest.raises(ValueError, match=r"names must differ.*\['fine', 'fine'\]"):
            RewardSet([fine, (fine, 2.0)], tokenizer)

    @pytest.mark.parametrize("name", [*sorted(RESERVED), "kl/mine"])
    def test_names_of_other_metrics_are_refused(self, tokenizer, classifier, name):
        named = ModelReward(model=classifier, name=name)
        with pytest.raises(ValueError, match=f"{name!r} cannot be .*another name=.*perplexity"):
            RewardSet([fine, named], tokenizer)

    def test_reserved_is_all_that_is_reported_beside_rewards(self, rollout):
        ones = torch.ones(2, 3)
        names = ("logprobs", "ref_logprobs", "sampler_logprobs", "entropies", "values")
        annotated = replace(rollout, **dict.fromkeys((*names, "advantages", "returns"), ones))
        described = {name.split("/")[0] for name in rollout_metrics(annotated)}
        assert described == RESERVED

    def test_none_at_all_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match="got an empty list"):
            RewardSet([], tokenizer)

    def test_what_cannot_be_called_is_refused(self, tokenizer):
        with pytest.raises(TypeError, match="reward: got 5, expected a reward model"):
            RewardSet([5], tokenizer)

    def test_models_are_moved(self, tokenizer):
        backbone = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1)).model
        rewards = RewardSet([RewardModel(backbone, ValueHead(16)), fine], tokenizer).to("meta")
        assert rewards.models()[0].device.type == "meta"
        assert rewards.same_tokenizer() == rewards.models()
