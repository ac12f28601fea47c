"""Packed sequences and omitted masks change no hidden state, no gradient and no module."""

import copy
import threading
from contextlib import suppress

import peft
import pytest
import torch
from families import FAMILIES, tiny
from rollouts import recorded_rollout
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    Llama4TextConfig,
    Llama4TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaModel,
    MistralConfig,
    MistralModel,
    OPTConfig,
    OPTModel,
    PhimoeConfig,
    PhimoeModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3NextConfig,
    Qwen3NextModel,
)

from mossrlhf import RewardModel, ToyWorld
from mossrlhf.loading.policy import checkpoint_activations
from mossrlhf.models import backbone, policy_stats
from mossrlhf.models.backbone import (
    PACKED_ATTENTION,
    can_pack,
    evaluation_mode,
    group_by_length,
    is_causal,
    last_hidden_states,
    needed_mask,
    packed_attention,
)
from mossrlhf.models.token_logprobs import hidden_states

# peft 0.21 asks transformers 5.23 for a property that has another name now.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

WORLD = ToyWorld(lang="en", seed=0)
VOCABULARY, WINDOW = 60, 8
LENGTHS = torch.tensor([3, 20, 1, 9])
TOKENS = torch.arange(20) < LENGTHS[:, None]
IDS = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))

SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
WIDE = dict(**SMALL, intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(**WIDE, num_key_value_heads=2)
MIXED = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    shared_expert_intermediate_size=16,
    layer_types=["linear_attention", "full_attention"],
)

PACKING = {
    "llama": lambda: LlamaModel(LlamaConfig(**GROUPED)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**GROUPED, head_dim=8)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)),
    "gpt-neox": lambda: GPTNeoXModel(GPTNeoXConfig(**WIDE)),
    "opt": lambda: OPTModel(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "mistral without a window": lambda: MistralModel(MistralConfig(**GROUPED, sliding_window=None)),
}

OTHERS = {
    "a window": lambda: MistralModel(MistralConfig(**GROUPED, sliding_window=WINDOW)),
    # The configuration alone tells; the probe is shorter than the window.
    "a window in the mask": lambda: PhimoeModel(
        PhimoeConfig(**GROUPED, sliding_window=WINDOW, num_local_experts=2)
    ),
    "chunks": lambda: Llama4TextModel(
        Llama4TextConfig(
            **GROUPED,
            attention_chunk_size=WINDOW,
            intermediate_size_mlp=48,
            head_dim=8,
            num_local_experts=2,
        )
    ),
    "state": lambda: Qwen3NextModel(Qwen3NextConfig(**GROUPED, head_dim=8, **MIXED, **LINEAR)),
    "capped attention": lambda: Gemma2Model(
        Gemma2Config(**GROUPED, head_dim=8, sliding_window=WINDOW)
    ),
    "eager attention": lambda: LlamaModel(LlamaConfig(**GROUPED, attn_implementation="eager")),
    "biases by distance": lambda: BloomModel(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
    "no causality": lambda: BertModel(BertConfig(**WIDE)),
}


def grown(model):
    """Return the model with larger weights, none of them zero, so that differences show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def with_padding(model):
    """Return transformers' own hidden states, given the mask: the oracle."""
    positions = (TOKENS.long().cumsum(1) - 1).clamp(min=0)
    given = {} if isinstance(model, BloomModel) else {"position_ids": positions}
    if isinstance(model, BertModel):
        given = {}
    output = model(input_ids=IDS, attention_mask=TOKENS.long(), use_cache=False, **given)
    return output.last_hidden_state


def packed_or_padded(model):
    return last_hidden_states(model, IDS, TOKENS)


def states_and_gradients(model, run):
    """Return the hidden states of the tokens, and the gradients of all parameters."""
    model.zero_grad()
    hidden = run(model)[TOKENS]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (weights * hidden.float()).sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), named


def close(ours, theirs, bound=1e-5):
    distance = torch.linalg.vector_norm((ours - theirs).double())
    return bool(distance <= bound * torch.linalg.vector_norm(theirs.double()))


