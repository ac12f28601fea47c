"""`plan` makes the roles that `Trainer` makes, and says what they need and what to change."""

import copy
import warnings
from dataclasses import replace
from inspect import unwrap

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mossrlhf import ModelReward, RewardModel, TrainerConfig, ValueHead, plan
from mossrlhf.models import add_adapters, save_adapters

WIDE = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=160, vocab_size=3000)


def lora(rank=4):
    return LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0)


@pytest.fixture
def adapter(tmp_path):
    """Saves an adapter of a reward model over a base, as RewardTrainer does."""

    def save(base):
        model = RewardModel.from_language_model(base)
        add_adapters(model, lora())
        save_adapters(model, tmp_path / "adapter")
        return tmp_path / "adapter"

    return save


def of_length(completions, **_):
    return [float(len(text)) for text in completions]


def counted(trainer):
    """Bytes and trained parameters of each role of a real trainer, from its optimizers."""
    trained = {
        role: sum(p.numel() for group in o.param_groups for p in group["params"])
        for role, o in trainer.engine.optimizers.items()
    }
    models = (trainer.model, trainer.ref_model, *trainer.rewards.models())
    return trained, nbytes(tensors_of(*models).values())


ROLES_GIVEN = {
    "a head on the policy": lambda base, folder: {"critic": ValueHead(16), "peft_config": lora()},
    "whole critic beside adapters": lambda base, folder: {"peft_config": lora()},
    "critic from the shared reward": lambda base, folder: {
        "peft_config": lora(8), "reward": str(folder(base)),
    },
    "reward model": lambda base, folder: {"reward": RewardModel.from_language_model(base)},
    "two rewards": lambda base, folder: {
        "reward": [of_length, (ModelReward(model=RewardModel.from_language_model(base)), 2.0)],
        "critic": False,
    },
    "reference of its own": lambda base, folder: {"ref_model": copy.deepcopy(base)},
    "an adapter put on before": lambda base, folder: {"model": get_peft_model(base, lora())},
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES_GIVEN)
def test_parameters_are_those_of_a_real_trainer(name, make, policy, adapter, world):
    base = policy()
    parts = {"reward": of_length, **ROLES_GIVEN[name](base, adapter)}
    model = parts.pop("model", base)
    before = [(p.requires_grad, p.dtype, p.is_meta) for p in model.parameters()]
    state = torch.get_rng_state()
    ahead = plan(model, prompt_tokens=8, max_new_tokens=8, device="cpu", **parts)
    assert torch.equal(state, torch.get_rng_state())
    assert before == [(p.requires_grad, p.dtype, p.is_meta) for p in model.parameters()]
    trained, size = counted(make(model=model, **parts))
    assert {role: ahead.roles[role].trained for role in trained} == trained
    assert ahead.weights == size
    assert tuple(ahead.roles) == ROLES


def test_a_folder_without_weights_will_do(policy, tmp_path):
    config = policy().config
    config.save_pretrained(tmp_path)
    config.dtype = torch.float32
    lengths = dict(prompt_tokens=8, max_new_tokens=8)
    by_name, by_config = plan(str(tmp_path), **lengths), plan(config, **lengths)
    assert by_name == by_config
    critic = plan(str(tmp_path), critic=str(tmp_path), reward=str(tmp_path), **lengths)
    assert critic.roles["reward"].weights == critic.roles["critic"].weights > 0
    half = plan(str(tmp_path), peft_config=lora(), dtype=torch.bfloat16, **lengths)
    whole = plan(str(tmp_path), peft_config=lora(), **lengths)
    adapters = half.roles["policy"].gradients
    assert half.roles["policy"].weights - adapters < 0.51 * whole.roles["policy"].weights
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path))


def test_checkpointing_and_bfloat16_keep_less(policy):
    config = policy(**WIDE).config
    config.num_hidden_layers = 6
    lengths = dict(prompt_tokens=40, max_new_tokens=40)
    args = TrainerConfig(rollout_size=8, minibatch_size=8)
    whole = plan(config, args=args, **lengths)
    less = plan(config, args=replace(args, gradient_checkpointing=True), **lengths)
    assert less.kept["critic"] < 0.4 * whole.kept["critic"]
    assert less.steady == whole.steady
    half = plan(config, args=replace(args, bf16=True), **lengths)
    assert 0.4 * whole.kept["critic"] < half.kept["critic"] < 0.8 * whole.kept["critic"]
    one = plan(config, args=replace(args, micro_batch_size=1), **lengths)
    assert one.kept["critic"] == pytest.approx(whole.kept["critic"] / 8, rel=0.02)
    assert one.kv_cache == whole.kv_cache


