"""`ModelReward` and its parts, against transformers' own forward on one sequence at a time."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from word_tokenizers import WORDS, word_tokenizer

from mossrlhf.rewards import ModelReward, RewardSet, as_reward_model, as_scorer
from mossrlhf.types import Rollout

BERT = dict(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=19,
    intermediate_size=8, initializer_range=0.5, max_position_embeddings=12,
)  # fmt: skip


@pytest.fixture
def bert():
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=1)).eval()


def finished(rollout, **columns):
    """The same responses, none of them truncated."""
    return replace(rollout, columns=columns, truncated=torch.zeros(2, dtype=torch.bool))


def logit(classifier, ids):
    """The output of transformers for one sequence."""
    with torch.no_grad():
        return classifier.eval()(torch.tensor([ids])).logits.item()


def test_classifier_reads_the_policys_tokens(tokenizer, rollout, classifier):
    reward_set = RewardSet(classifier, tokenizer)
    rewards, _, by_name = reward_set(rollout)
    rows = [p + c for p, c in zip(rollout.prompts(), rollout.completions(), strict=True)]
    expected = torch.tensor([logit(classifier, row) for row in rows])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert list(by_name) == ["reward_model"]
    assert not rewards.requires_grad


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batch_size_changes_no_reward(tokenizer, rollout, classifier, batch_size):
    whole, _, _ = RewardSet(classifier, tokenizer)(rollout)
    reward = ModelReward(model=classifier, batch_size=batch_size)
    parts, _, _ = RewardSet(reward, tokenizer)(rollout)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "policy's tokens"])
def test_rewards_are_in_the_order_of_the_rollout(tokenizer, classifier, own, monkeypatch):
    """The model reads them by length; no order of these lengths is its own inverse."""
    lengths = [4, 9, 2, 7, 1, 6, 3]
    texts = [[WORDS[(row + i) % len(WORDS)] for i in range(n)] for row, n in enumerate(lengths)]
    rows = [tokenizer.convert_tokens_to_ids(text) for text in texts]
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
    shapes, forward = [], reward.model.forward
    monkeypatch.setattr(
        reward.model, "forward", lambda i, m: shapes.append(tuple(i.shape)) or forward(i, m)
    )
    rewards, _, _ = RewardSet(reward, tokenizer)(rollout)
    expected = torch.tensor([logit(classifier, [3, *ids]) for ids in rows])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert len(expected.unique()) == 7
    assert shapes == [(2, 3), (2, 5), (2, 8), (1, 10)]  # no wider than its longest


def test_model_is_frozen_and_in_evaluation_mode(classifier):
    reward = ModelReward(model=classifier.train())
    assert not reward.model.training
    assert not any(p.requires_grad for p in reward.model.parameters())


def test_another_tokenizer_reads_text(tokenizer, rollout, classifier):
    """Its ids are in the opposite order, and the response ends with its own end token."""
    other = word_tokenizer(WORDS[::-1])
    reward_set = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)
    rewards, _, _ = reward_set(finished(rollout, prompt=["hi there ", "how are you "]))
    texts = ["hi there fine thanks", "how are you fine"]
    expected = [logit(classifier, [*other.encode(t), other.eos_token_id]) for t in texts]
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=0)
    assert reward_set.same_tokenizer() == []
    assert len(reward_set.models()) == 1


@pytest.mark.parametrize("other", [{"adds_eos": True}, {"eos": None}], ids=str)
def test_end_token_is_appended_once_if_there_is_one(tokenizer, rollout, classifier, other):
    theirs = word_tokenizer(WORDS[::-1], **other)
    reward_set = RewardSet(ModelReward(model=classifier, tokenizer=theirs), tokenizer)
    rewards, _, _ = reward_set(finished(rollout, prompt=["", "hi "]))
    expected = [logit(classifier, theirs.encode(t)) for t in ("fine thanks", "hi fine")]
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adds_eos", [False, True])
def test_messages_are_rendered_by_the_models_own_template(tokenizer, rollout, classifier, adds_eos):
    """The template ends the turns; the tokenizer adds nothing."""
    other = word_tokenizer(WORDS[::-1], adds_eos=adds_eos)
    other.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in ("hi there", "how are you")]
    reward_set = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)
    rewards, _, _ = reward_set(finished(rollout, prompt=chats))
    texts = ["hi there </s> fine thanks </s>", "how are you </s> fine </s>"]
    rows = [other.encode(text, add_special_tokens=False) for text in texts]
    expected = [logit(classifier, row) for row in rows]
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("truncated", [[False, True], [True, False], [True, True]])
def test_truncated_response_gets_no_end_token(tokenizer, rollout, classifier, adds_eos, truncated):
    theirs = word_tokenizer(WORDS[::-1], adds_eos=adds_eos)
    reward_set = RewardSet(ModelReward(model=classifier, tokenizer=theirs), tokenizer)
    columns = {"prompt": ["hi there ", "how are you "]}
    cut = replace(rollout, columns=columns, truncated=torch.tensor(truncated))
    rewards, _, _ = reward_set(cut)
    texts = ["hi there fine thanks", "how are you fine"]
    rows = [theirs.encode(text, add_special_tokens=False) for text in texts]
    ends = [[] if row else [theirs.eos_token_id] for row in truncated]
    expected = [logit(classifier, row + end) for row, end in zip(rows, ends, strict=True)]
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("content", ["m['content']", "m['content'] | trim"])
def test_truncated_response_does_not_end_its_turn(tokenizer, rollout, classifier, content):
    """Nor if it is a special token alone: then its turn has only begun."""
    other = word_tokenizer([*WORDS[::-1], "<end>"])
    other.chat_template = "{% for m in messages %}: {{ " + content + " }} <end> {% endfor %}"
    chats = [[{"role": "user", "content": "how are"}]] * 2
    special = rollout.input_ids.clone()
    special[0, 2:] = tokenizer.eos_token_id
    cut = replace(
        rollout, input_ids=special, columns={"prompt": chats}, truncated=torch.tensor([True, True])
    )
    rewards, _, _ = RewardSet(ModelReward(model=classifier, tokenizer=other), tokenizer)(cut)
    texts = [": how are <end> :", ": how are <end> : fine"]
    expected = [logit(classifier, other.encode(text)) for text in texts]
    torch.testing.assert_close(rewards, torch.tensor(expected), atol=1e-5, rtol=0)


def test_as_reward_model_shares_the_weights(classifier):
    model = as_reward_model(classifier)
    assert model.score.weight is classifier.score.weight
    assert model.state_dict().keys() == classifier.state_dict().keys()
    assert model.backbone is classifier.model
    assert as_reward_model(model) is model


def test_as_reward_model_keeps_the_bias(classifier):
    classifier.score = nn.Linear(16, 1, bias=True)
    nn.init.constant_(classifier.score.bias, 5.0)
    got = as_reward_model(classifier)(torch.tensor([[3, 4]]), torch.ones(1, 2))
    assert got.item() == pytest.approx(logit(classifier, [3, 4]), abs=1e-5)


def test_bert_classifier_reads_the_policys_tokens(tokenizer, rollout, bert):
    reward_set = RewardSet(bert, tokenizer)
    rewards, _, _ = reward_set(rollout)
    rows = [p + c for p, c in zip(rollout.prompts(), rollout.completions(), strict=True)]
    expected = torch.tensor([logit(bert, row) for row in rows])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert reward_set.same_tokenizer() == []  # it cannot become a critic
    assert not any(p.requires_grad for p in bert.parameters())
    assert reward_set.to("meta").models()[0].model.device.type == "meta"


def test_bert_classifier_reads_text_with_its_own_tokenizer(tokenizer, rollout, bert):
    other = word_tokenizer(sorted(WORDS), adds_eos=True)
    reward = ModelReward(model=bert, tokenizer=other)
    rewards, _, _ = RewardSet(reward, tokenizer)(finished(rollout, prompt=["hi ", "you "]))
    texts = ["hi fine thanks", "you fine"]
    expected = torch.tensor([logit(bert, other.encode(text)) for text in texts])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


def test_classifier_gets_its_own_pad_token(bert):
    """Under the mask the model sees the padding it was trained with."""
    seen = []
    bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    as_scorer(bert)(torch.tensor([[3, 4, 5]]), torch.tensor([[True, True, False]]))
    assert seen == [[[3, 4, 19]]]


def test_sequences_beyond_the_classifiers_context_are_refused(bert):
    with pytest.raises(ValueError, match=r"takes 13 tokens, BertForSeq.* at most 12; lower"):
        as_scorer(bert)(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13))
    rewards = as_scorer(bert)(torch.zeros(1, 12, dtype=torch.long), torch.ones(1, 12))
    assert rewards.shape == (1,)


def test_as_reward_model_refuses_a_bert_classifier_as_critic(bert):
    message = r"got BertForSeq\w+, which scores sequences as a whole; a critic needs a value at"
    with pytest.raises(ValueError, match=message):
        as_reward_model(bert, "critic")


def test_as_scorer_refuses_other_modules():
    with pytest.raises(ValueError, match="reward: got Linear, expected a RewardModel"):
        as_scorer(nn.Linear(2, 1))


def test_as_reward_model_refuses_other_modules_as_critic():
    with pytest.raises(ValueError, match="critic: got Linear, a critic needs a value at every"):
        as_reward_model(nn.Linear(2, 1), "critic")


def test_bert_classifier_with_several_labels_is_refused():
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        ModelReward(model=BertForSequenceClassification(BertConfig(**BERT, num_labels=2)))


def test_classifier_with_several_labels_is_refused(make_classifier):
    with pytest.raises(ValueError, match=r"has 3 labels, expected 1; write a function"):
        ModelReward(model=make_classifier(labels=3))