def require_equal(model, bound=1e-5):
    hidden, gradients = states_and_gradients(model, with_padding)
    ours, found = states_and_gradients(model, packed_or_padded)
    assert close(ours, hidden, bound)
    assert found.keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Biases of keys have no gradient but rounding.
        gap = (found[name] - gradient).norm()
        assert gap <= bound * gradient.norm() or gap <= 0.1 * bound * largest, name


@pytest.fixture
def packed(monkeypatch):
    """Lists the shapes of packed batches, without that of the probe."""
    shapes, forward, probe = [], backbone._packed_forward, backbone._probe_packing

    def counted(model, input_ids, tokens):
        shapes.append(tuple(tokens.shape))
        return forward(model, input_ids, tokens)

    def not_counted(model):
        found = probe(model)
        shapes.clear()
        return found

    monkeypatch.setattr(backbone, "_packed_forward", counted)
    monkeypatch.setattr(backbone, "_probe_packing", not_counted)
    return shapes


@pytest.fixture
def llama():
    return grown(PACKING["llama"]())


@pytest.mark.parametrize("family", PACKING)
def test_packing_keeps_hidden_states_and_gradients(family, packed):
    model = grown(PACKING[family]())
    assert can_pack(model)
    require_equal(model)
    assert packed == [(4, 20)]


@pytest.mark.parametrize("kind", OTHERS)
def test_models_beyond_causal_attention_are_not_packed(kind, packed):
    model = grown(OTHERS[kind]())
    assert not can_pack(model)
    require_equal(model)
    assert packed == []


def test_a_window_longer_than_the_probe_prevents_packing(packed):
    """The probe has five tokens, the usual window thousands."""
    model = grown(PhimoeModel(PhimoeConfig(**GROUPED, sliding_window=4096, num_local_experts=2)))
    assert not can_pack(model)


def test_packed_hidden_states_are_zero_on_padding(llama):
    assert not packed_or_padded(llama)[~TOKENS].any()


def test_packing_skips_rows_without_tokens(llama, packed):
    tokens = TOKENS.clone()
    tokens[1:3] = False
    found = last_hidden_states(llama, IDS, tokens, right_padded=True)
    assert packed == [(4, 20)]
    assert close(found[tokens], with_padding(llama)[tokens])


def test_packed_sequences_do_not_attend_to_each_other(llama):
    """Other tokens in the first and in the last sequence change no other sequence."""
    changed = IDS.clone()
    changed[[0, 3]] = (IDS[[0, 3]] + 1).clamp(max=VOCABULARY - 1)
    before, after = (last_hidden_states(llama, ids, TOKENS).detach() for ids in (IDS, changed))
    assert torch.equal(before[1:3], after[1:3])
    assert not torch.isclose(before[[0, 3]], after[[0, 3]]).all(dim=-1)[TOKENS[[0, 3]]].any()


def test_packing_keeps_the_values_of_a_critic(llama, packed):
    critic = RewardModel(llama)
    torch.nn.init.normal_(critic.score.weight)
    found = critic.token_values(IDS, TOKENS)
    assert packed == [(4, 20)]
    assert close(found[TOKENS], critic.score(with_padding(llama))[TOKENS])
    scores = critic(IDS, TOKENS)
    assert close(scores, critic.score(with_padding(llama))[torch.arange(4), LENGTHS - 1])


def policy(**options):
    config = WORLD.model_config(hidden_size=32)
    return grown(LlamaForCausalLM(config)).requires_grad_(True)


def stats_both_ways(model, packed, monkeypatch):
    """Return log-probabilities, entropies and gradients, packed and with padding."""
    batch, found = recorded_rollout(WORLD), []
    for allowed in (True, False):
        if not allowed:
            assert packed == [tuple(batch.input_ids.shape)]
            monkeypatch.setattr(backbone, "can_pack", lambda model: False)
        model.zero_grad()
        stats = policy_stats(model, batch, 0.7, entropy=True)
        (stats.logprob.sum() + (stats.entropy**2).sum()).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((stats.logprob.detach(), stats.entropy.detach(), torch.cat(grads)))
    assert len(packed) == 1
    return found