def test_adapters_are_suggested_where_weights_do_not_fit(policy):
    ahead = plan(
        policy(**WIDE).config,
        prompt_tokens=8,
        max_new_tokens=8,
        args=TrainerConfig(rollout_size=2, minibatch_size=2),
    )
    said = ahead.suggest(ahead.steady / 2)
    assert said.startswith("To fit")
    assert "LoraConfig" in said
    assert "devices" not in said


def test_shares_of_several_devices(policy):
    config = policy(**WIDE).config
    lengths = dict(prompt_tokens=8, max_new_tokens=8)
    alone = plan(config, **lengths)
    ddp = plan(config, processes=4, **lengths)
    assert ddp.roles == alone.roles
    gradients = sum(role.gradients for role in alone.roles.values())
    assert ddp.extra == gradients
    fsdp = plan(config, processes=4, sharding="fsdp", frozen="sharded", **lengths)
    zero3 = plan(config, processes=4, sharding="zero3", **lengths)
    # Embeddings of references stay whole.
    blocks = [nbytes(layer.parameters()) for layer in policy(**WIDE).model.layers]
    whole = alone.roles["reference"].weights
    assert fsdp.roles["reference"].weights == whole - sum(blocks) + sum(blocks) / 4
    assert zero3.roles["reference"].weights == pytest.approx(whole / 4, abs=1)
    for name in ("policy", "critic"):
        role = fsdp.roles[name]
        for part in ("weights", "gradients", "optimizer"):
            whole = getattr(alone.roles[name], part)
            assert getattr(role, part) == pytest.approx(whole / 4, abs=1)
    zero2 = plan(config, processes=4, sharding="zero2", **lengths)
    assert zero2.roles["policy"].weights == alone.roles["policy"].weights
    assert zero2.roles["policy"].gradients == fsdp.roles["policy"].gradients
    # Lent whole while it scores; the reference is gathered layer by layer.
    judged = plan(config, processes=4, sharding="fsdp", reward=config, **lengths)
    assert judged.lent == {"reward": sum(blocks)}
    assert fsdp.peak < zero2.peak < ddp.peak


def test_the_table(policy):
    args = TrainerConfig(rollout_size=8, minibatch_size=8, max_prompt_length=100)
    ahead = plan(policy(**WIDE).config, args=args, max_new_tokens=100)
    lines = str(ahead).splitlines()
    assert max(map(len, lines)) <= 80
    for name in (*ROLES, "KV cache while sampling", "one chunk of logits", "rollout"):
        assert sum(line.startswith(name) for line in lines) == 1
    (peak,) = [line for line in lines if "<- the peak" in line]
    assert peak.startswith(f"peak of {ahead.peak_phase}")
    assert f"{ahead.peak / 2**20:,.1f}" in peak
    assert ahead.fits(ahead.peak)
    assert not ahead.fits(ahead.peak - 1)
    assert ahead.suggest(ahead.peak).startswith("It fits")


def test_what_to_change(policy):
    args = TrainerConfig(rollout_size=8, minibatch_size=8, max_prompt_length=100)
    ahead = plan(policy().config, args=args, max_new_tokens=100)
    said = ahead.suggest(0.6 * ahead.peak)
    assert said.startswith("To fit")
    size = int(said.split("micro_batch_size=")[1].split(")")[0])
    assert ahead.again(args=replace(args, micro_batch_size=size)).fits(0.6 * ahead.peak)
    assert not ahead.again(args=replace(args, micro_batch_size=2 * size)).fits(0.6 * ahead.peak)
    small = ahead.suggest(1000)
    assert small.startswith("Nothing tried here")
    assert "8 devices" in small
    assert max(map(len, f"{said}\n{small}".splitlines())) <= 80 < len(small)


def test_frozen_models_wait_on_the_cpu_as_the_trainer_lets_them(policy):
    """Under DDP and ZeRO-2; FSDP2 and ZeRO-3 shard them instead."""
    config = policy(**WIDE).config
    asked = dict(reward=config, prompt_tokens=8, max_new_tokens=8)
    args = TrainerConfig(rollout_size=2, minibatch_size=2)
    waits = replace(args, offload_frozen=True)
    here, away = plan(config, args=args, **asked), plan(config, args=waits, **asked)
    sizes = {name: here.roles[name].weights for name in ("reference", "reward")}
    assert away.lent == sizes
    assert away.roles["reference"].weights == away.roles["reward"].weights == 0
    assert here.weights - away.weights == sum(sizes.values())
    assert "on the CPU until asked" in str(away)
    assert max(map(len, str(away).splitlines())) <= 80
    for phase in ("sampling", "update"):
        assert here.phases[phase] - away.phases[phase] == sum(sizes.values())
    # One at a time is there while it is asked.
    less = here.phases["scoring"] - away.phases["scoring"]
    assert min(sizes.values()) <= less <= max(sizes.values())
    for sharding in (None, "zero2"):
        shared = plan(config, args=waits, processes=2, sharding=sharding, **asked)
        assert shared.lent == sizes
    for sharding in ("fsdp", "zero3"):
        both = [
            plan(config, args=a, processes=2, sharding=sharding, **asked) for a in (args, waits)
        ]
        assert both[0].phases == both[1].phases
    assert plan(config, args=waits, device="cpu", **asked).weights == here.weights
    # Adapters on the policy's base stay with it.
    one_base = dict(asked, reward=lora(), critic=lora(), peft_config=lora())
    assert plan(config, args=waits, **one_base).phases == plan(config, args=args, **one_base).phases
    assert "set TrainerConfig(offload_frozen=True)" in here.suggest(away.peak).replace("\n", " ")


