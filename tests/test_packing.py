"""Sequences end to end: the numbers of those with padding, or none of it."""

import copy
import threading
from contextlib import suppress
from dataclasses import dataclass

import peft
import pytest
import torch
from rollouts import recorded_rollout
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
from mossrlhf.models import packing, policy_stats
from mossrlhf.models.packing import APART, attend_apart, packs, states
from mossrlhf.roles import checkpoint_activations

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
    # These three tell their layers nothing of it; and of a few tokens it is not to be seen.
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
    """Weights larger than at birth, for differences to be seen; and none of them zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def with_padding(model):
    """The oracle: transformers' own, told of the padding."""
    positions = (TOKENS.long().cumsum(1) - 1).clamp(min=0)
    given = {} if isinstance(model, BloomModel) else {"position_ids": positions}
    if isinstance(model, BertModel):
        given = {}
    output = model(input_ids=IDS, attention_mask=TOKENS.long(), use_cache=False, **given)
    return output.last_hidden_state


def by_states(model):
    return states(model, IDS, TOKENS)


def learned(model, ask):
    """Hidden states of the tokens, and the gradients of all parameters."""
    model.zero_grad()
    hidden = ask(model)[TOKENS]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (weights * hidden.float()).sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), named


def close(ours, theirs, bound=1e-5):
    distance = torch.linalg.vector_norm((ours - theirs).double())
    return bool(distance <= bound * torch.linalg.vector_norm(theirs.double()))


def require_equal(model, bound=1e-5):
    hidden, gradients = learned(model, with_padding)
    ours, found = learned(model, by_states)
    assert close(ours, hidden, bound)
    assert found.keys() == gradients.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Biases of keys have no gradient but rounding.
        gap = (found[name] - gradient).norm()
        assert gap <= bound * gradient.norm() or gap <= 0.1 * bound * largest, name


@dataclass
class Packed:
    """Shapes of what has been read end to end."""

    shapes: list


@pytest.fixture
def packed(monkeypatch):
    """Counts what is read end to end, the question whether to do so aside."""
    seen, original = Packed([]), packing._packed

    def spy(backbone, input_ids, tokens):
        seen.shapes.append(tuple(tokens.shape))
        return original(backbone, input_ids, tokens)

    asked = packing._probed

    def quietly(backbone):
        found = asked(backbone)
        seen.shapes.clear()
        return found

    monkeypatch.setattr(packing, "_packed", spy)
    monkeypatch.setattr(packing, "_probed", quietly)
    return seen


@pytest.fixture
def llama():
    return grown(PACKING["llama"]())


@pytest.mark.parametrize("family", PACKING)
def test_states_and_all_gradients_are_those_with_padding(family, packed):
    model = grown(PACKING[family]())
    assert packs(model)
    require_equal(model)
    assert packed.shapes == [(4, 20)]


@pytest.mark.parametrize("kind", OTHERS)
def test_what_asks_for_more_is_read_with_padding(kind, packed):
    model = grown(OTHERS[kind]())
    assert not packs(model)
    require_equal(model)
    assert packed.shapes == []


def test_a_window_longer_than_the_question_is_seen(packed):
    """The question is of five tokens, the usual window of thousands."""
    model = grown(PhimoeModel(PhimoeConfig(**GROUPED, sliding_window=4096, num_local_experts=2)))
    assert not packs(model)


def test_padding_reads_zero(llama):
    assert not by_states(llama)[~TOKENS].any()


def test_a_row_without_tokens(llama, packed):
    tokens = TOKENS.clone()
    tokens[1:3] = False
    found = states(llama, IDS, tokens, right_padded=True)
    assert packed.shapes == [(4, 20)]
    assert close(found[tokens], with_padding(llama)[tokens])


