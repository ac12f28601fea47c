"""What is done for speed keeps out of the way of what others do."""

import copy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf import HFSampler
from mossrlhf.kernels import fast_products, products, use_products
from mossrlhf.serialization import pack_optimizer, unpack_optimizer

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch comes without oneDNN")


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


class Ones(LlamaForCausalLM):
    """Draws from something else than what it says of tokens."""

    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


class TestOnlyWhatIsExactIsReused:
    def test_plain(self):
        assert drawn(llama()).logprobs is not None

    def test_a_generate_of_the_users(self):
        rollout = drawn(llama(Ones))
        assert rollout.logprobs is None
        assert rollout.sampler_logprobs is not None

    @pytest.mark.parametrize("kind", ["dynamic", "default"])
    def test_angles_that_depend_on_the_length(self, kind):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
        rollout = drawn(llama(rope_parameters=rope if kind != "default" else None))
        assert (rollout.logprobs is None) == (kind == "dynamic")

    def test_a_generate_that_passes_over_the_draws(self):
        class Deaf(LlamaForCausalLM):
            def generate(self, ids, logits_processor=None, **kwargs):
                return super().generate(ids, **kwargs)

        with pytest.raises(ValueError, match="has passed over logits_processor="):
            drawn(llama(Deaf))


@needs_onednn
class TestBias:
    """oneDNN would read a row of numbers from where it begins, whatever its strides."""

    @pytest.mark.parametrize(
        "bias",
        [torch.randn(96)[::2], torch.ones(1).expand(48), torch.randn(48), torch.randn(1)],
        ids=["strided", "expanded", "plain", "one for all"],
    )
    def test_linear(self, bias):
        x, weight = torch.randn(256, 128), torch.randn(48, 128)
        expected = nn.functional.linear(x, weight, bias)
        with use_products("onednn"), fast_products():
            got = nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@needs_onednn
class TestPatchesOfOthers:
    def test_one_that_was_there_before_stays(self, monkeypatch):
        def theirs(*args):
            return torch._C._nn.linear(*args)

        monkeypatch.setattr(nn.functional, "linear", theirs)
        with use_products("onednn"), fast_products():
            assert nn.functional.linear is theirs
        assert nn.functional.linear is theirs

    def test_where_blas_multiplies_nothing_is_touched(self):
        before = nn.functional.linear
        with use_products("blas"), fast_products():
            assert nn.functional.linear is before

    def test_functions_of_functions_go_torchs_way(self):
        layer, x = nn.Linear(128, 64), torch.randn(256, 4, 128)
        with use_products("onednn"), fast_products():
            assert products().name == "onednn"
            got = torch.func.vmap(layer)(x)
        torch.testing.assert_close(got, layer(x), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_frozen_layers_keep_no_inputs():
    """An adapter's base is frozen: torch keeps nothing of what goes into it."""
    layer = nn.Linear(128, 64).requires_grad_(False)
    x = torch.randn(512, 128, requires_grad=True)
    kept = []
    with (
        use_products("onednn"),
        fast_products(),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
    ):
        layer(x).sum().backward()
    assert x.numel() not in kept
    assert x.grad is not None


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
