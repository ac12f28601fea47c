"""LoRA in reward-model training: what learns, what is saved, who can load it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel
from preferences import language_model, pairs, reward_model
from transformers import AutoModelForSequenceClassification

from mossrlhf.models import RewardModel, is_adapted, merged_state_dict
from mossrlhf.reward_trainer import RewardTrainer, storage
from mossrlhf.reward_trainer import trainer as trainer_module

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
STEPS = dict(learning_rate=0.05, per_device_train_batch_size=4, num_train_epochs=1)


def trained(tokenizer, arguments, records, **options):
    model = options.pop("model", None) or reward_model()
    trainer = RewardTrainer(
        model, arguments(**STEPS, **options), processing_class=tokenizer,
        train_dataset=records, eval_dataset=records, peft_config=LORA,
    )  # fmt: skip
    return trainer


def test_adapters_and_head_learn_and_the_base_rests(tokenizer, arguments):
    model = reward_model()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    trainer = trained(tokenizer, arguments, pairs(16), model=model)
    trainer.train()
    assert is_adapted(model)
    after = model.state_dict()
    for name, weight in after.items():
        base = name.replace(".base_layer", "")
        if "lora_" in name or name.startswith("score"):
            assert name not in before or not torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, before[base]), name
    assert any("lora_B" in name and w.abs().sum() > 0 for name, w in after.items())
    assert LORA.modules_to_save is None  # the user's own object


def test_what_is_saved_is_merged_and_loads_everywhere(tokenizer, arguments, tmp_path):
    records = pairs(8)
    trainer = trained(tokenizer, arguments, records)
    trainer.train()
    scores = torch.tensor(trainer.predict(records).predictions)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    again = trained(tokenizer, arguments, records, model=RewardModel.from_pretrained(folder))
    merged = torch.tensor(again.predict(records).predictions)
    torch.testing.assert_close(merged, scores, atol=1e-5, rtol=1e-5)
    assert is_adapted(trainer.reward_model)  # it goes on training

    # And the adapter alone, on the bare base, by PEFT's own loader.
    reward_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    batch = trainer.data_collator(records)
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask).logits.view(-1, 2)
    torch.testing.assert_close(found, scores, atol=1e-5, rtol=1e-5)


def test_checkpoints_of_adapters_keep_the_moments(tokenizer, arguments, tmp_path):
    trainer = trained(tokenizer, arguments, pairs(4))
    model = trainer.model
    model.config.score_mean, model.config.score_std = 1.0, 2.0
    storage.write(model, tmp_path, resumable_only=True)
    model.config.score_mean, model.config.score_std = 7.0, 9.0
    storage.read(model, tmp_path)
    assert (model.config.score_mean, model.config.score_std) == (1.0, 2.0)


@pytest.mark.parametrize("by", ["fsdp", "zero3"])
def test_weights_that_are_split_are_refused(tokenizer, arguments, monkeypatch, by):
    begin = RewardTrainer.create_accelerator_and_postprocess

    def split(self):
        begin(self)
        self.is_fsdp_enabled = True

    if by == "fsdp":
        monkeypatch.setattr(RewardTrainer, "create_accelerator_and_postprocess", split)
    else:
        monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"peft_config: .*FSDP and DeepSpeed's stage 3 split them"):
        trained(tokenizer, arguments, pairs(4))


def test_merging_leaves_the_model_as_it_is(tokenizer, arguments):
    trainer = trained(tokenizer, arguments, pairs(8))
    trainer.train()
    before = {name: w.clone() for name, w in trainer.reward_model.state_dict().items()}
    plain = reward_model()
    plain.load_state_dict(merged_state_dict(trainer.reward_model))
    after = trainer.reward_model.state_dict()
    assert all(torch.equal(w, after[name]) for name, w in before.items())


def test_resumed_equals_uninterrupted_with_adapters(tokenizer, arguments, tmp_path):
    options = dict(save_strategy="steps", save_steps=2, seed=3)
    whole = trained(tokenizer, arguments, pairs(16), **options, output_dir=str(tmp_path / "a"))
    whole.train()
    resumed = trained(tokenizer, arguments, pairs(16), **options, output_dir=str(tmp_path / "b"))
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()  # adapters and head are enough
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = whole.reward_model.state_dict()
    for name, weight in resumed.reward_model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_adapters_on_adapters_and_modules_to_save_are_refused(tokenizer, arguments):
    model = trained(tokenizer, arguments, pairs(4)).reward_model
    with pytest.raises(ValueError, match="adapters inside already"):
        trained(tokenizer, arguments, pairs(4), model=model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match=r"modules_to_save=.*embed_tokens"):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, peft_config=config)


def test_a_checkpoint_of_other_adapters_is_refused(tokenizer, arguments, tmp_path):
    trained(tokenizer, arguments, pairs(4)).save_model(str(tmp_path / "saved"))
    config = LoraConfig(r=4, target_modules=["k_proj"])
    other = RewardTrainer(
        reward_model(), arguments(), processing_class=tokenizer, train_dataset=pairs(4),
        peft_config=config,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the model's adapters differ in"):
        other.train(resume_from_checkpoint=str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_config=replace(LORA, lora_alpha=8)), "lora_alpha 16 there, 8 here"),
        (dict(peft_config=replace(LORA, use_rslora=True)), "use_rslora False there, True here"),
        (dict(model=reward_model(seed=5)), "trained on other weights than the model has"),
        (dict(peft_config=None), "holds adapters alone, and the model in training has none"),
        (dict(peft_config=None, whole=True), None),
        (dict(damage="adapter_config.json"), "adapter.*cannot be read"),
        (dict(damage="adapter_model.safetensors"), "cannot be read .SafetensorError"),
        (dict(damage="score_moments.json"), "cannot be read .JSONDecodeError"),
        (dict(remove="score_moments.json"), "cannot be read .FileNotFoundError"),
        ({}, None),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tokenizer, arguments, tmp_path, change, message):
    before = trained(tokenizer, arguments, pairs(4))
    storage.write(before.model, tmp_path, resumable_only="whole" not in change)
    if name := change.get("damage"):
        (tmp_path / "adapter" / name).write_bytes(b"{")
    if name := change.get("remove"):
        (tmp_path / "adapter" / name).unlink()
    now = RewardTrainer(
        change.get("model") or reward_model(), arguments(), processing_class=tokenizer,
        peft_config=change.get("peft_config", LORA),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        storage.read(now.model, tmp_path)


def test_a_base_in_half_precision_is_the_same_base(tokenizer, arguments, tmp_path):
    storage.write(trained(tokenizer, arguments, pairs(4)).model, tmp_path, resumable_only=True)
    half = trained(tokenizer, arguments, pairs(4), model=reward_model().to(torch.bfloat16))
    storage.read(half.model, tmp_path)


def test_a_checkpoint_without_adapters_is_not_for_a_model_with(tokenizer, arguments, tmp_path):
    plain = RewardTrainer(reward_model(), arguments(), processing_class=tokenizer)
    storage.write(plain.model, tmp_path)
    with pytest.raises(ValueError, match="it holds no adapters, and the model in training has som"):
        storage.read(trained(tokenizer, arguments, pairs(4)).model, tmp_path)


def test_dropout_is_off_where_it_is_said(tokenizer, arguments):
    model = RewardModel.from_language_model(language_model(attention_dropout=0.5))
    torch.nn.init.normal_(model.score.weight)
    records = pairs(4)
    for disabled in (False, True):
        trainer = RewardTrainer(
            model, arguments(), processing_class=tokenizer, train_dataset=records,
            disable_dropout=disabled,
        )  # fmt: skip
        batch = trainer.data_collator(records)
        trainer.model.train()
        losses = {trainer.compute_loss(trainer.model, batch).item() for _ in range(3)}
        assert (len(losses) == 1) is disabled


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lora_bias=True), "peft_config: these adapters cannot be merged"),
        (dict(trainable_token_indices=[1]), "peft_config: got trainable_token_indices"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_training(tokenizer, arguments, options, message):
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=message):
        RewardTrainer(reward_model(), arguments(), processing_class=tokenizer, peft_config=config)
