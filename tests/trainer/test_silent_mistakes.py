"""What used to go wrong in silence is right now, or is refused."""

import re

import pytest
import torch
from families import tiny
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, GenerationConfig

from mossrlhf import PPOMaxLoss, RewardModel, Trainer
from mossrlhf.functional import clipped_policy_loss
from mossrlhf.loading.policy import load_reference
from mossrlhf.rewards import RewardSet


def brevity(*, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, RewardModel])
def test_a_reward_model_given_as_a_module_reads_with_its_own_tokenizer(make, world, tmp_path, load):
    """As it does given by the name of its folder."""
    tokenizer = world.tokenizer()
    tokenizer.add_tokens(["<only here>"])
    model = RewardModel.from_language_model(tiny("llama", tokenizer))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "reward")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} help {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "reward")
    by_name = make("name", reward=tmp_path / "reward")
    rollout = by_name.collect()
    by_module = make("module", reward=load.from_pretrained(tmp_path / "reward"))
    expected = by_name.score(rollout).scores
    assert expected.std() > 0
    torch.testing.assert_close(by_module.score(rollout).scores, expected)


def test_a_reward_model_without_a_tokenizer_reads_the_policys_tokens(make, tmp_path, reward_model):
    reward_model().save_pretrained(tmp_path / "reward")
    trainer = make(reward=RewardModel.from_pretrained(tmp_path / "reward"))
    rollout = trainer.collect()
    expected = reward_model()(rollout.input_ids, rollout.attention_mask)
    torch.testing.assert_close(trainer.score(rollout).scores, expected)


@pytest.mark.parametrize("size", [50, 400])
def test_a_reference_of_another_vocabulary_is_refused(make, policy, size):
    message = f"ref_model: its vocabulary has {size} tokens, the policy's 185; it must read"
    with pytest.raises(ValueError, match=message):
        make(ref_model=policy(vocab_size=size))


def test_what_is_no_reference_is_refused(policy):
    with pytest.raises(TypeError, match="ref_model: got False, expected a causal language model"):
        load_reference(False, policy())


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_the_inside_of_an_adapted_model_is_not_taken_for_bare(make, policy, peft_config):
    """In a notebook: a second trainer from the model that a first one has put an adapter into."""
    model = policy()
    first = make("first", model=model, peft_config=lora())
    with pytest.raises(ValueError, match=r"model: it contains an adapter.*policy\.unload\(\)"):
        make("second", model=model, peft_config=peft_config)
    bare = first.policy.unload().requires_grad_(True)
    learn = make("bare", model=bare, peft_config=peft_config)
    assert [p.requires_grad for p in learn.policy.parameters()].count(False) == (
        0 if peft_config is None else sum(1 for _ in policy().parameters())
    )


def test_a_lora_config_serves_models_of_several_families(make, world):
    config = lora()
    for family in ("llama", "phi3"):  # whose layers have other names
        model = tiny(family, world.tokenizer())
        make(family, model=model, reward=brevity, peft_config=config).train()
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_special_tokens_beyond_the_vocabulary_are_refused(make, name):
    config = GenerationConfig(max_new_tokens=4, **{name: 9999})
    with pytest.raises(ValueError, match=f"{name} = 9999, but the model's 185 tokens end at 184"):
        make(generation_config=config)


def test_ends_that_are_none_are_refused(make):
    with pytest.raises(ValueError, match="eos_token_id: got none, expected at least one"):
        make(generation_config=GenerationConfig(max_new_tokens=4, eos_token_id=[]))


# ---- rewards ------------------------------------------------------------------------------------


def test_a_generator_is_read_once(make):
    trainer = make(reward=lambda *, completions: (len(text) for text in completions))
    rollout = trainer.collect()
    texts = trainer.processing_class.batch_decode(rollout.completions(), skip_special_tokens=True)
    assert trainer.score(rollout).scores.tolist() == [len(text) for text in texts]


def test_one_weight_is_not_zero(make, world):
    with pytest.raises(ValueError, match="reward: every weight is 0, so there is nothing to learn"):
        make(model="no/such/model", reward=[(brevity, 0.0)])
    RewardSet([(brevity, 0.0)], world.tokenizer())  # to measure with


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_of_ones_own_are_finite(make, wrong):
    trainer = make()
    with pytest.raises(ValueError, match=r"scores: got \[.*\], expected finite numbers"):
        trainer.step(trainer.collect(), scores=[wrong] * 8)


def test_a_column_that_some_records_lack_is_none_there(make, world):
    """Whoever is dealt out beside them."""
    seen = []

    def noting(*, completions, hint):
        seen.extend(hint)
        return [0.0] * len(completions)

    records = [{"prompt": "help", "hint": "a"}, {"prompt": "me"}]
    trainer = make(reward=noting, train_dataset=records)
    trainer.score(trainer.collect())
    assert sorted(seen, key=str) == [None] * 4 + ["a"] * 4


# ---- losses -------------------------------------------------------------------------------------


class Sharpened(PPOMaxLoss):
    """With an argument of its own, an __init__ of its own, and no interest in entropy."""

    def __init__(self, beta, **options):
        super().__init__(**options)
        object.__setattr__(self, "beta", beta)

    def policy_loss(self, logprob, old_logprob, advantage):
        return clipped_policy_loss(logprob, old_logprob, self.beta * advantage)


def test_a_loss_with_arguments_of_its_own_pre_trains_the_critic_as_any_other(make, parameters):
    own, plain = make("own", loss=Sharpened(2.0)), make("plain")
    for trainer in (own, plain):
        torch.manual_seed(0)
        (metrics,) = trainer.pretrain_critic(1)
        assert "critic/clip_fraction" not in metrics
    assert torch.equal(parameters(own.critic), parameters(plain.critic))
    own.train()
    assert (own.loss.beta, own.loss.value_clip) == (2.0, 0.2)


@pytest.mark.parametrize("method", ["policy_loss", "value_loss"])
@pytest.mark.parametrize("shrink", [torch.mean, lambda loss: loss[:-1], lambda loss: None])
def test_losses_are_per_token(make, method, shrink):
    def reduced(self, *args):
        return shrink(getattr(PPOMaxLoss, method)(self, *args))

    kind = type("Reduced", (PPOMaxLoss,), {method: reduced})
    trainer = make(loss=kind(), args=dict(minibatch_size=8))
    rollout = trainer.collect()
    message = (
        rf"{method}: returned .*, expected one number per token, \({int(rollout.mask.sum())},\)"
    )
    with pytest.raises(ValueError, match=message):
        trainer.step(rollout)


# ---- going on from a checkpoint -----------------------------------------------------------------


def test_a_shaper_without_moments_cannot_go_on_with_moments(make, parameters):
    trainer: Trainer = make(args=dict(total_steps=1))
    trainer.train()
    other = make(shaper=lambda rollout: rollout.mask * rollout.scores[:, None])
    before = parameters(other.model)
    message = re.escape("the checkpoint's shaper holds ['count', 'kl_coef', 'm2', 'mean', 'mo")
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-1")
    assert torch.equal(parameters(other.model), before)
