"""Four roles on one base model compute and learn what they do with one base model each."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rollouts import recorded_rollout
from torch import nn
from transformers import AutoModelForCausalLM

from mossrlhf import PPOMaxLoss, RewardModel, ValueHead
from mossrlhf.loading.critic import load_critic
from mossrlhf.loading.policy import checkpoint_activations, load_policy
from mossrlhf.models import (
    ActorCritic,
    SharedRewardModel,
    active_adapter,
    add_adapters,
    load_shared,
    save_adapters,
    share_base,
)
from mossrlhf.models.lora import adapter_parameters, as_reference, checksums

POLICY = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
CRITIC = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
REWARD = LoraConfig(r=3, target_modules=["k_proj"], lora_dropout=0.0)


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def disturb(module, seed):
    """Give adapters weights with an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name or name.startswith("score"):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)


def alone(base, config, seed, folder=None):
    """Return a reward model with its own base model; write its adapter to a folder."""
    model = RewardModel.from_language_model(base)
    add_adapters(model, config)
    disturb(model, seed)
    if folder is not None:
        save_adapters(model, folder)
    return model


@pytest.fixture
def base(policy):
    return policy(0, num_hidden_layers=2)


@pytest.fixture
def separate(base, tmp_path):
    """Policy, critic and reward model, each with its own base model."""
    policy = get_peft_model(copy.deepcopy(base), copy.deepcopy(POLICY))
    disturb(policy, 1)
    critic = alone(base, CRITIC, 2, tmp_path / "critic")
    reward = alone(base, REWARD, 3, tmp_path / "reward")
    return policy, critic, reward


@pytest.fixture
def together(base, separate, tmp_path):
    """The same on one base model."""
    policy = get_peft_model(copy.deepcopy(base), copy.deepcopy(POLICY))
    disturb(policy, 1)
    critic = load_shared(policy, tmp_path / "critic", "critic")
    reward = load_shared(policy, tmp_path / "reward", "reward").requires_grad_(False)
    return policy, critic, reward


def gradients(policy, critic, batch, at_once=False):
    """Return the gradients of policy, critic and PTX term."""
    model = ActorCritic(policy, critic).train()
    weights = torch.linspace(-1, 1, int(batch.mask.sum()))
    ptx = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    ptx["labels"] = batch.input_ids.masked_fill(~batch.attention_mask.bool(), -100)
    roles = [
        ("critic", batch, lambda values: (values * weights).sum()),
        ("policy", batch, lambda stats: (stats.logprob * weights).sum()),
        ("ptx", ptx, lambda total, _: total),
    ]
    losses = []
    for role in roles:
        losses.append(model(*role))
        if not at_once:
            losses.pop().backward()
    for loss in losses:  # the critic's after the policy's adapter has been active
        loss.backward()
    return {
        "policy": [p.grad for p in model.trained_parameters("policy")],
        "critic": [p.grad for p in model.trained_parameters("critic")],
    }


def test_each_role_computes_what_it_does_alone(world, separate, together, base):
    batch = recorded_rollout(world)
    ids, mask = batch.input_ids, batch.attention_mask
    for ours, theirs in zip(together[1:], separate[1:], strict=True):
        assert torch.equal(ours(ids, mask), theirs(ids, mask))
    with torch.no_grad(), as_reference(None, together[0]) as reference:
        assert torch.equal(reference(ids).logits, base(ids).logits)
    assert torch.equal(together[0](ids).logits, separate[0](ids).logits)
    scores = [model(ids, mask) for model in together[1:]]
    assert not torch.allclose(*scores, atol=0.1)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_are_those_of_separate_models(world, separate, together, checkpoints, at_once):
    if checkpoints:
        checkpoint_activations(together[0])
        checkpoint_activations(separate[0])
        checkpoint_activations(separate[1].backbone)
    batch = recorded_rollout(world)
    expected = gradients(*separate[:2], batch)
    found = gradients(*together[:2], batch, at_once)
    for role, theirs in expected.items():
        assert len(found[role]) == len(theirs)
        for ours, their in zip(found[role], theirs, strict=True):
            torch.testing.assert_close(ours, their, rtol=1e-5, atol=1e-6)
            assert ours.abs().max() > 0
    assert all(p.grad is None for p in together[2].own_parameters().values())


def test_as_reference_keeps_every_role_trainable(together):
    before = {n: p.requires_grad for n, p in together[0].named_parameters()}
    with as_reference(None, together[0]):
        pass
    assert {n: p.requires_grad for n, p in together[0].named_parameters()} == before
    assert sum(before.values()) == 2 * (2 * 2) * 2  # policy's and critic's: A, B, of two layers


