"""What adapters may not do to a base that several roles share, and critics that must be saved."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mossrlhf import RewardModel, ValueHead
from mossrlhf.models import SharedRewardModel, add_adapters, load_shared, save_adapters, share_base
from mossrlhf.models.adapters import adapter_parameters
from mossrlhf.models.beneath import checksums
from mossrlhf.roles import as_reference, load_critic, load_policy, load_reference, vocabulary_size

WHOLE = dict(modules_to_save=["embed_tokens"])
TOKENS = dict(trainable_token_indices=[1, 2])
TABLE = dict(target_modules=["q_proj", "embed_tokens"])
IDS = torch.arange(1, 9)[None]
MASK = torch.ones_like(IDS)


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def disturb(model, seed=0):
    """Move what is trained, so that it says something."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


@pytest.fixture
def base(policy, tmp_path):
    """A language model that knows where it came from."""
    policy(0).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def scorer(base, tmp_path):
    """Folders of reward adapters over that base."""
    bare = copy.deepcopy(base)

    def write(seed):
        model = RewardModel.from_language_model(bare)
        add_adapters(model, lora(task_type=None))
        disturb(model, seed)
        save_adapters(model, tmp_path / f"reward-{seed}")
        return tmp_path / f"reward-{seed}"

    return write


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "OLoRA"])
def test_a_shared_base_is_not_rewritten(base, name):
    policy = load_policy(base, lora())
    before = checksums(dict(policy.named_parameters()))
    config = lora(init_lora_weights=name)
    with pytest.raises(ValueError, match=r"critic: got init_lora_weights=.*leave init_lora_weig"):
        share_base(policy, config, "critic")
    assert checksums(dict(policy.named_parameters())) == before


def test_whatever_else_rewrites_it_is_noticed(base, monkeypatch):
    policy = load_policy(base, lora())
    monkeypatch.setattr("mossrlhf.models.beneath._REWRITING", ("unknown",))
    with pytest.raises(ValueError, match=r"has changed the base it shares .*q_proj"):
        share_base(policy, lora(init_lora_weights="pissa"), "critic")


def test_a_policy_that_rewrites_its_base_is_told_how_not_to(base):
    policy = load_policy(base, lora(init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match="init_lora_weights='pissa'.*leave init_lora_weights as"):
        assert load_reference(None, policy) is not None


def test_biases_that_are_trained_do_not_move_the_reference(policy):
    adapted = load_policy(policy(0, attention_bias=True), lora(bias="lora_only"))
    before = adapted(IDS).logits.detach()
    with pytest.warns(UserWarning, match=r"trained beneath its adapter \(.*bias.*leave bias='none"):
        reference = load_reference(None, adapted)
    disturb(adapted)
    with as_reference(reference, adapted) as asked:
        assert torch.equal(asked(IDS).logits, before)
    assert not torch.equal(adapted(IDS).logits, before)
    with pytest.raises(ValueError, match=r"critic: .* trained beneath the policy's own"):
        share_base(adapted, lora(), "critic")


@pytest.mark.parametrize("options", [WHOLE, TOKENS, TABLE])
def test_the_vocabulary_is_counted_through_wrappers(base, options):
    size = base.get_input_embeddings().num_embeddings
    assert vocabulary_size(load_policy(base, lora(**options))) == size


@pytest.mark.parametrize("options", [{}, WHOLE, TOKENS, TABLE])
@pytest.mark.parametrize("kind", ["head", "adapter"])
def test_a_critic_beside_wrappers_is_saved_and_loaded(base, tmp_path, options, kind):
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
    if kind == "adapter":  # by its own, and not by the policy's tokens
        for name, weight in adapter_parameters(policy, critic.adapter).items():
            if "lora_B" in name:
                weight.data.zero_()
        bare.score = critic.score
        torch.testing.assert_close(critic.token_values(IDS, MASK), bare.token_values(IDS, MASK))


@pytest.mark.parametrize("options", [TOKENS, WHOLE])
def test_such_a_trainer_trains_to_its_end(make, base, options, tmp_path):
    trainer = make(model=base, peft_config=lora(**options), critic=lora())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert len(trainer.history) == 2


def test_a_head_that_cannot_be_saved_is_refused(base):
    with pytest.raises(ValueError, match=r"critic: .*no place for its head's bias.*ValueHead\(16"):
        load_critic(ValueHead(16, bias=True), base, [])
    backbone = RewardModel.from_language_model(base).backbone
    with pytest.raises(ValueError, match=r"critic: .*no place for its head's bias"):
        load_critic(RewardModel(backbone, ValueHead(16, bias=True)), base, [])
    with pytest.raises(ValueError, match=r"head: it reads 17 .* have 16; pass ValueHead\(16\)"):
        load_critic(ValueHead(17), base, [])


def test_what_saving_raises_does_not_hide_the_cause(make, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("the cause")

    def unsaved(*_):
        raise ValueError("cannot be saved")

    trainer = make()
    trainer.run.state.global_step = 1
    monkeypatch.setattr(trainer, "score", fail)
    monkeypatch.setattr("mossrlhf.shutdown.save_checkpoint", unsaved)
    monkeypatch.setattr("mossrlhf.shutdown.is_saved", lambda _: False)
    with pytest.raises(KeyError, match="the cause"):
        trainer.train()
    assert "Nothing could be saved: ValueError: cannot be saved" in capsys.readouterr().out


def test_adapters_that_judge_share_the_base_and_leave(make, base, scorer):
    judges, other, asked = [scorer(1), scorer(2)], scorer(3), [{"prompt": "1"}]
    trainer = make(model=base, peft_config=lora(), reward=judges, eval_dataset=asked)
    assert trainer.rewards.names == ["reward_model", "reward_model_2"]
    kept = trainer.rewards.same_tokenizer()
    assert [model.adapter for model in kept] == ["reward_model", "reward_model_2"]
    first = [model(IDS, MASK).item() for model in kept]
    assert first[0] != first[1]
    before = {n: (p, p.requires_grad) for n, p in trainer.policy.named_parameters()}
    asked = trainer.evaluate(rewards=str(other))
    told = trainer.evaluate()
    assert asked["eval/reward_model/policy"] != told["eval/reward_model/policy"]
    after = {n: (p, p.requires_grad) for n, p in trainer.policy.named_parameters()}
    assert {n: id(p) for n, (p, _) in before.items()} == {n: id(p) for n, (p, _) in after.items()}
    assert [flag for _, flag in before.values()] == [flag for _, flag in after.values()]
    assert [model(IDS, MASK).item() for model in kept] == first
    theirs = trainer.evaluate(rewards=load_shared(trainer.policy, other, "theirs"))
    assert asked["eval/reward_model/policy"] == pytest.approx(theirs["eval/reward_model/policy"])
    trainer.train()


def test_two_adapters_of_one_name_are_told_apart(base, scorer):
    policy = load_policy(base, lora())
    made = [load_shared(policy, scorer(seed), "judge") for seed in (1, 2)]
    assert all(isinstance(model, SharedRewardModel) for model in made)
    assert [model.adapter for model in made] == ["judge", "judge_2"]


def test_a_policy_s_adapter_of_any_name_is_saved_where_peft_looks(make, base, tmp_path):
    bare = copy.deepcopy(base)
    trainer = make(model=get_peft_model(base, lora(), adapter_name="mine"), critic=lora())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "saved" / "policy"))
    torch.testing.assert_close(loaded(IDS).logits, trainer.policy.eval()(IDS).logits)
    assert not (tmp_path / "saved" / "policy" / "mine").exists()
