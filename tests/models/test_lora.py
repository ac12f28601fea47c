"""PEFT adapters: which is active, what PEFT keeps where, and quantized base models."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rollouts import recorded_rollout
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from mossrlhf import ActorCritic, RewardModel, ToyWorld, ValueHead
from mossrlhf.loading.policy import load_policy
from mossrlhf.models import (
    SharedRewardModel,
    active_adapter,
    add_adapters,
    is_quantized,
    merged_state_dict,
    rewriting_initialization,
    save_adapters,
    share_base,
    weights_digest,
)
from mossrlhf.models.lora import (
    adapter_parameters,
    as_reference,
    checksums,
    forget_quantization,
    plain_layer,
    unwrap_peft,
    vocabulary_size,
)

# bitsandbytes warns that it has found no faster kernels for the CPU.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(4, 12)[None]


@pytest.fixture
def adapted(policy):
    """A PEFT model with two adapters, each with an effect."""
    model = get_peft_model(policy(), LoraConfig(**LORA, init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    return model


@pytest.mark.parametrize("within", [lambda model: model, unwrap_peft])
def test_active_adapter_switches_and_restores(adapted, policy, within):
    """Of a PEFT model or of the model within, as the backbone of a critic is."""
    flags = [p.requires_grad for p in adapted.parameters()]
    before = adapted(IDS).logits
    with active_adapter(within(adapted), None):
        assert torch.equal(adapted(IDS).logits, policy()(IDS).logits)
    with active_adapter(within(adapted), "other"):
        assert [p.requires_grad for p in adapted.parameters()] == flags
        other = adapted(IDS).logits
    assert not torch.allclose(other, before)
    assert torch.equal(adapted(IDS).logits, before)
    assert [p.requires_grad for p in adapted.parameters()] == flags
    adapted.set_adapter("other")
    assert torch.equal(adapted(IDS).logits, other)


def test_active_adapter_keeps_gradients_of_the_reference_after_an_error(adapted):
    flags = [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(IndexError), active_adapter(adapted, None):
        adapted(IDS + 10**6)
    assert [p.requires_grad for p in adapted.parameters()] == flags


def test_active_adapter_switches_off_learned_prompts(policy):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompted = get_peft_model(policy(), config)
    assert prompted(IDS).logits.shape[1] == IDS.shape[1] + 3
    with active_adapter(prompted, None):
        assert torch.equal(prompted(IDS).logits, policy()(IDS).logits)
    assert prompted(IDS).logits.shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize(
    "options",
    [
        dict(modules_to_save=["embed_tokens"]),
        dict(trainable_token_indices=[1, 2]),
        dict(target_modules=["q_proj", "embed_tokens"]),
    ],
)
def test_vocabulary_size_counts_through_wrappers(policy, options):
    size = policy().get_input_embeddings().num_embeddings
    assert vocabulary_size(load_policy(policy(), LoraConfig(**{**LORA, **options}))) == size


def test_rewriting_initializations_are_recognized():
    names = {
        name: rewriting_initialization(LoraConfig(init_lora_weights=name))
        for name in ("pissa", "pissa_niter_4", "olora", "gaussian", True)
    }
    assert names == {
        "pissa": "pissa",
        "pissa_niter_4": "pissa_niter_4",
        "olora": "olora",
        "gaussian": None,
        True: None,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_checksums_change_with_one_number(dtype):
    weights = {"w": torch.arange(12).view(3, 4).to(dtype)}
    before = checksums(weights)
    weights["w"][1, 2] += 1
    assert checksums(weights) != before


def test_weights_digest_ignores_order_and_precision():
    weights = {"a": torch.arange(200.0), "b": torch.ones(3, 3)}
    digest = weights_digest(weights)
    assert weights_digest({name: weights[name].bfloat16() for name in ("b", "a")}) == digest
    assert weights_digest({**weights, "b": 2 * weights["b"]}) != digest
    assert weights_digest({"a": weights["b"], "b": weights["a"]}) != digest


@pytest.fixture
def quantized(policy, tmp_path):
    """Loads the same base model in four bits."""
    pytest.importorskip("bitsandbytes")
    size = dict(hidden_size=128, intermediate_size=128, head_dim=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    policy(0, **size, **heads).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=four_bits, device_map="cpu"
        )

    return load


def packed(model):
    """Return the weights in four bits, two in a byte."""
    return {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}


def test_four_roles_train_on_a_quantized_base_model(make, world, quantized, tmp_path):
    reward = RewardModel.from_language_model(quantized())
    torch.nn.init.normal_(reward.score.weight)
    add_adapters(reward, LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    save_adapters(reward, tmp_path / "reward")
    trainer = make(
        model=quantized(), peft_config=LoraConfig(**LORA), reward=tmp_path / "reward",
        critic=LoraConfig(**LORA), args=dict(total_steps=2, critic_pretrain_steps=1),
    )  # fmt: skip
    assert trainer.ref_model is None
    assert isinstance(trainer.critic, SharedRewardModel)
    before = packed(trainer.policy)
    assert len(before) == 7  # the linear layers of the block, once for all roles
    own = {n: p.clone() for n, p in adapter_parameters(trainer.policy, "default").items()}
    assert {p.dtype for p in own.values()} == {torch.float32}
    ids = torch.arange(4, 12)[None]
    bare = quantized()(ids).logits
    trainer.train()
    after = packed(trainer.policy)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    moved = adapter_parameters(trainer.policy, "default")
    assert any(not torch.equal(moved[name], weight) for name, weight in own.items())
    with torch.no_grad(), as_reference(None, trainer.policy) as reference:
        torch.testing.assert_close(reference(ids).logits, bare)
    assert trainer.evaluate(ToyWorld().prompts(4))["eval/reward_model/policy"] is not None


def test_gradients_on_a_quantized_base_are_those_of_the_dequantized_one(make, world, quantized):
    """In evaluation mode too, in which models are trained."""
    options = dict(peft_config=LoraConfig(**LORA), reward=world.reward)
    trainer = make(model=quantized(), critic=LoraConfig(**LORA), **options)
    dequantized = copy.deepcopy(quantized())
    for name, layer in list(dequantized.named_modules()):
        if is_quantized(layer):
            dequantized.set_submodule(name, plain_layer(layer))
    forget_quantization(dequantized)
    whole = load_policy(dequantized, LoraConfig(**LORA))
    own = adapter_parameters(trainer.policy, "default")
    for name, parameter in adapter_parameters(whole, "default").items():
        torch.nn.init.normal_(own[name], std=0.1)
        parameter.data.copy_(own[name])
    rollout = recorded_rollout(world)
    found = []
    for model in (trainer.model, ActorCritic(whole)):
        model.eval()
        model("policy", rollout, lambda stats: stats.logprob.sum()).backward()
        parameters = adapter_parameters(model.policy, "default").values()
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_saving_merges_adapters_into_dequantized_weights(quantized, tmp_path, world):
    """Merged into four bits, they would be rounded away."""
    model = RewardModel.from_language_model(quantized())
    add_adapters(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    torch.nn.init.normal_(model.score.weight)
    model.eval()
    model.save_pretrained(tmp_path / "whole")
    alone = RewardModel.from_pretrained(tmp_path / "whole")
    assert not packed(alone)
    rollout = recorded_rollout(world)
    ids, mask = rollout.input_ids, rollout.attention_mask
    with torch.no_grad():
        torch.testing.assert_close(alone(ids, mask), model(ids, mask), rtol=1e-4, atol=1e-5)


def test_a_quantized_policy_merges_beside_a_critic_in_other_layers(make, quantized, policy):
    adapter = dict(LORA, init_lora_weights=False)
    trainer = make(
        model=quantized(), peft_config=LoraConfig(**{**adapter, "target_modules": ["q_proj"]}),
        critic=LoraConfig(**{**adapter, "target_modules": ["v_proj"]}), ref_model=quantized(),
    )  # fmt: skip
    base = trainer.policy.get_base_model()
    config = copy.deepcopy(base.config)
    forget_quantization(config)
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(merged_state_dict(base))
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, trainer.policy(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*targeted layer of type Linear4bit has no bias")
@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_adapters_that_change_more_than_a_difference_are_refused_on_a_quantized_base(
    quantized, more
):
    model = RewardModel.from_language_model(quantized())
    with pytest.raises(ValueError, match=r"cannot be merged.*adds more than a matrix"):
        add_adapters(model, LoraConfig(r=2, target_modules=["q_proj"], **more))


def test_a_quantized_critic_is_refused(make, world, quantized):
    with pytest.raises(ValueError, match=r"critic: .*four bits.*LoraConfig"):
        make(model=quantized(), peft_config=LoraConfig(**LORA), reward=world.reward)


def test_a_run_on_a_quantized_base_is_resumed(make, world, quantized, parameters):
    options = dict(peft_config=LoraConfig(**LORA), critic=LoraConfig(**LORA), reward=world.reward)
    whole = make("whole", model=quantized(), args=dict(total_steps=2), **options)
    whole.train()
    make("run", model=quantized(), args=dict(total_steps=1), **options).train()
    resumed = make("run", model=quantized(), args=dict(total_steps=2), **options)
    resumed.train(resume_from_checkpoint=True)
    for role in ("policy", "critic"):
        pairs = zip(
            whole.model.trained_parameters(role),
            resumed.model.trained_parameters(role),
            strict=True,
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_merging_on_a_quantized_base_leaves_out_inactive_adapters(quantized):
    """A critic whose adapter is in other layers than the policy's."""
    policy = load_policy(quantized(), LoraConfig(**LORA, init_lora_weights=False))
    options = dict(r=2, target_modules=["k_proj"], init_lora_weights=False)
    critic = share_base(policy, LoraConfig(**options), "critic", ValueHead(128, zero=False))
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        expected = critic(IDS, mask)
        torch.testing.assert_close(critic.merged()(IDS, mask), expected, rtol=1e-4, atol=1e-5)
