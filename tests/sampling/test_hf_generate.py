"""What `HFSampler` passes to ``generate``, and what it requires of it."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf import HFSampler


def llama(kind=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    shape = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, eos_token_id=2, max_position_embeddings=64)
    return kind(LlamaConfig(**shape, **heads, **config)).eval()


def sampled(model):
    sampler = HFSampler(
        generation_config=GenerationConfig(max_new_tokens=4), eos_token_id=2, pad_token_id=0
    )
    return sampler(model, [[5, 6, 7], [8]])


def test_processes_sample_without_waiting_for_each_other():
    """`generate` would have each wait for the slowest at every token, and segments differ."""
    asked = []

    class Noting(LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            asked.append(kwargs["synced_gpus"])
            return super().generate(*args, **kwargs)

    sampled(llama(Noting))
    assert asked == [False]


def test_a_generate_that_ignores_our_logits_processor_is_refused():
    class Deaf(LlamaForCausalLM):
        def generate(self, ids, logits_processor=None, **kwargs):
            return super().generate(ids, **kwargs)

    with pytest.raises(ValueError, match="has passed over logits_processor="):
        sampled(llama(Deaf))