@pytest.mark.parametrize(
    ("init", "changed"),
    [(True, False), ("gaussian", False), (False, True), ("pissa", True), ("olora", True)],
)
def test_a_policy_that_starts_changed_has_a_reference_of_its_own(init, changed, make, policy):
    base = policy()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    ahead = plan(
        base, reward=of_length, peft_config=config, prompt_tokens=8, max_new_tokens=8, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the memory it costs
        trainer = make(model=base, reward=of_length, peft_config=config)
    assert (trainer.ref_model is not None) == changed == bool(ahead.roles["reference"].weights)
    assert ahead.weights == counted(trainer)[1]


def test_adapters_that_cannot_be_told_are_refused(policy):
    asked = dict(prompt_tokens=8, max_new_tokens=8, peft_config=AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"
    ))  # fmt: skip
    config = policy().config
    with pytest.raises(ValueError, match=r"peft_config: whether a new AdaptionPrompt.*pass ref_"):
        plan(config, **asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes: got 0, expected at least 1"),
        ({"processes": -2}, "processes: got -2, expected at least 1"),
        ({"processes": 1.5}, "processes: got 1.5, expected a whole number"),
        ({"prompt_tokens": 0}, "prompt_tokens: got 0, expected at least 1"),
        ({"prompt_tokens": -8}, "prompt_tokens: got -8, expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected at least 1"),
        ({"max_new_tokens": -8}, "max_new_tokens: got -8, expected at least 1"),
        ({"args": {}}, r"args: got \{\}, expected a TrainerConfig"),
        ({"sampler": 3}, "sampler: got 3, expected an HFSampler"),
        ({"critic": 3}, "critic: got 3, expected a RewardModel"),
        ({"loss": 3}, "loss: got 3, expected a PPOMaxLoss"),
        ({"reward": 3}, "reward: got 3, expected a reward function"),
        ({"reward": [(3, 1.0)]}, "reward: got 3, expected a reward function"),
        ({"ref_model": 3}, "ref_model: got 3, expected a causal language model"),
        ({"generation_config": {}}, "generation_config: got {}, expected a transformers"),
        ({"dtype": "bf16"}, "dtype: got 'bf16', expected a torch.dtype"),
        (
            {"frozen": "offloaded"},
            r"frozen: got 'offloaded', but TrainerConfig\(offload_frozen=False\)",
        ),
        ({"frozen": "whole", "sharding": "fsdp", "processes": 2}, "frozen: got 'whole', but under"),
        (
            {"frozen": "whole", "args": TrainerConfig(offload_frozen=True)},
            r"frozen: got 'whole', but TrainerConfig\(offload_frozen=True\)",
        ),
    ],
)
def test_arguments_are_refused_by_name(options, message, policy):
    with pytest.raises((TypeError, ValueError), match=message):
        unwrap(plan)(policy().config, **{"prompt_tokens": 8, "max_new_tokens": 8, **options})


def test_a_long_remark_takes_a_line_of_its_own():
    for words, remark in (
        ("activations, update of the critic", "64 x 16384 tokens, not checkpointed"),
        ("rollout", "1048576 responses, 1048576 again, and more than that"),
    ):
        lines = _row(words, "1,234.56", remark)
        assert max(map(len, lines)) <= 80
        assert " ".join(" ".join(lines).split()) == f"{words} 1,234.56 {remark}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero"}, "sharding: got 'zero'.*did you mean 'zero3'|'zero2'"),
        ({"frozen": "away"}, "frozen: got 'away', expected one of 'whole', 'sharded'"),
        ({"device": "gpu"}, "device: got 'gpu', expected one of 'cuda', 'cpu'"),
        ({"prompt_tokens": None}, "prompt_tokens: got None.*max_prompt_length"),
        ({"processes": 3}, "3 processes.*cannot share it evenly"),
        ({"max_new_tokens": 10**6}, "do not fit into the model's context"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message, policy):
    with pytest.raises(ValueError, match=message):
        plan(policy().config, **{"prompt_tokens": 8, "max_new_tokens": 8, **options})
    with pytest.raises(TypeError, match="model: got int, expected a causal language model"):
        plan(3, prompt_tokens=8)
