"""A tokenizer, a rollout of two responses, a small classifier."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from word_tokenizers import WORDS, word_tokenizer

from mossrlhf.types import Rollout

CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def rollout(tokenizer):
    """ "hi there" → "fine thanks </s>", its mask with a hole, and "how are you" → "fine"."""
    first, second = (tokenizer.encode(t) for t in ("hi there fine thanks </s>", "how are you fine"))
    return Rollout(
        input_ids=torch.tensor([first, [*second, 0]]),
        prompt_lengths=torch.tensor([2, 3]),
        response_lengths=torch.tensor([3, 1]),
        truncated=torch.tensor([False, True]),
        mask=torch.tensor([[True, False, True], [True, False, False]]),
        columns={"prompt": ["hi there", "how are you"], "answer": ["A", "B"]},
    )


@pytest.fixture
def make_classifier():
    def make(labels=1):
        config = LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.3, pad_token_id=19, num_labels=labels,
        )  # fmt: skip
        return LlamaForSequenceClassification(config)

    return make


@pytest.fixture
def classifier(make_classifier):
    return make_classifier()
