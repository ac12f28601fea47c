"""A mask is left out where no token's state depends on it, and nowhere else."""

import copy

import pytest
import torch
from families import FAMILIES, WINDOW, tiny
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from mossrlhf import RewardModel, ToyWorld
from mossrlhf.models import padding
from mossrlhf.models.padding import looks_back, needed_mask
from mossrlhf.models.token_path import hidden_states

LENGTH = 3 * WINDOW


def right(lengths=(LENGTH, 5, 1, 13)):
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def ids():
    torch.manual_seed(1)
    return torch.randint(3, 30, (4, LENGTH))


def model(name):
    return tiny(name, ToyWorld().tokenizer(), initializer_range=0.2).eval()


def bert(**options):
    torch.manual_seed(1)
    shape = dict(vocab_size=60, hidden_size=16, intermediate_size=24)
    layers = dict(num_hidden_layers=2, num_attention_heads=2)
    return BertModel(BertConfig(**shape, **layers, **options)).eval()


def ahead():
    """A Llama whose attention looks both ways, by configuration."""
    torch.manual_seed(1)
    shape = dict(vocab_size=60, hidden_size=16, intermediate_size=24)
    layers = dict(num_hidden_layers=2, num_attention_heads=2)
    made = LlamaModel(LlamaConfig(**shape, **layers, is_causal=False)).eval()
    for layer in made.layers:
        layer.self_attn.is_causal = False
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_language_models_look_back_and_their_states_are_the_same(name):
    given = model(name)
    assert looks_back(given.base_model)
    mask = right()
    seen = []
    given.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    with torch.no_grad():
        got = hidden_states(given, ids(), mask)
        told = given.base_model(ids(), attention_mask=mask.long()).last_hidden_state
    assert seen[0] is None
    torch.testing.assert_close(got[mask], told[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_values_are_the_same_with_and_without(name, monkeypatch):
    critic = RewardModel.from_language_model(model(name)).eval()
    nn.init.normal_(critic.score.weight)
    mask = right()
    found = []
    for answer in (True, False):
        monkeypatch.setattr(padding, "looks_back", lambda _, answer=answer: answer)
        for known in (None, True):
            with torch.no_grad():
                found.append(critic.token_values(ids(), mask, known)[mask])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_gradients_are_the_same_with_and_without(monkeypatch):
    found = []
    for answer in (True, False):
        monkeypatch.setattr(padding, "looks_back", lambda _, answer=answer: answer)
        given, mask = model("llama"), right()
        hidden_states(given, ids(), mask)[mask].square().sum().backward()
        found.append([p.grad for p in given.base_model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [bert, ahead])
def test_who_looks_ahead_is_told(build):
    given, mask = build(), right()
    assert not looks_back(given)
    needed = needed_mask(given, mask, True)
    assert needed is not None
    assert torch.equal(needed, mask.long())


def test_an_encoder_made_a_decoder_looks_back():
    assert looks_back(bert(is_decoder=True))


def test_padding_elsewhere_keeps_the_mask():
    backbone = model("llama").base_model
    masks = {"left": right().flip(1), "hole": right().clone(), "none": right((0, 3, 4, 5))}
    masks["hole"][0, 4] = False
    for name, mask in masks.items():
        needed = needed_mask(backbone, mask)
        assert needed is not None, name
        assert needed.dtype == torch.long
        assert torch.equal(needed, mask.long())
    for mask in (right(), right().long(), torch.ones(4, LENGTH), right().float()):
        assert needed_mask(backbone, mask) is None


def test_on_other_devices_nobody_looks():
    backbone = model("llama").base_model
    assert looks_back(backbone)
    mask = torch.ones(2, 3, device="meta")
    assert needed_mask(backbone, mask) is not None
    assert needed_mask(backbone, mask, True) is None
    assert needed_mask(backbone, mask, False) is not None


def test_sharded_models_are_told_and_are_not_asked(monkeypatch):
    backbone, calls = model("llama").base_model, []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(padding, "is_sharded", lambda *_: True)
    assert not looks_back(backbone)
    assert calls == []
    monkeypatch.setattr(padding, "is_sharded", lambda *_: False)
    assert looks_back(backbone)  # that answer was not remembered
    monkeypatch.setattr(padding, "is_sharded", lambda *_: True)
    assert looks_back(backbone)  # this one is
    assert len(calls) == 3


def test_asking_leaves_no_trace():
    given = model("llama")
    backbone = given.base_model.train()
    backbone.layers[0].eval()
    modes = [module.training for module in backbone.modules()]
    state = copy.deepcopy(backbone.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert looks_back(backbone)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in backbone.parameters())


def test_who_cannot_be_asked_is_told():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, use_cache):
            return attention_mask.long()

    assert not looks_back(Broken())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_asked_too(dtype):
    for name in FAMILIES:
        assert looks_back(model(name).base_model.to(dtype)), name
    for build in (bert, ahead):
        assert not looks_back(build().to(dtype))
