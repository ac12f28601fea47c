"""The policy and its reference model, whatever they are made of; dropout and checkpointing."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from mossrlhf.loading.policy import (
    checkpoint_activations,
    count_parameters,
    disable_dropout,
    load_policy,
    load_reference,
)
from mossrlhf.models import share_base
from mossrlhf.models.lora import as_reference

IDS = torch.arange(5, 12)[None]
LORA = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
MERGED = "model: its adapter is merged into its base"
COPIED = "ref_model: got None, and the policy's adapter already"


def lora(**options):
    return LoraConfig(**{**LORA, "r": 2, "target_modules": ["q_proj"], **options})


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def disturb(model):
    """Move what is trained, so that it has an effect."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


@pytest.fixture
def base(policy, tmp_path):
    """A language model that knows the folder it was loaded from."""
    policy().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


@pytest.fixture
def sft(base, policy, tmp_path) -> tuple[Path, torch.Tensor]:
    """The folder of a trained adapter, whose base model is in another folder, and its logits."""
    model = get_peft_model(base, LoraConfig(**LORA))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "sft")
    expected = logits(model)
    assert (expected - logits(policy())).abs().max() > 1e-2
    return tmp_path / "sft", expected


@pytest.mark.parametrize("given", ["folder", "model"])
def test_load_policy_merges_a_trained_adapter_under_a_new_one(sft, given):
    folder, expected = sft
    model = folder
    if given == "model":
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        model = PeftModel.from_pretrained(base, folder)
    with pytest.warns(UserWarning, match=MERGED):
        made = load_policy(model, LoraConfig(**LORA))
    assert load_reference(None, made) is None
    torch.testing.assert_close(logits(made), expected)
    for name, weight in made.named_parameters():
        assert weight.requires_grad == ("lora_" in name), name
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    assert (logits(made) - expected).abs().max() > 1e-2
    with as_reference(None, made) as reference:
        torch.testing.assert_close(logits(reference), expected)


def test_load_policy_replaces_a_fresh_adapter_without_a_warning(policy):
    made = load_policy(get_peft_model(policy(), LoraConfig(**LORA)), LoraConfig(**LORA))
    assert load_reference(None, made) is None
    torch.testing.assert_close(logits(made), logits(policy()))


@pytest.mark.parametrize("given", ["folder", "model"])
def test_a_trained_adapter_is_trained_further_with_a_copied_reference(sft, given):
    folder, expected = sft
    model = str(folder)
    if given == "model":
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    made = load_policy(model)
    assert isinstance(made, PeftModel)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(adapters(made))
    with pytest.warns(UserWarning, match=COPIED):
        reference = load_reference(None, made)
    for weight in made.parameters():
        if weight.requires_grad:
            torch.nn.init.ones_(weight)
    with as_reference(reference, made) as model:
        torch.testing.assert_close(logits(model), expected)
    assert not any(p.requires_grad for p in reference.parameters())


def test_the_first_kl_of_a_trained_adapter_is_zero(make, sft, tmp_path):
    folder, _ = sft
    with pytest.warns(UserWarning, match=COPIED):
        trainer = make(model=str(folder))
    rollout = trainer.annotate(trainer.collect())
    shift = (rollout.logprobs - rollout.ref_logprobs)[rollout.mask]
    torch.testing.assert_close(shift, torch.zeros_like(shift), atol=1e-6, rtol=0)
    before = adapters(trainer.policy)
    trainer.train()
    after = adapters(trainer.policy)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    trainer.policy.save_pretrained(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    torch.testing.assert_close(adapters(again), after)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.parent / "base")


