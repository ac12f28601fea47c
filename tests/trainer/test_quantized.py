"""Adapters on a base of four bits, where bitsandbytes is installed."""

import copy

import pytest
import torch
from peft import LoraConfig
from rollouts import recorded_rollout
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mossrlhf import ActorCritic, RewardModel, ToyWorld
from mossrlhf.models import SharedRewardModel, add_adapters, save_adapters
from mossrlhf.models.adapters import adapter_parameters
from mossrlhf.models.quantized import forget_quantization, is_quantized, plain_layer
from mossrlhf.roles import as_reference, load_policy

pytest.importorskip("bitsandbytes")

# bitsandbytes looks for faster kernels on the CPU and says that it found none.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def quantized(policy, tmp_path):
    """Load the same base in four bits, as often as it is wanted."""
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
    """The weights that are held in four bits, two in a byte."""
    return {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}


def test_four_roles_on_a_base_of_four_bits(make, world, quantized, tmp_path):
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
    assert len(before) == 7  # every linear layer of the block, once for all roles
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


def test_gradients_are_those_of_the_base_in_full(make, world, quantized):
    """In evaluation mode too, in which models are trained; the first ratio is 1 there."""
    options = dict(peft_config=LoraConfig(**LORA), reward=world.reward)
    trainer = make(model=quantized(), critic=LoraConfig(**LORA), **options)
    written_out = copy.deepcopy(quantized())
    for name, layer in list(written_out.named_modules()):
        if is_quantized(layer):
            written_out.set_submodule(name, plain_layer(layer))
    forget_quantization(written_out)
    whole = load_policy(written_out, LoraConfig(**LORA))
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


def test_adapters_are_written_out_in_full(quantized, tmp_path, world):
    """Merged into four bits they would be rounded away."""
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


def test_a_critic_of_four_bits_cannot_be_trained_whole(make, world, quantized):
    with pytest.raises(ValueError, match=r"critic: .*four bits.*LoraConfig"):
        make(model=quantized(), peft_config=LoraConfig(**LORA), reward=world.reward)


def test_a_run_on_four_bits_is_resumed(make, world, quantized, parameters):
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
