"""A tokenizer of a few words, and quiet `TrainingArguments`."""

import pytest
from preferences import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainingArguments


@pytest.fixture(scope="module")
def tokenizer():
    words = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    core = Tokenizer(words)
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def arguments(tmp_path):
    def make(**changes):
        quiet = dict(
            output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, save_strategy="no", logging_strategy="no",
            per_device_eval_batch_size=4, max_grad_norm=0.0,
        )  # fmt: skip
        return TrainingArguments(**{**quiet, **changes})

    return make


@pytest.fixture(autouse=True)
def _silence(monkeypatch):
    """Without a progress bar the trainer prints its logs."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: None)
