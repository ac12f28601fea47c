"""`generate` in segments: whatever their length, the answers are those of one go."""

import copy
from unittest.mock import MagicMock

import peft
import pytest
import torch
from families import tiny
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import utils as generation_utils

from mossrlhf import ToyWorld
from mossrlhf.sampling import HFSampler
from mossrlhf.sampling.hf import PreallocatedLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # of peft
]

LIMIT = 20
ENDS = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47]
SHAPE = dict(vocab_size=80, hidden_size=32, intermediate_size=48, initializer_range=0.3)


def prompts(count=9):
    return [[(5 * i + j) % 60 + 3 for j in range(1 + i % 5)] for i in range(count)]


def llama(**options):
    torch.manual_seed(4)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **shape, **options)).eval()


def family(name):
    return tiny(name, ToyWorld().tokenizer(), initializer_range=0.3).eval()


def mamba():
    torch.manual_seed(4)
    config = FalconMambaConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    return FalconMambaForCausalLM(config).eval()


def recurrent():
    torch.manual_seed(4)
    shape = dict(num_hidden_layers=3, num_attention_heads=4, lru_width=32)
    config = RecurrentGemmaConfig(**SHAPE, **shape, attention_window_size=8)
    return RecurrentGemmaForCausalLM(config).eval()


def soft_prompts():
    torch.manual_seed(4)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(llama(), config).eval()


MODELS = {
    "llama": llama,
    "gpt2": lambda: family("gpt2"),
    "mistral": lambda: family("mistral"),  # every layer looks back a window only
    "gemma2": lambda: family("gemma2"),
    "gemma3": lambda: family("gemma3"),
    "mamba": mamba,
    "recurrent gemma": recurrent,
    "prompt tuning": soft_prompts,
}
PADDING_MATTERS = {"prompt tuning", "recurrent gemma"}
"""The padding of a batch stands between a learned prompt and a shorter one of the user's; and where
all prompts have one token, transformers 5.23 takes the state of the batch before."""


def draw(model, segment, batch_size=None, ends=ENDS, pad=0, given=None, **config):
    settings = GenerationConfig(**{"max_new_tokens": LIMIT, "do_sample": True, **config})
    subject = HFSampler(
        generation_config=settings,
        eos_token_id=ends,
        pad_token_id=pad,
        batch_size=batch_size,
        segment=segment,
    )
    torch.manual_seed(6)
    return subject(model, prompts() if given is None else given)


def require_same(got, expected):
    assert got.completions() == expected.completions()
    assert got.prompts() == expected.prompts()
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.truncated, expected.truncated)
    ours, theirs = got.sampler_logprobs, expected.sampler_logprobs
    assert (ours is None) == (theirs is None)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


