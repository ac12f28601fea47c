"""Critics and rewards, whatever they are made of."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from mossrlhf import RewardModel, ValueHead
from mossrlhf.loading.critic import load_critic, load_reward
from mossrlhf.loading.policy import load_policy
from mossrlhf.models import add_adapters, load_shared, save_adapters
from mossrlhf.models.lora import adapter_parameters
from mossrlhf.rewards import ModelReward

IDS = torch.arange(1, 9)[None]
MASK = torch.ones_like(IDS)
WHOLE = dict(modules_to_save=["embed_tokens"])
TOKENS = dict(trainable_token_indices=[1, 2])
TABLE = dict(target_modules=["q_proj", "embed_tokens"])


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def disturb(model, seed=0):
    """Move what is trained, so that it has an effect."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def bert(size, **options):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, num_labels=1, initializer_range=0.5, **options,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def base(policy, tmp_path):
    """A language model that knows the folder it was loaded from."""
    policy(0).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def scorer(base, tmp_path):
    """Writes reward adapters, trained on that base model, to folders."""
    bare = copy.deepcopy(base)

    def write(seed):
        model = RewardModel.from_language_model(bare)
        add_adapters(model, lora(task_type=None))
        disturb(model, seed)
        save_adapters(model, tmp_path / f"reward-{seed}")
        return tmp_path / f"reward-{seed}"

    return write


def test_load_critic_copies_an_adapted_policy_with_its_adapter_merged(policy):
    made = load_policy(policy(), lora(init_lora_weights=False))
    critic = load_critic(None, made, [])
    with torch.no_grad():
        hidden = made(IDS, output_hidden_states=True).hidden_states[-1]
        got = critic.backbone(IDS).last_hidden_state
    torch.testing.assert_close(got, hidden)


@pytest.mark.parametrize("given", ["folder", "model"])
@pytest.mark.parametrize("alike", [True, False])
def test_load_reward_takes_any_classifier(make, world, tmp_path, given, alike):
    tokenizer = world.tokenizer()
    if not alike:
        tokenizer.add_tokens(["<only here>"])
    model = bert(len(tokenizer))
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    reward = tmp_path / "bert"
    if given == "model":
        reward = BertForSequenceClassification.from_pretrained(reward)
    loaded = load_reward(reward, world.tokenizer())
    assert isinstance(loaded, ModelReward)
    assert (loaded.tokenizer is None) == alike
    if alike:
        rollout = (trainer := make(reward=reward)).collect()
        with torch.no_grad():
            expected = model(rollout.input_ids, rollout.attention_mask.long()).logits[:, 0]
        torch.testing.assert_close(trainer.score(rollout).scores, expected)
        assert trainer.critic.score.weight.count_nonzero() == 0  # on the policy's backbone


def test_load_reward_makes_a_reward_model_of_a_score_head(make, world, reward_model, tmp_path):
    reward_model().save_pretrained(tmp_path / "rm")
    world.tokenizer().save_pretrained(tmp_path / "rm")
    loaded = load_reward(str(tmp_path / "rm"), world.tokenizer())
    assert isinstance(loaded.model, RewardModel)
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6)
    torch.testing.assert_close(loaded.model(ids, mask), reward_model()(ids, mask))
    assert LlamaForSequenceClassification.from_pretrained(tmp_path / "rm").num_labels == 1


def test_load_critic_refuses_a_classifier_without_values(make, world):
    with pytest.raises(ValueError, match="critic: got BertForSequenceClassification, which"):
        make(critic=bert(len(world.tokenizer())))


@pytest.mark.parametrize("options", [{}, WHOLE, TOKENS, TABLE])
@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_a_critic_on_a_base_with_wrappers_is_saved_and_loaded(base, tmp_path, options, kind):
    bare = RewardModel.from_language_model(base)
    policy = load_policy(base, lora(**options))
    critic = load_critic(ValueHead(16, zero=False) if kind == "head" else lora(), policy, [])
    disturb(policy, 1)
    disturb(critic, 2)
    expected = critic.token_values(IDS, MASK)
    critic.save_pretrained(tmp_path / "critic", scores=False)
    critic.merged().save_pretrained(tmp_path / "merged", scores=False)
    merged = RewardModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.token_values(IDS, MASK), expected)
    loaded = load_critic(tmp_path / "critic", policy, [])
    torch.testing.assert_close(loaded.token_values(IDS, MASK), expected)
    torch.testing.assert_close(critic.token_values(IDS, MASK), expected)
    if kind == "adapter":  # through its own adapter, without the policy's tokens
        for name, weight in adapter_parameters(policy, critic.adapter).items():
            if "lora_B" in name:
                weight.data.zero_()
        bare.score = critic.score
        torch.testing.assert_close(critic.token_values(IDS, MASK), bare.token_values(IDS, MASK))


def test_load_critic_refuses_a_head_that_cannot_be_saved(base):
    with pytest.raises(ValueError, match=r"critic: .*no place for its head's bias.*ValueHead\(16"):
        load_critic(ValueHead(16, bias=True), base, [])
    backbone = RewardModel.from_language_model(base).backbone
    with pytest.raises(ValueError, match=r"critic: .*no place for its head's bias"):
        load_critic(RewardModel(backbone, ValueHead(16, bias=True)), base, [])
    with pytest.raises(ValueError, match=r"head: it reads 17 .* have 16; pass ValueHead\(16\)"):
        load_critic(ValueHead(17), base, [])


def test_rewards_of_one_evaluation_leave_no_adapter_on_the_policy(make, base, scorer):
    rewards, other, prompts = [scorer(1), scorer(2)], scorer(3), [{"prompt": "1"}]
    trainer = make(model=base, peft_config=lora(), reward=rewards, eval_dataset=prompts)
    assert trainer.rewards.names == ["reward_model", "reward_model_2"]
    kept = trainer.rewards.same_tokenizer()
    assert [model.adapter for model in kept] == ["reward_model", "reward_model_2"]
    first = [model(IDS, MASK).item() for model in kept]
    assert first[0] != first[1]
    before = {n: (p, p.requires_grad) for n, p in trainer.policy.named_parameters()}
    once = trainer.evaluate(rewards=str(other))
    own = trainer.evaluate()
    assert once["eval/reward_model/policy"] != own["eval/reward_model/policy"]
    after = {n: (p, p.requires_grad) for n, p in trainer.policy.named_parameters()}
    assert {n: id(p) for n, (p, _) in before.items()} == {n: id(p) for n, (p, _) in after.items()}
    assert [flag for _, flag in before.values()] == [flag for _, flag in after.values()]
    assert [model(IDS, MASK).item() for model in kept] == first
    theirs = trainer.evaluate(rewards=load_shared(trainer.policy, other, "theirs"))
    assert once["eval/reward_model/policy"] == pytest.approx(theirs["eval/reward_model/policy"])
    trainer.train()