def test_load_policy_refuses_a_frozen_adapter(sft):
    folder, _ = sft
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    for model in (
        PeftModel.from_pretrained(base, folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        with pytest.raises(ValueError, match=r"is_trainable=True, pass its folder as model="):
            load_policy(model)


def test_load_policy_does_not_replace_an_adapter_added_by_transformers(sft):
    folder, _ = sft
    with pytest.raises(ValueError, match="pass the adapter's folder as model="):
        load_policy(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))


def test_load_policy_does_not_replace_an_adapter_that_cannot_be_merged(policy):
    prefix = get_peft_model(
        policy(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match=r"cannot be merged.*leave peft_config=None"):
        load_policy(prefix, LoraConfig(**LORA))


def test_load_policy_initializes_adapters_by_the_seed_alone(policy):
    first = adapters(load_policy(policy(), LoraConfig(**LORA), seed=3))
    model = policy()
    torch.rand(7)
    state = torch.get_rng_state()
    again = adapters(load_policy(model, LoraConfig(**LORA), seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    other = adapters(load_policy(policy(), LoraConfig(**LORA), seed=4))
    assert any(not torch.equal(other[name], first[name]) for name in first)


def test_load_reference_copies_a_model_that_shares_trained_weights(policy):
    """The unwrapped model is the same object, adapters included."""
    base = policy()
    made = load_policy(base, LoraConfig(**LORA))
    trained = [p for p in made.parameters() if p.requires_grad]
    reference = load_reference(base, made)
    assert all(p.requires_grad for p in trained)
    for weight in trained:
        torch.nn.init.ones_(weight)
    torch.testing.assert_close(logits(reference), logits(policy()))


def test_load_reference_copies_a_policy_whose_base_was_rewritten(base):
    policy = load_policy(base, lora(init_lora_weights="pissa"))
    with pytest.warns(UserWarning, match="init_lora_weights='pissa'.*leave init_lora_weights at"):
        assert load_reference(None, policy) is not None


def test_load_reference_copies_a_policy_whose_biases_are_trained(policy):
    adapted = load_policy(policy(0, attention_bias=True), lora(bias="lora_only"))
    before = adapted(IDS).logits.detach()
    with pytest.warns(UserWarning, match=r"trained besides its adapter \(.*bias.*leave bias='none"):
        reference = load_reference(None, adapted)
    disturb(adapted)
    with as_reference(reference, adapted) as model:
        assert torch.equal(model(IDS).logits, before)
    assert not torch.equal(adapted(IDS).logits, before)
    with pytest.raises(ValueError, match=r"critic: .* trained besides the policy's own"):
        share_base(adapted, lora(), "critic")


def test_save_policy_writes_an_adapter_of_any_name_where_peft_looks(make, base, tmp_path):
    bare = copy.deepcopy(base)
    trainer = make(model=get_peft_model(base, lora(), adapter_name="mine"), critic=lora())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(bare, str(tmp_path / "saved" / "policy"))
    torch.testing.assert_close(loaded(IDS).logits, trainer.policy.eval()(IDS).logits)
    assert not (tmp_path / "saved" / "policy" / "mine").exists()


def test_disable_dropout_reaches_modules_and_the_numbers_of_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.dropout = 0.3, nn.Dropout(0.2)

    model = nn.Sequential(Attention())
    disable_dropout(model)
    assert (model[0].attention_dropout, model[0].dropout.p) == (0.0, 0.0)


def test_checkpointed_adapters_on_a_frozen_base_get_gradients(policy):
    made = load_policy(policy(), LoraConfig(**LORA)).train()
    made(input_ids=IDS).logits.sum().backward()
    expected = {n: p.grad.clone() for n, p in made.named_parameters() if p.requires_grad}
    made.zero_grad()
    checkpoint_activations(made)
    made(input_ids=IDS).logits.sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(made.named_parameters())[name].grad, gradient)


def test_count_parameters_tells_size_type_and_device(policy):
    made = load_policy(policy(), LoraConfig(**LORA))
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    total = sum(p.numel() for p in made.parameters())
    described = f"PeftModelForCausalLM, {total:,} parameters, {trained:,} trained, float32, cpu"
    assert count_parameters(made) == described
    assert count_parameters(None) == "none"
