"""Tiny Llamas and GPT-2s, sequence classifiers, and a batch whose numbers are known by hand."""

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from mossrlhf.types import Rollout

V, PAD = 23, 22
LLAMA = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    pad_token_id=PAD,
    initializer_range=0.3,
)
GPT2 = dict(
    vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=PAD,
    bos_token_id=PAD, eos_token_id=V - 2, initializer_range=0.3,
)  # fmt: skip
CLASSIFIERS = {
    "llama": lambda **more: LlamaForSequenceClassification(LlamaConfig(**LLAMA, **more)),
    "gpt2": lambda **more: GPT2ForSequenceClassification(GPT2Config(**GPT2, **more)),
}
LANGUAGE_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}


def small_batch():
    """Return prompts of 3 and 1 tokens, and responses of 2 and 4 with a hole in the mask."""
    return Rollout(
        input_ids=torch.tensor([[1, 2, 3, 4, 5], [6, 7, 9, 10, 11]]),
        prompt_lengths=torch.tensor([3, 1]),
        response_lengths=torch.tensor([2, 4]),
        truncated=torch.tensor([False, False]),
        mask=torch.tensor([[True, True, False, False], [True, True, False, True]]),
    )


def padded(rows, side, more=0):
    """Return rows of ids as a batch with its attention mask, padded on one side."""
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, place], mask[b, place] = torch.tensor(row), True
    return ids, mask
