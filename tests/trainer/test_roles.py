"""Policy, reference, critic and rewards, whatever they are made of."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

from mossrlhf import RewardModel, TrainerConfig
from mossrlhf.rewards import ModelReward
from mossrlhf.roles import (
    as_reference,
    load_critic,
    load_policy,
    load_reference,
    load_reward,
    load_tokenizer,
    make_accelerator,
    require_vocabulary,
)

IDS = torch.arange(5, 12)[None]
LORA = dict(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
MERGED = "model: its adapter is merged into its base"
COPIED = "ref_model: got None, and the policy's adapter already"


@torch.no_grad()
def says(model):
    return model.eval()(input_ids=IDS).logits


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.fixture
def sft(policy, tmp_path) -> tuple[Path, torch.Tensor]:
    """The folder of an adapter that was trained, on a base in another folder; and what it says."""
    policy().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(**LORA))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "sft")
    said = says(model)
    assert (said - says(policy())).abs().max() > 1e-2
    return tmp_path / "sft", said


@pytest.mark.parametrize("given", ["folder", "model"])
def test_a_new_adapter_is_put_on_top_of_the_trained_one(sft, given):
    folder, said = sft
    model = folder
    if given == "model":
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        model = PeftModel.from_pretrained(base, folder)
    with pytest.warns(UserWarning, match=MERGED):
        made = load_policy(model, LoraConfig(**LORA))
    assert load_reference(None, made) is None
    torch.testing.assert_close(says(made), said)
    for name, weight in made.named_parameters():
        assert weight.requires_grad == ("lora_" in name), name
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    assert (says(made) - said).abs().max() > 1e-2
    with as_reference(None, made) as reference:
        torch.testing.assert_close(says(reference), said)


def test_a_fresh_adapter_gives_way_without_a_word(policy):
    made = load_policy(get_peft_model(policy(), LoraConfig(**LORA)), LoraConfig(**LORA))
    assert load_reference(None, made) is None
    torch.testing.assert_close(says(made), says(policy()))


@pytest.mark.parametrize("given", ["folder", "model"])
def test_a_trained_adapter_is_trained_on_and_its_reference_is_what_it_says_now(sft, given):
    folder, said = sft
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
    with as_reference(reference, made) as lent:
        torch.testing.assert_close(says(lent), said)
    assert not any(p.requires_grad for p in reference.parameters())


def test_the_first_kl_of_a_trained_adapter_is_zero_and_the_adapter_is_saved(make, sft, tmp_path):
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


def test_the_critic_starts_from_what_the_adapter_says(sft):
    folder, _ = sft
    made = load_policy(folder)
    critic = load_critic(None, made, [])
    with torch.no_grad():
        hidden = made(IDS, output_hidden_states=True).hidden_states[-1]
        got = critic.backbone(IDS).last_hidden_state
    torch.testing.assert_close(got, hidden)


def test_the_tokenizer_of_an_adapter_alone_is_that_of_its_base(sft, world):
    folder, _ = sft
    world.tokenizer().save_pretrained(folder.parent / "base")
    assert load_tokenizer(folder).get_vocab() == world.tokenizer().get_vocab()


def test_an_adapter_that_is_not_trainable_says_how_to_load_it(sft):
    folder, _ = sft
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    for model in (
        PeftModel.from_pretrained(base, folder),
        AutoModelForCausalLM.from_pretrained(folder),
    ):
        with pytest.raises(ValueError, match=r"is_trainable=True, pass its folder as model="):
            load_policy(model)


def test_an_adapter_that_transformers_hides_is_not_replaced(sft):
    folder, _ = sft
    with pytest.raises(ValueError, match="pass the adapter's folder as model="):
        load_policy(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))


def test_an_adapter_that_cannot_be_merged_is_not_replaced(policy):
    prefix = get_peft_model(
        policy(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match=r"cannot be merged.*leave peft_config=None"):
        load_policy(prefix, LoraConfig(**LORA))


def test_an_adapters_first_weights_depend_on_the_seed_alone(policy):
    first = adapters(load_policy(policy(), LoraConfig(**LORA), seed=3))
    model = policy()
    torch.rand(7)
    state = torch.get_rng_state()
    again = adapters(load_policy(model, LoraConfig(**LORA), seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    other = adapters(load_policy(policy(), LoraConfig(**LORA), seed=4))
    assert any(not torch.equal(other[name], first[name]) for name in first)


def test_a_reference_that_shares_the_trained_weights_is_a_copy(policy):
    """The model under the adapters is the same object, adapters and all."""
    base = policy()
    made = load_policy(base, LoraConfig(**LORA))
    trained = [p for p in made.parameters() if p.requires_grad]
    reference = load_reference(base, made)
    assert all(p.requires_grad for p in trained)
    for weight in trained:
        torch.nn.init.ones_(weight)
    torch.testing.assert_close(says(reference), says(policy()))


@pytest.fixture
def precision(monkeypatch):
    """A process in which nothing has run; afterwards as it was."""
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield monkeypatch
    AcceleratorState._reset_state()
    AcceleratorState._shared_state.update(before)


def computes_in(accelerator):
    x = torch.ones(2, 2)
    with accelerator.autocast():
        return (x @ x).dtype


def test_each_trainer_has_its_own_precision(precision, tmp_path):
    half = make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))
    assert (half.mixed_precision, computes_in(half)) == ("bf16", torch.bfloat16)
    full = make_accelerator(TrainerConfig(output_dir=str(tmp_path)))
    assert (full.mixed_precision, computes_in(full)) == ("no", torch.float32)
    with half.autocast():  # float16 on a GPU, if the state still said "no"
        assert half.mixed_precision == "bf16"
    again = make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))
    assert [computes_in(a) for a in (again, full, half)] == [
        torch.bfloat16, torch.float32, torch.bfloat16,
    ]  # fmt: skip
    assert half.device == full.device == again.device


def test_what_a_script_ran_in_before_has_no_say(precision, tmp_path):
    Accelerator()
    assert computes_in(make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))) == (
        torch.bfloat16
    )


def test_the_launchers_precision_holds(precision, tmp_path):
    precision.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for _ in range(2):
        assert computes_in(make_accelerator(TrainerConfig(output_dir=str(tmp_path)))) == (
            torch.bfloat16
        )
    precision.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator(TrainerConfig(output_dir=str(tmp_path))).mixed_precision == "no"


def test_several_processes_cannot_change_their_precision(precision, tmp_path):
    Accelerator()
    precision.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(
        ValueError, match=r"TrainerConfig\(bf16=True\): these .*'no', expected 'bf16'"
    ):
        make_accelerator(TrainerConfig(output_dir=str(tmp_path), bf16=True))


@pytest.mark.parametrize("handlers", [[], [DistributedDataParallelKwargs(bucket_cap_mb=3)]])
def test_roles_of_a_users_accelerator_run_in_turn(precision, tmp_path, handlers):
    own = Accelerator(kwargs_handlers=handlers)
    assert make_accelerator(TrainerConfig(output_dir=str(tmp_path)), own) is own
    assert own.ddp_handler.find_unused_parameters
    assert own.ddp_handler.bucket_cap_mb == (3 if handlers else 25)  # the rest is the user's


def test_steps_are_not_alike(precision, tmp_path):
    own = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)])
    with pytest.raises(ValueError, match=r"accelerator: .*static_graph=True\), expected False"):
        make_accelerator(TrainerConfig(output_dir=str(tmp_path)), own)


def test_a_tokenizer_with_more_tokens_than_the_model(policy, world):
    tokenizer = world.tokenizer()
    require_vocabulary(policy(), tokenizer)
    model = policy(vocab_size=len(tokenizer) - 1)
    for small in (model, get_peft_model(model, LoraConfig(**LORA))):
        with pytest.raises(ValueError, match=r"processing_class: .*resize_token_embeddings"):
            require_vocabulary(small, tokenizer)


def bert(size, **options):
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, num_labels=1, initializer_range=0.5, **options,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("given", ["folder", "model"])
@pytest.mark.parametrize("alike", [True, False])
def test_any_classifier_is_a_reward(make, world, tmp_path, given, alike):
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
        assert trainer.critic.score.weight.count_nonzero() == 0  # made of the policy


def test_a_folder_with_a_score_head_is_still_a_reward_model(make, world, reward_model, tmp_path):
    reward_model().save_pretrained(tmp_path / "rm")
    world.tokenizer().save_pretrained(tmp_path / "rm")
    loaded = load_reward(str(tmp_path / "rm"), world.tokenizer())
    assert isinstance(loaded.model, RewardModel)
    ids, mask = torch.arange(3, 9)[None], torch.ones(1, 6)
    torch.testing.assert_close(loaded.model(ids, mask), reward_model()(ids, mask))
    assert LlamaForSequenceClassification.from_pretrained(tmp_path / "rm").num_labels == 1


def test_a_classifier_without_values_is_no_critic(make, world):
    with pytest.raises(ValueError, match="critic: got BertForSequenceClassification, which"):
        make(critic=bert(len(world.tokenizer())))