def test_nothing_leaks_into_a_neighbor(llama):
    """Other tokens in the first and in the last sequence change no other sequence."""
    changed = IDS.clone()
    changed[[0, 3]] = (IDS[[0, 3]] + 1).clamp(max=VOCABULARY - 1)
    before, after = (states(llama, ids, TOKENS).detach() for ids in (IDS, changed))
    assert torch.equal(before[1:3], after[1:3])
    assert not torch.isclose(before[[0, 3]], after[[0, 3]]).all(dim=-1)[TOKENS[[0, 3]]].any()


def test_a_critic_is_read_end_to_end(llama, packed):
    critic = RewardModel(llama)
    torch.nn.init.normal_(critic.score.weight)
    found = critic.token_values(IDS, TOKENS)
    assert packed.shapes == [(4, 20)]
    assert close(found[TOKENS], critic.score(with_padding(llama))[TOKENS])
    scores = critic(IDS, TOKENS)
    assert close(scores, critic.score(with_padding(llama))[torch.arange(4), LENGTHS - 1])


def policy(**options):
    config = WORLD.model_config(hidden_size=32)
    return grown(LlamaForCausalLM(config)).requires_grad_(True)


def stats_both_ways(model, packed, monkeypatch):
    """Log-probabilities, entropies and gradients, end to end and with padding."""
    batch, found = recorded_rollout(WORLD), []
    for allowed in (True, False):
        if not allowed:
            assert packed.shapes == [tuple(batch.input_ids.shape)]
            monkeypatch.setattr(packing, "packs", lambda backbone: False)
        model.zero_grad()
        stats = policy_stats(model, batch, 0.7, entropy=True)
        (stats.logprob.sum() + (stats.entropy**2).sum()).backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((stats.logprob.detach(), stats.entropy.detach(), torch.cat(grads)))
    assert len(packed.shapes) == 1
    return found


def test_a_policy_is_read_end_to_end(packed, monkeypatch):
    ours, theirs = stats_both_ways(policy(), packed, monkeypatch)
    assert all(map(close, ours, theirs))


def test_a_policy_with_adapters(packed, monkeypatch):
    settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(policy(), settings)
    ours, theirs = stats_both_ways(model, packed, monkeypatch)
    assert all(map(close, ours, theirs))
    assert theirs[2].numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_autocast(llama, packed):
    """Rounded to bfloat16, the two are as far from float32 as each other."""
    exact = with_padding(llama)[TOKENS].detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = by_states(llama)[TOKENS].detach(), with_padding(llama)[TOKENS].detach()
    assert packed.shapes == [(4, 20)]
    assert ours.dtype == theirs.dtype
    assert close(ours, theirs, 0.02)
    assert not close(theirs, exact, 1e-4)


def test_recomputed_activations_are_read_with_padding(llama, packed):
    assert packs(llama)  # remembered, and of no consequence
    checkpoint_activations(llama)
    llama.train()
    assert not packs(llama)
    require_equal(llama)
    getattr(llama, "activation_checkpointing_disable", llama.gradient_checkpointing_disable)()
    assert packs(llama)


def test_activations_recomputed_by_a_wrapper_are_too(llama, packed):
    """In the backward pass, `attend_apart` would no longer be in force."""
    assert packs(llama)
    kind = type(llama.layers[0])
    apply_activation_checkpointing(llama, check_fn=lambda module: isinstance(module, kind))
    assert not packs(llama)
    require_equal(llama)
    assert packed.shapes == []


def test_a_sharded_model_is_not_asked(llama, monkeypatch):
    monkeypatch.setattr(packing, "is_sharded", lambda model: True)
    monkeypatch.setattr(packing, "_probed", lambda backbone: pytest.fail("it was asked"))
    assert not packs(llama)
    assert close(by_states(llama)[TOKENS], with_padding(llama)[TOKENS])
    monkeypatch.undo()
    assert packs(llama)  # that it was not asked is not remembered


def test_eager_attention_is_respected_later_too(llama):
    assert packs(llama)
    llama.set_attn_implementation("eager")
    assert not packs(llama)


