"""What is done for speed keeps out of the way of what others do."""

import copy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf import HFSampler
from mossrlhf.checkpoint import pack_optimizer, unpack_optimizer


def llama(kind=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    shape = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, eos_token_id=2, max_position_embeddings=64)
    return kind(LlamaConfig(**shape, **heads, **config)).eval()


def drawn(model):
    sampler = HFSampler(
        generation_config=GenerationConfig(max_new_tokens=4), eos_token_id=2, pad_token_id=0
    )
    return sampler(model, [[5, 6, 7], [8]])


def test_processes_draw_at_their_own_pace():
    """`generate` would have each wait for the slowest at every token, and segments differ."""
    asked = []

    class Noting(LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            asked.append(kwargs["synced_gpus"])
            return super().generate(*args, **kwargs)

    drawn(llama(Noting))
    assert asked == [False]


def test_a_generate_that_ignores_our_logits_processor_is_refused():
    class Deaf(LlamaForCausalLM):
        def generate(self, ids, logits_processor=None, **kwargs):
            return super().generate(ids, **kwargs)

    with pytest.raises(ValueError, match="has passed over logits_processor="):
        drawn(llama(Deaf))


def test_a_checkpoint_says_nothing_of_how_steps_are_computed():
    """One of a release whose optimizers were not fused is gone on with by a fused one."""
    weight = nn.Parameter(torch.ones(3))
    old, new = (torch.optim.AdamW([weight], lr=0.1, fused=fused) for fused in (None, True))
    weight.grad = torch.ones(3)
    old.step()
    tensors, plain = pack_optimizer(old)
    unpack_optimizer(new, copy.deepcopy(tensors), copy.deepcopy(plain))
    assert new.param_groups[0]["fused"] is True
    assert new.param_groups[0]["lr"] == 0.1
    new.step()
