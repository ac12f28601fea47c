"""`SFTTrainer`: what it learns, that epochs are alike, what is refused before it starts."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from mossrlhf.data import SFTCollator
from mossrlhf.sft_trainer import SFTTrainer
from mossrlhf.toyworld import ToyWorld

WORLD = ToyWorld()


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.tokenizer()


@pytest.fixture
def start(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)

    def make(records, eval_dataset=None, max_length=None, **changes):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        quiet = dict(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, save_strategy="no", logging_strategy="no",
            num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-2,
        )  # fmt: skip
        return SFTTrainer(
            LlamaForCausalLM(config), TrainingArguments(**{**quiet, **changes}), records,
            tokenizer, eval_dataset=eval_dataset, max_length=max_length,
        )  # fmt: skip

    return make


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("grouped", [False, True])
def test_what_the_collator_remembers_changes_no_number(start, tokenizer, grouped):
    """Two epochs, also by length: records may carry a column for it, which no loss reads."""
    records = WORLD.sft_examples(24)
    collate = SFTCollator(tokenizer, cache_bytes=None)
    changes = {}
    if grouped:
        records = [{**r, "input_ids": collate([r])["input_ids"][0]} for r in records]
        changes["train_sampling_strategy"] = "group_by_length"
    losses, trained = [], []
    for collator in (None, collate):
        trainer = start(records, **changes)
        trainer.data_collator = collator or trainer.data_collator
        losses.append(trainer.train().training_loss)
        trained.append(weights(trainer))
        assert len(trainer.data_collator._cache) == (0 if collator else len(records))
    assert losses[0] == losses[1]
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], weights(start(records)))


@pytest.mark.parametrize("several", [False, True])
def test_prompts_without_room_for_a_response_are_refused_at_once(start, several):
    good = WORLD.sft_examples(3)
    long = {"prompt": "a b c d " * 20, "response": " a"}
    document = {"text": "a b c d " * 50}  # it is cut
    start([*good, document], max_length=60)
    with pytest.raises(ValueError, match=r"train_dataset: 1 of its longest .* record 3 takes"):
        start([*good, long], max_length=60)
    held_out = {"one": [long], "two": good} if several else [long]
    with pytest.raises(ValueError, match=r"eval_dataset: .*at most 59.*without_overlong"):
        start(good, eval_dataset=held_out, max_length=60)
    start([*good, long])