def test_each_parameter_belongs_to_one_role(together):
    policy, critic, reward = together
    model = ActorCritic(policy, critic)
    roles = [{id(p) for p in model.trained_parameters(r)} for r in ("policy", "critic")]
    assert not roles[0] & roles[1]
    own = {id(p) for p in reward.own_parameters().values()}
    assert not own & (roles[0] | roles[1])
    assert set().union(*roles) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(adapter_parameters(policy, "critic")) == 8


def test_the_active_adapter_is_restored_after_an_error(together):
    policy, critic, _ = together
    ids = torch.arange(4, 12)[None]
    before = policy(ids).logits
    with pytest.raises(IndexError):
        critic(ids + 10**6, torch.ones_like(ids))
    with pytest.raises(RuntimeError), active_adapter(policy, None):
        raise RuntimeError
    assert torch.equal(policy(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_of_four_roles_has_one_base_model(make, base, separate, tmp_path, dtype):
    base = base.to(dtype)
    trainer = make(
        model=base, peft_config=POLICY, critic=CRITIC, reward=tmp_path / "reward",
        loss=PPOMaxLoss(), args=dict(gradient_checkpointing=True),
    )  # fmt: skip
    [reward] = trainer.rewards.same_tokenizer()
    assert isinstance(reward, SharedRewardModel)
    backbones = [trainer.policy.base_model.model.model, trainer.critic.backbone, reward.backbone]
    assert all(backbone is backbones[0] for backbone in backbones)
    assert trainer.ref_model is None
    assert not torch.any(torch.cat([p.flatten() for p in trainer.critic.score.parameters()]))

    trained = {
        r: [p.clone() for p in trainer.model.trained_parameters(r)] for r in ("policy", "critic")
    }
    frozen = {n: p.clone() for n, p in trainer.policy.named_parameters() if not p.requires_grad}
    trainer.train()
    for role, before in trained.items():
        after = trainer.model.trained_parameters(role)
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), role
    after = dict(trainer.policy.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())


def test_the_critic_starts_from_the_reward_models_adapter(make, base, separate, tmp_path, world):
    trainer = make(model=base, peft_config=POLICY, reward=tmp_path / "reward")
    assert isinstance(trainer.critic, SharedRewardModel)
    assert trainer.critic.adapter == "critic"
    batch = recorded_rollout(world)
    [reward] = trainer.rewards.same_tokenizer()
    given = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        assert torch.equal(trainer.critic(*given), reward(*given))
        assert torch.equal(reward(*given), separate[2].eval()(*given))
    trainer.train()
    with torch.no_grad():
        assert not torch.equal(trainer.critic(*given), reward(*given))
        torch.testing.assert_close(reward(*given), separate[2](*given))


def test_save_model_writes_the_adapter_of_each_role(make, base, separate, tmp_path, world):
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make(model=loaded, peft_config=POLICY, critic=CRITIC, reward=tmp_path / "reward")
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    names = sorted(
        p.relative_to(tmp_path / "saved").as_posix()
        for p in tmp_path.glob("saved/**/*.safetensors")
    )
    assert names == ["critic/adapter_model.safetensors", "policy/adapter_model.safetensors"]
    batch = recorded_rollout(world)
    given = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        expected = trainer.critic(*given)
        policy = load_policy(tmp_path / "saved" / "policy")
        torch.testing.assert_close(policy(given[0]).logits, trainer.policy(given[0]).logits)
        critic = load_critic(tmp_path / "saved" / "critic", policy, [])
        assert isinstance(critic, SharedRewardModel)
        torch.testing.assert_close(critic(*given), expected)
        whole = RewardModel.from_pretrained(tmp_path / "saved" / "critic")  # with its base model
        torch.testing.assert_close(whole(*given), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trainer.critic.merged()(*given), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trainer.critic(*given), expected)  # merging has changed nothing


def test_resumed_equals_uninterrupted(make, base, separate, tmp_path, parameters):
    def trainer(name, steps=4):
        return make(
            name, model=copy.deepcopy(base), peft_config=POLICY, critic=CRITIC,
            reward=tmp_path / "reward", args=dict(total_steps=steps, save_steps=2),
        )  # fmt: skip

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    assert torch.equal(parameters(resumed.model), parameters(whole.model))
    assert resumed.history[-1]["critic/loss"] == whole.history[-1]["critic/loss"]


@pytest.mark.parametrize("adapted", [True, False])
def test_a_head_without_an_adapter_reads_the_policys_hidden_states(make, base, world, adapted):
    trainer = make(
        model=base, peft_config=POLICY if adapted else None, critic=ValueHead(16),
        reward=world.reward, args=dict(critic_pretrain_steps=1),
    )  # fmt: skip
    assert trainer.model.trained_parameters("critic") == list(trainer.critic.score.parameters())
    before = [p.clone() for p in trainer.model.trained_parameters("policy")]
    trainer.pretrain_critic()
    after = trainer.model.trained_parameters("policy")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(p.grad is None for p in after)  # none is left for the policy's first step
    assert trainer.critic.score.weight.abs().max() > 0
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_head_without_an_adapter_sends_its_gradient_to_the_policy(world, base):
    """The policy's gradient is the sum of its own and the value loss's."""
    batch = recorded_rollout(world)
    weights = torch.linspace(-1, 1, int(batch.mask.sum()))
    head = ValueHead(16)
    nn.init.normal_(head.weight)
    model = ActorCritic(base, load_critic(head, base, []))
    losses = {
        "critic": lambda values: (values * weights).sum(),
        "policy": lambda stats: (stats.logprob * weights).sum(),
    }

    def gradient(*roles):
        model.zero_grad(set_to_none=False)
        for role in roles:
            model(role, batch, losses[role]).backward()
        found = [p.grad for p in model.trained_parameters("policy")]
        return torch.cat([g.flatten().clone() for g in found if g is not None])

    gradient("critic", "policy")  # from here on every parameter has a gradient, if only zero
    critic, policy = gradient("critic"), gradient("policy")
    assert critic.norm() > 0
    torch.testing.assert_close(gradient("critic", "policy"), critic + policy)


def test_an_adapter_of_another_base_model_gets_its_own(make, policy, base, separate, tmp_path):
    policy(7, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    alone(other, REWARD, 3, tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"trained on another base .* costs its memory"):
        trainer = make(model=base, peft_config=POLICY, reward=tmp_path / "theirs")
    [reward] = trainer.rewards.same_tokenizer()
    assert not isinstance(reward, SharedRewardModel)
    ids = torch.arange(4, 12)[None]
    expected = alone(other, REWARD, 3).eval()(ids, torch.ones_like(ids))
    torch.testing.assert_close(reward(ids, torch.ones_like(ids)), expected)


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (LoraConfig(modules_to_save=["embed_tokens"]), "critic: got modules_to_save="),
        (LoraConfig(target_modules=["no_such"]), "critic: its adapter cannot stand beside"),
    ],
)
def test_share_base_refuses_adapters_that_do_not_fit(base, critic, message):
    policy = load_policy(base, POLICY)
    with pytest.raises(ValueError, match=message):
        share_base(policy, critic, "critic")