class Watched:
    """How many rows and tokens the model inside sees, call by call."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self.seen.append(next(tuple(x.shape[:2]) for x in given if x is not None))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self._handle.remove()


@pytest.mark.parametrize(
    "config", [{}, {"do_sample": False}, {"temperature": 1.4, "top_k": 9}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_segments_change_nothing(name, config):
    model = MODELS[name]()
    expected = draw(model, None, **config)
    if config.get("do_sample", True):
        assert 0 < expected.response_lengths.min() < LIMIT
        assert len(set(expected.response_lengths.tolist())) > 2
    for segment in (1, 3):
        require_same(draw(model, segment, **config), expected)
    if name not in PADDING_MATTERS:
        for batch_size in (1, 4):
            require_same(draw(model, 3, batch_size, **config), expected)


@pytest.mark.parametrize("ends", [7, [7], ENDS], ids=str)
@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("do_sample", [True, False])
def test_whatever_ends_and_pads(ends, pad, do_sample):
    model = llama()
    expected = draw(model, None, ends=ends, pad=pad, do_sample=do_sample)
    plain = draw(model, None, ends=ends, pad=79, do_sample=do_sample)
    assert plain.completions() == expected.completions()
    for segment in (1, 3):
        require_same(draw(model, segment, ends=ends, pad=pad, do_sample=do_sample), expected)


@pytest.mark.parametrize("segment", [1, 3, 5, 16, LIMIT, 50])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_rows_that_have_ended_are_let_go(name, segment):
    model = MODELS[name]()
    lengths = draw(model, None).response_lengths
    with Watched(model) as seen:
        draw(model, segment)
    most = int(lengths.max())
    # At each token: the rows there were left as its segment began.
    begun = [step // segment * segment for step in range(most)]
    assert [rows for rows, _ in seen] == [
        9 if start == 0 else int((lengths > start).sum()) for start in begun
    ][: len(seen)]
    assert len(seen) == most
    assert [tokens for _, tokens in seen] == [5] + [1] * (most - 1)  # nothing is read twice


def test_in_one_go_none_is():
    model = llama()
    with Watched(model) as seen:
        rollout = draw(model, None)
    assert {rows for rows, _ in seen} == {9}
    assert len(seen) == int(rollout.response_lengths.max())


def test_rows_go_only_where_the_cache_lets_them():
    """A state that is no cache of keys keeps its rows, and goes on all the same."""
    model = MODELS["recurrent gemma"]()
    with Watched(model) as seen:
        draw(model, 3)
    assert {rows for rows, _ in seen} == {9}


def test_where_all_end_at_once_no_further_segment_begins():
    model = llama()
    first = sorted({r[0] for r in draw(model, None, ends=[79]).completions()})
    with Watched(model) as seen:
        rollout = draw(model, 1, ends=first)
    assert rollout.response_lengths.tolist() == [1] * 9
    assert len(seen) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"min_new_tokens": 5},
        {"min_length": 8},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"begin_suppress_tokens": [9, 10, 12, 14]},
        {"no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_what_depends_on_the_length_takes_one_go(config):
    model, calls = llama(), []
    expected = draw(model, None, **config)
    generate = type(model).generate
    model.generate = lambda *args, **kwargs: calls.append(1) or generate(model, *args, **kwargs)
    require_same(draw(model, 3, **config), expected)
    assert len(calls) == 1
    draw(model, 3, repetition_penalty=1.2)  # this one does not
    assert len(calls) > 2


def test_a_learned_prompt_is_not_put_in_twice():
    model = soft_prompts()
    with Watched(model.get_base_model()) as seen:
        rollout = draw(model, 3)
    assert len(seen) == int(rollout.response_lengths.max())
    assert seen[0] == (9, 3 + 5)


def test_adapters_go_on_in_segments():
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    expected = draw(model, None)
    assert expected.completions() != draw(llama(), None).completions()
    require_same(draw(model, 3), expected)
    with Watched(model.get_base_model()) as seen:
        draw(model, 3)
    assert min(rows for rows, _ in seen) < 9


@pytest.mark.parametrize("segment", [1, 3, None])
def test_order_is_that_of_the_prompts(segment):
    """Though those of like length are drawn together."""
    model, given = llama(), prompts(8)[::-1]
    together = draw(model, segment, batch_size=3, given=given, do_sample=False)
    alone = [draw(model, None, given=[one], do_sample=False).completions()[0] for one in given]
    assert together.prompts() == given
    assert together.completions() == alone


@pytest.mark.parametrize("segment", [1, 3, None])
def test_a_policy_without_numbers_is_refused(segment):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match=r"model: its logits are not finite .* 9 of 9"):
        draw(model, segment)


def test_a_segment_has_a_token():
    with pytest.raises(ValueError, match="segment"):
        draw(llama(), 0)


def test_the_models_own_configuration_is_as_before():
    model = llama()
    before = copy.deepcopy(model.generation_config.to_dict())
    draw(model, 3)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("segment", [3, None])
def test_a_stopping_check_that_is_read_a_token_late(monkeypatch, segment):
    """As transformers 5.23 does on Apple GPUs: it samples one token more than it returns."""
    check = getattr(generation_utils, "DeferredStopCheck", None)
    if check is None:
        pytest.skip("this transformers reads it at once")
    model = llama()
    expected = draw(model, segment)
    monkeypatch.setattr(check, "is_supported", staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", MagicMock)  # a CPU has none
    require_same(draw(model, segment), expected)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_answers_come_in_the_order_of_the_prompts(batch_size):
    """They are drawn by length; no order of these is its own inverse."""
    assert draw(llama(), 8, batch_size=batch_size).prompts() == prompts()


def test_keys_get_room_after_the_first_segment(monkeypatch):
    """So that they are not copied with every token."""
    seen, model = [], llama()
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            {type(layer) for layer in kwargs["past_key_values"].layers}
        ),
        with_kwargs=True,
    )
    draw(model, 8, ends=[79])
    assert seen == [{DynamicLayer}] * 8 + [{PreallocatedLayer}] * (LIMIT - 8)