def test_packing_keeps_the_statistics_of_a_policy(packed, monkeypatch):
    ours, theirs = stats_both_ways(policy(), packed, monkeypatch)
    assert all(map(close, ours, theirs))


def test_packing_keeps_the_statistics_of_an_adapted_policy(packed, monkeypatch):
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(policy(), settings)
    ours, theirs = stats_both_ways(model, packed, monkeypatch)
    assert all(map(close, ours, theirs))
    assert theirs[2].numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_packing_under_autocast_rounds_as_padding_does(llama, packed):
    """Both are equally far from float32."""
    exact = with_padding(llama)[TOKENS].detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            packed_or_padded(llama)[TOKENS].detach(),
            with_padding(llama)[TOKENS].detach(),
        )
    assert packed == [(4, 20)]
    assert ours.dtype == theirs.dtype
    assert close(ours, theirs, 0.02)
    assert not close(theirs, exact, 1e-4)


def test_activation_checkpointing_prevents_packing(llama, packed):
    assert can_pack(llama)  # remembered, but overruled
    checkpoint_activations(llama)
    llama.train()
    assert not can_pack(llama)
    require_equal(llama)
    getattr(llama, "activation_checkpointing_disable", llama.gradient_checkpointing_disable)()
    assert can_pack(llama)


def test_checkpoint_wrappers_of_fsdp_prevent_packing(llama, packed):
    """In the backward pass, `packed_attention` would no longer be selected."""
    assert can_pack(llama)
    kind = type(llama.layers[0])
    apply_activation_checkpointing(llama, check_fn=lambda module: isinstance(module, kind))
    assert not can_pack(llama)
    require_equal(llama)
    assert packed == []


def test_a_sharded_model_is_not_probed_for_packing(llama, monkeypatch):
    monkeypatch.setattr(backbone, "is_sharded", lambda model: True)
    monkeypatch.setattr(backbone, "_probe_packing", lambda model: pytest.fail("it was probed"))
    assert not can_pack(llama)
    assert close(packed_or_padded(llama)[TOKENS], with_padding(llama)[TOKENS])
    monkeypatch.undo()
    assert can_pack(llama)  # probed now: the answer before was not remembered


def test_packing_stops_when_attention_becomes_eager(llama):
    assert can_pack(llama)
    llama.set_attn_implementation("eager")
    assert not can_pack(llama)


@pytest.mark.parametrize("training", [True, False])
def test_probing_packing_restores_modes(llama, training):
    llama.train(training)
    llama.layers[0].train(not training)
    modes = [module.training for module in llama.modules()]
    assert can_pack(llama)
    assert [module.training for module in llama.modules()] == modes
    assert llama.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_packing_restores_the_attention_implementation(llama):
    packed_or_padded(llama)
    assert llama.config._attn_implementation == "sdpa"

    def fail(*_):
        assert llama.config._attn_implementation == PACKED_ATTENTION
        raise RuntimeError("no more")

    hook = llama.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        packed_or_padded(llama)
    hook.remove()
    assert llama.config._attn_implementation == "sdpa"


def test_a_failing_probe_prevents_packing_and_restores_the_model():
    model = grown(PACKING["llama"]()).train()
    model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    assert not can_pack(model)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def llava():
    looking = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, patch_size=4)
    config = LlavaConfig(
        text_config=LlamaConfig(**GROUPED),
        vision_config=CLIPVisionConfig(**looking, num_attention_heads=4, image_size=8),
        image_token_index=VOCABULARY - 1,
    )
    return grown(LlavaModel(config))


def test_packing_leaves_the_attention_of_vision_parts(packed):
    model = llava()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    assert can_pack(model)
    with torch.no_grad():
        ids = IDS.clamp(max=VOCABULARY - 2)
        found = last_hidden_states(model, ids, TOKENS)
        oracle = model(input_ids=ids, attention_mask=TOKENS.long()).last_hidden_state
    assert packed == [(4, 20)]
    assert close(found[TOKENS], oracle[TOKENS])
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_eager_attention_of_the_language_part_prevents_packing():
    model = llava()
    model.set_attn_implementation({"text_config": "eager"})
    assert not can_pack(model)