@pytest.mark.parametrize("training", [True, False])
def test_the_question_leaves_modes(llama, training):
    llama.train(training)
    llama.layers[0].train(not training)
    modes = [module.training for module in llama.modules()]
    assert packs(llama)
    assert [module.training for module in llama.modules()] == modes
    assert llama.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_attention_is_put_back(llama):
    by_states(llama)
    assert llama.config._attn_implementation == "sdpa"

    def fail(*_):
        assert llama.config._attn_implementation == APART
        raise RuntimeError("no more")

    hook = llama.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no more"):
        by_states(llama)
    hook.remove()
    assert llama.config._attn_implementation == "sdpa"


def test_a_question_that_fails_is_a_no_and_leaves_all_as_it_was():
    model = grown(PACKING["llama"]()).train()
    model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    assert not packs(model)
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


def test_parts_that_read_no_text_keep_their_attention(packed):
    model = llava()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    assert packs(model)
    with torch.no_grad():
        ids = IDS.clamp(max=VOCABULARY - 2)
        found = states(model, ids, TOKENS)
        oracle = model(input_ids=ids, attention_mask=TOKENS.long()).last_hidden_state
    assert packed.shapes == [(4, 20)]
    assert close(found[TOKENS], oracle[TOKENS])
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_text_by_eager_attention_is_read_with_padding():
    model = llava()
    model.set_attn_implementation({"text_config": "eager"})
    assert not packs(model)


def test_threads_at_one_model_do_not_undo_each_other(llama):
    """Both are inside at once; what the second found there would be what it puts back."""
    inside, failed = threading.Barrier(2), []
    model, other = llama, copy.copy(llama)  # the same configuration
    expected = by_states(model).detach()

    def wait(*_):
        with suppress(threading.BrokenBarrierError):
            inside.wait(0.2)

    model.layers[0].register_forward_pre_hook(wait)

    def work(backbone):
        if not close(states(backbone, IDS, TOKENS).detach(), expected):
            failed.append(backbone)

    assert packs(other)
    threads = [threading.Thread(target=work, args=(backbone,)) for backbone in (model, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert model.config._attn_implementation == "sdpa"


def mask_of(*lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_little_padding_is_read(llama, packed):
    ids = torch.randint(3, VOCABULARY, (2, 40))
    for shorter, expected in ((40, []), (37, []), (35, [(2, 40)])):  # 0, 3.75 and 6.25 %
        states(llama, ids, mask_of(40, shorter, width=40))
        assert packed.shapes == expected


def test_padding_on_the_left_is_read(llama, packed):
    lead = TOKENS.flip(1)
    ids = torch.zeros_like(IDS)
    ids[lead] = IDS[TOKENS]
    found = states(llama, ids, lead)
    assert packed.shapes == []
    assert close(found[lead], with_padding(llama)[TOKENS])


class TestAttendApart:
    query = torch.randn(1, 4, 6, 8)
    key, value = torch.randn(2, 1, 2, 6, 8)

    def ask(self, lengths=(2, 4), mask=None, **options):
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal = 2, True
        return attend_apart(module, self.query, self.key, self.value, mask, lengths, **options)[0]

    def test_is_causal_attention_within_each_sequence(self):
        heads = torch.arange(4) // 2
        behind = torch.ones(6, 6, dtype=torch.bool).tril()
        together = torch.tensor([0, 0, 1, 1, 1, 1])
        seen = behind & (together[:, None] == together)
        scores = self.query @ self.key[:, heads].mT / 8**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = (weights @ self.value[:, heads]).transpose(1, 2)
        torch.testing.assert_close(self.ask(), expected)

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
    def test_refuses_what_it_would_leave_out(self, options, named):
        with pytest.raises(ValueError, match=f"attend_apart: cannot do .*{named}"):
            self.ask(**options)

    def test_options_that_are_off_are_none(self):
        assert self.ask(sliding_window=None, softcap=None).shape == (1, 6, 4, 8)