def test_share_base_refuses_a_policy_without_adapters(make, base):
    with pytest.raises(ValueError, match=r"critic: .*Pass peft_config= for the policy too"):
        make(model=base, critic=CRITIC)


def test_freezing_concerns_adapter_and_head_alone(together):
    policy, critic, _ = together
    critic.requires_grad_(False)
    assert [p.requires_grad for p in adapter_parameters(policy, "default").values()] == [True] * 8
    assert not any(p.requires_grad for p in critic.own_parameters().values())
    assert isinstance(critic.score, nn.Linear)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_share_base_refuses_initializations_that_rewrite_the_base_model(base, name):
    policy = load_policy(base, lora())
    before = checksums(dict(policy.named_parameters()))
    config = lora(init_lora_weights=name)
    with pytest.raises(ValueError, match=r"critic: got init_lora_weights=.*leave init_lora_weig"):
        share_base(policy, config, "critic")
    assert checksums(dict(policy.named_parameters())) == before


def test_share_base_notices_a_changed_base_model(base, monkeypatch):
    policy = load_policy(base, lora())
    monkeypatch.setattr("mossrlhf.models.lora._REWRITING", ("unknown",))
    with pytest.raises(ValueError, match=r"has changed the base it shares .*q_proj"):
        share_base(policy, lora(init_lora_weights="pissa"), "critic")


@pytest.mark.parametrize(
    "options", [dict(trainable_token_indices=[1, 2]), dict(modules_to_save=["embed_tokens"])]
)
def test_critics_share_a_base_with_trained_tokens_and_modules(make, base, options, tmp_path):
    trainer = make(model=base, peft_config=lora(**options), critic=lora())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert len(trainer.history) == 2


def test_a_second_adapter_of_one_name_gets_a_number(base, separate, tmp_path):
    policy = load_policy(base, lora())
    made = [load_shared(policy, tmp_path / name, "judge") for name in ("reward", "critic")]
    assert all(isinstance(model, SharedRewardModel) for model in made)
    assert [model.adapter for model in made] == ["judge", "judge_2"]


def test_merging_copies_the_base_model(together):
    """The merged critic is independent of the policy's adapter, which stays active."""
    policy, critic, _ = together
    ids = torch.arange(4, 12)[None]
    mask = torch.ones_like(ids)
    logits, expected = policy(ids).logits, critic(ids, mask)
    merged = critic.merged()
    for parameter in policy.parameters():
        parameter.data += 1.0
    torch.testing.assert_close(merged(ids, mask), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(policy(ids).logits, logits)