def test_packing_is_thread_safe(llama):
    """Of two threads in a forward at once, the second would restore what the first has set."""
    both, failed = threading.Barrier(2), []
    model, other = llama, copy.copy(llama)  # the same configuration
    expected = packed_or_padded(model).detach()

    def wait(*_):
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)

    model.layers[0].register_forward_pre_hook(wait)

    def work(model):
        if not close(last_hidden_states(model, IDS, TOKENS).detach(), expected):
            failed.append(model)

    assert can_pack(other)
    threads = [threading.Thread(target=work, args=(one,)) for one in (model, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert model.config._attn_implementation == "sdpa"


def mask_of(*lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_little_padding_is_not_packed(llama, packed):
    ids = torch.randint(3, VOCABULARY, (2, 40))
    for shorter, expected in ((40, []), (37, []), (35, [(2, 40)])):  # 0, 3.75 and 6.25 %
        last_hidden_states(llama, ids, mask_of(40, shorter, width=40))
        assert packed == expected


def test_left_padding_is_not_packed(llama, packed):
    lead = TOKENS.flip(1)
    ids = torch.zeros_like(IDS)
    ids[lead] = IDS[TOKENS]
    found = last_hidden_states(llama, ids, lead)
    assert packed == []
    assert close(found[lead], with_padding(llama)[TOKENS])


class TestPackedAttention:
    query = torch.randn(1, 4, 6, 8)
    key, value = torch.randn(2, 1, 2, 6, 8)

    def attend(self, lengths=(2, 4), mask=None, **options):
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = 2, True
        return packed_attention(module, self.query, self.key, self.value, mask, lengths, **options)[
            0
        ]

    def test_is_causal_within_each_sequence(self):
        heads = torch.arange(4) // 2
        behind = torch.ones(6, 6, dtype=torch.bool).tril()
        together = torch.tensor([0, 0, 1, 1, 1, 1])
        seen = behind & (together[:, None] == together)
        scores = self.query @ self.key[:, heads].mT / 8**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (weights @ self.value[:, heads]).transpose(1, 2)
        torch.testing.assert_close(self.attend(), expected)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            (dict(sliding_window=4096), "sliding_window"),
            (dict(softcap=30.0), "softcap"),
            (dict(s_aux=torch.zeros(4)), "s_aux"),
            (dict(position_bias=torch.zeros(1, 4, 6, 6)), "position_bias"),
            (dict(mask=torch.ones(1, 1, 6, 6, dtype=torch.bool)), "masks"),
            (dict(lengths=(2, 3)), "was not told the lengths"),
        ],
        ids=str,
    )
    def test_refuses_options_it_would_ignore(self, options, named):
        with pytest.raises(ValueError, match=f"packed_attention: cannot do .*{named}"):
            self.attend(**options)

    def test_accepts_options_that_are_off(self):
        assert self.attend(sliding_window=None, softcap=None).shape == (1, 6, 4, 8)


LENGTH = 3 * WINDOW


def right(lengths=(LENGTH, 5, 1, 13)):
    """Return a mask of right padding."""
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def ids():
    torch.manual_seed(1)
    return torch.randint(3, 30, (4, LENGTH))


def family(name):
    return tiny(name, WORLD.tokenizer(), initializer_range=0.2).eval()


TINY = dict(vocab_size=60, hidden_size=16, intermediate_size=24)
LAYERS = dict(num_hidden_layers=2, num_attention_heads=2)


def bert(**options):
    torch.manual_seed(1)
    return BertModel(BertConfig(**TINY, **LAYERS, **options)).eval()


def bidirectional_llama():
    """A Llama that attends to later tokens by configuration."""
    torch.manual_seed(1)
    made = LlamaModel(LlamaConfig(**TINY, **LAYERS, is_causal=False)).eval()
    for layer in made.layers:
        layer.self_attn.is_causal = False
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_causal_models_get_no_mask_and_keep_their_hidden_states(name):
    given = family(name)
    assert is_causal(given.base_model)
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
def test_omitting_the_mask_keeps_values(name, monkeypatch):
    critic = RewardModel.from_language_model(family(name)).eval()
    nn.init.normal_(critic.score.weight)
    mask = right()
    found = []
    for answer in (True, False):
        monkeypatch.setattr(backbone, "is_causal", lambda _, answer=answer: answer)
        for known in (None, True):
            with torch.no_grad():
                found.append(critic.token_values(ids(), mask, known)[mask])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_omitting_the_mask_keeps_gradients(monkeypatch):
    found = []
    for answer in (True, False):
        monkeypatch.setattr(backbone, "is_causal", lambda _, answer=answer: answer)
        given, mask = family("llama"), right()
        hidden_states(given, ids(), mask)[mask].square().sum().backward()
        found.append([p.grad for p in given.base_model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [bert, bidirectional_llama])
def test_bidirectional_models_get_their_mask(build):
    given, mask = build(), right()
    assert not is_causal(given)
    needed = needed_mask(given, mask, True)
    assert needed is not None
    assert torch.equal(needed, mask.long())


def test_an_encoder_made_a_decoder_is_causal():
    assert is_causal(bert(is_decoder=True))


def test_padding_that_is_not_on_the_right_keeps_the_mask():
    llama = family("llama").base_model
    masks = {"left": right().flip(1), "hole": right().clone(), "none": right((0, 3, 4, 5))}
    masks["hole"][0, 4] = False
    for name, mask in masks.items():
        needed = needed_mask(llama, mask)
        assert needed is not None, name
        assert needed.dtype == torch.long
        assert torch.equal(needed, mask.long())
    for mask in (right(), right().long(), torch.ones(4, LENGTH), right().float()):
        assert needed_mask(llama, mask) is None


def test_masks_on_other_devices_are_not_inspected():
    llama = family("llama").base_model
    assert is_causal(llama)
    mask = torch.ones(2, 3, device="meta")
    assert needed_mask(llama, mask) is not None
    assert needed_mask(llama, mask, True) is None
    assert needed_mask(llama, mask, False) is not None


def test_sharded_models_get_their_mask_and_are_not_probed(monkeypatch):
    llama, calls = family("llama").base_model, []
    llama.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(backbone, "is_sharded", lambda *_: True)
    assert not is_causal(llama)
    assert calls == []
    monkeypatch.setattr(backbone, "is_sharded", lambda *_: False)
    assert is_causal(llama)  # probed now: the answer before was not remembered
    monkeypatch.setattr(backbone, "is_sharded", lambda *_: True)
    assert is_causal(llama)  # this answer is remembered
    assert len(calls) == 3


def test_probing_causality_leaves_modes_weights_and_random_state():
    given = family("llama")
    llama = given.base_model.train()
    llama.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    state = copy.deepcopy(llama.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert is_causal(llama)
    assert [module.training for module in llama.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in llama.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in llama.parameters())


def test_models_that_cannot_be_probed_get_their_mask():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, attention_mask, use_cache):
            return attention_mask.long()

    assert not is_causal(Broken())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_causality_is_probed_in_every_type(dtype):
    for name in FAMILIES:
        assert is_causal(family(name).base_model.to(dtype)), name
    for build in (bert, bidirectional_llama):
        assert not is_causal(build().to(dtype))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 3, 0, 2]]),
        (dict(size=3), [[1, 3, 0], [2]]),
        (dict(max_tokens=8), [[1, 3], [0], [2]]),  # 2 × 2, then 5, then 9 tokens
        (dict(max_tokens=15), [[1, 3, 0], [2]]),
        (dict(size=1, max_tokens=15), [[1], [3], [0], [2]]),
    ],
)
def test_group_by_length_counts_rows_and_padded_tokens(options, expected):
    groups = group_by_length(torch.tensor([5, 2, 9, 2]), **options)
    assert [group.tolist() for group in groups] == expected


def test_group_by_length_of_nothing():
    assert group_by_length(torch.zeros(0, dtype=torch.long), 4) == []


def test_evaluation_mode_restores_each_module_after_an_error():
    llama = family("llama").base_model.train()
    llama.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    llama.register_forward_pre_hook(lambda *_: llama.training or 1 / 0)
    with pytest.raises(ZeroDivisionError), evaluation_mode(llama):
        llama(IDS)
    assert [module.training for module in llama.modules()] == modes
