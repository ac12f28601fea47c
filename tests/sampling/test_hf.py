"""`HFSampler` against greedy decoding one prompt at a time, and against the policy's softmax."""

import peft
import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import GenerateDecoderOnlyOutput

from mossrlhf.models import policy_stats
from mossrlhf.sampling import FREE, NEUTRAL, REFUSED, HFSampler

V = 80
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
LIMIT = 6


def llama(spread):
    """A random model; the larger `spread`, the further its distribution is from uniform."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return llama(0.4)


def sampler(eos=2, pad=0, batch_size=None, **config):
    generation_config = GenerationConfig(**{"max_new_tokens": LIMIT, **config})
    return HFSampler(
        generation_config=generation_config,
        eos_token_id=eos,
        pad_token_id=pad,
        batch_size=batch_size,
    )


@torch.no_grad()
def greedy(model, prompt, ends=()):
    """The oracle: one prompt, no padding, no cache, the most likely token again and again."""
    response = []
    while len(response) < LIMIT and not set(response) & set(ends):
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits
        response.append(int(logits[0, -1].argmax()))
    return response


@pytest.fixture(scope="module")
def free(model):
    """What follows each prompt where nothing ends."""
    return [greedy(model, prompt) for prompt in PROMPTS]


class TestGreedy:
    """Whatever ends and pads, responses are those of every prompt alone."""

    def check(self, model, subject, ends):
        rollout = subject(model, PROMPTS)
        expected = [greedy(model, prompt, ends) for prompt in PROMPTS]
        assert rollout.prompts() == PROMPTS
        assert rollout.completions() == expected
        assert rollout.truncated.tolist() == [not set(r) & set(ends) for r in expected]
        assert rollout.response_lengths.tolist() == [len(r) for r in expected]
        lengths = rollout.response_lengths[:, None]
        assert rollout.mask.tolist() == (torch.arange(rollout.mask.shape[1]) < lengths).tolist()
        totals = (rollout.prompt_lengths + rollout.response_lengths)[:, None]
        rest = torch.arange(rollout.input_ids.shape[1]) >= totals
        assert (rollout.input_ids[rest] == subject.pad_token_id).all()
        return rollout

    def test_nothing_ends(self, model):
        rollout = self.check(model, sampler(eos=V - 1, do_sample=False), [V - 1])
        assert rollout.mask.all()
        assert rollout.truncated.all()

    @pytest.mark.parametrize("batch_size", [None, 1, 2])
    def test_some_end(self, model, free, batch_size):
        end = free[0][2]  # the first response ends at its third token at the latest
        subject = sampler(eos=end, batch_size=batch_size, do_sample=False)
        rollout = self.check(model, subject, [end])
        assert 0 < rollout.truncated.sum() < 3

    def test_end_is_padding(self, model, free):
        end = free[0][2]
        self.check(model, sampler(eos=end, pad=end, do_sample=False), [end])

    def test_padding_is_a_token_that_occurs(self, model, free):
        """Masks come from lengths: a real token with the padding's id stays."""
        rollout = self.check(model, sampler(eos=V - 1, pad=free[1][1], do_sample=False), [V - 1])
        assert rollout.completions()[1][1] == free[1][1]

    def test_several_ends(self, model, free):
        ends = [free[0][2], free[1][0]]
        rollout = self.check(model, sampler(eos=ends, do_sample=False), ends)
        assert rollout.completions()[1] == [free[1][0]]
        assert sampler(eos=(3, 4)).effective.eos_token_id == [3, 4]  # as configs hold them


class Scripted(nn.Module):
    """Continues prompts with what it is told to."""

    def __init__(self, responses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.responses = torch.tensor(responses)

    def generate(self, ids, attention_mask, generation_config):
        self.asked = ids.tolist(), attention_mask.tolist()
        self.with_gradients = torch.is_grad_enabled()
        return GenerateDecoderOnlyOutput(sequences=torch.cat([ids, self.responses], dim=1))


def test_assembly_by_hand():
    """Prompts go in padded on the left and come out padded on the right; 9 ends and pads."""
    model = Scripted([[4, 9, 9], [4, 4, 9], [3, 9, 9], [4, 4, 4]])  # shorter prompts first
    subject = sampler(eos=9, pad=9, do_sample=False, max_new_tokens=3)
    rollout = subject(model, [[5], [9, 6], [7], [8, 8]])
    assert model.asked[0] == [[9, 5], [9, 7], [9, 6], [8, 8]]
    assert model.asked[1] == [[0, 1], [0, 1], [1, 1], [1, 1]]
    assert not model.with_gradients
    assert rollout.input_ids.tolist() == [
        [5, 4, 9, 9, 9],
        [9, 6, 3, 9, 9],
        [7, 4, 4, 9, 9],
        [8, 8, 4, 4, 4],
    ]
    assert rollout.prompt_lengths.tolist() == [1, 2, 1, 2]
    assert rollout.response_lengths.tolist() == [2, 2, 3, 3]
    assert rollout.truncated.tolist() == [False, False, False, True]  # the third ends at the limit


def distance(tokens, probabilities):
    """Total variation between drawn tokens and a distribution."""
    frequencies = torch.bincount(tokens, minlength=V) / len(tokens)
    return 0.5 * (frequencies - probabilities).abs().sum().item()


def draw(model, subject, copies=6000):
    return subject(model, [[5, 6, 7]] * copies)


@torch.no_grad()
def softmax(model, temperature=1.0):
    return (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)


# Of a perfect sampler the distance is about 0.4·√(V / 6000) = 0.05 at most.
NOISE = 0.06


class TestDistribution:
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_is_the_policys_at_the_temperature(self, model, temperature):
        subject = sampler(max_new_tokens=1, temperature=temperature)
        rollout = draw(model, subject)
        drawn = rollout.response_ids[:, 0]
        assert subject.temperature == temperature
        assert distance(drawn, softmax(model, temperature)) < NOISE
        assert distance(drawn, softmax(model, 1.5 - temperature)) > 0.1  # the other one
        # Scored at that temperature: the mean log-probability is minus the entropy.
        scored = policy_stats(model, rollout, subject.temperature, entropy=True)
        assert scored.logprob.mean().item() == pytest.approx(
            -scored.entropy.mean().item(), abs=0.05
        )

    @pytest.mark.parametrize(
        "theirs",
        [
            {"temperature": 0.3, "do_sample": True},
            {"top_k": 2, "do_sample": True},
            {"top_p": 0.3, "do_sample": True},
            {"min_p": 0.5, "do_sample": True},
            {"typical_p": 0.2, "do_sample": True},
            {"repetition_penalty": 3.0},
            {"suppress_tokens": list(range(40))},
            {"forced_eos_token_id": 2},
            {"sequence_bias": [[[7], 9.0]]},
        ],
        ids=lambda theirs: next(iter(theirs)),
    )
    def test_the_checkpoint_has_no_say(self, theirs):
        model = llama(0.4)
        model.generation_config = GenerationConfig(**theirs)
        rollout = draw(model, sampler(max_new_tokens=1))
        assert distance(rollout.response_ids[:, 0], softmax(model)) < NOISE

    def test_nor_has_the_librarys_top_k_of_50(self):
        model = llama(0.02)  # close to uniform over 80 tokens
        assert len(draw(model, sampler(max_new_tokens=1), 2000).response_ids.unique()) > 70

    def test_what_the_user_asks_for_is_in_force(self, model):
        few = draw(model, sampler(max_new_tokens=1, top_k=3), 500)
        likely = softmax(model).topk(3).indices
        assert set(few.response_ids[:, 0].tolist()) == set(likely.tolist())

    def test_length_of_the_checkpoint_has_no_say(self):
        model = llama(0.4)
        model.generation_config = GenerationConfig(max_new_tokens=1, min_new_tokens=50)
        end = greedy(model, PROMPTS[0])[2]
        rollout = sampler(eos=end, do_sample=False)(model, PROMPTS)
        assert rollout.completions() == [greedy(model, prompt, [end]) for prompt in PROMPTS]


@pytest.mark.parametrize("config", [{}, {"do_sample": True}])
def test_what_is_left_open_is_the_policys_own(config):
    effective = sampler(**config).effective
    assert {name: getattr(effective, name) for name in FREE} == FREE
    assert (effective.eos_token_id, effective.pad_token_id) == (2, 0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, []),
        ({"temperature": 0.7}, []),  # scored at it
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}, []),
        ({"top_k": 50}, ["top_k=50"]),
        ({"top_p": 0.9, "repetition_penalty": 1.1}, ["top_p=0.9", "repetition_penalty=1.1"]),
        ({"do_sample": False}, ["do_sample=False"]),
        ({"min_p": 0.1}, ["min_p=0.1"]),
        ({"min_new_tokens": 3}, ["min_new_tokens=3"]),
        ({"suppress_tokens": [4]}, ["suppress_tokens=[4]"]),
        ({"no_repeat_ngram_size": 3}, ["no_repeat_ngram_size=3"]),
    ],
)
def test_departures(config, expected):
    assert sampler(**config).departures == expected


def leaves_alone(model, config):
    """Whether the processors of `generate` change no score; those that refuse to act change one."""
    scores = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    context = torch.tensor([[5]])
    config._eos_token_tensor = torch.tensor([2])
    try:
        processors = model._get_logits_processor(config, context.shape[1], device="cpu")
        return torch.equal(processors(context, scores.clone()), scores)
    except (ValueError, UserWarning):
        return False


NUMBERS = [name for name, value in NEUTRAL.items() if type(value) in (int, float)]


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "temperature"])
def test_what_generate_does_nothing_at_is_no_departure(model, name):
    """The first number at which it does nothing counts as off; any at which it does, as on."""
    kind = type(NEUTRAL[name])
    values = [kind(0), kind(1), kind(0.5), kind(2)]
    wrong = {"top_p": [2.0], "repetition_penalty": [0.0]}  # refused: they make no distribution
    for value in wrong.get(name, []):
        with pytest.raises(ValueError, match=f"{name} = {value}, expected a number"):
            sampler(**{name: value})
        values.remove(value)
    off = [v for v in values if leaves_alone(model, sampler(**{name: v}).effective)]
    assert sampler(**{name: off[0]}).departures == []
    for value in set(values) - set(off):
        assert sampler(**{name: value}).departures == [f"{name}={value}"]


def test_what_was_drawn_from_is_noted_up_to_the_end(model):
    torch.manual_seed(0)
    rollout = sampler(eos=range(0, V, 2), top_k=2)(model, PROMPTS)
    noted, mask = rollout.sampler_logprobs, rollout.mask
    assert (noted[mask] > policy_stats(model, rollout).logprob).all()  # two tokens share all
    assert noted[mask].any()
    assert not mask.all()
    assert not noted[~mask].any()


def test_every_field_that_departs_exists():
    fields = vars(GenerationConfig())
    assert [name for name in NEUTRAL if name not in fields] == []


def test_greedy_is_scored_at_temperature_one():
    assert sampler(do_sample=False).temperature == 1.0
    assert sampler(do_sample=False, max_new_tokens=7).max_new_tokens == 7


def test_greedy_leaves_open_what_concerns_sampling():
    """`generate` would warn of it; a penalty concerns greedy responses as well."""
    effective = sampler(do_sample=False).effective
    set_here = {name for name in FREE if getattr(effective, name) is not None}
    assert set_here == {"do_sample", "repetition_penalty"}
    assert effective.repetition_penalty == 1.0


def test_shows_as_what_it_was_given():
    """Not as what it made of it, which is as long again."""
    assert "effective" not in repr(sampler())


def test_the_given_config_stays_as_it_is():
    given = GenerationConfig(max_new_tokens=3)
    before = given.to_dict()
    HFSampler(generation_config=given, eos_token_id=2, pad_token_id=0)
    assert given.to_dict() == before


def test_the_same_seed_draws_the_same(model):
    one, two = (torch.manual_seed(5) and sampler()(model, PROMPTS) for _ in range(2))
    assert one.completions() == two.completions()
    assert sampler()(model, PROMPTS).completions() != one.completions()
    assert not one.input_ids.requires_grad


class TestCheckpointsConfigComesBack:
    @pytest.fixture
    def own(self):
        return GenerationConfig(suppress_tokens=list(range(40)))

    def test_after_drawing(self, own):
        model = llama(0.4)
        model.generation_config = own
        sampler()(model, PROMPTS)
        assert model.generation_config is own

    def test_after_an_error(self, own):
        model = llama(0.4)
        model.generation_config = own
        with pytest.raises(IndexError):
            sampler()(model, [[V + 5]])
        assert model.generation_config is own

    # peft 0.21 asks transformers 5.23 for a property that has another name now.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    @pytest.mark.parametrize("held_outside", [False, True])
    def test_inside_adapters_too(self, own, held_outside):
        model = llama(0.4)
        base = model.generation_config = GenerationConfig(suppress_tokens=[7])
        lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
        adapted = peft.get_peft_model(model, lora)
        if held_outside:
            adapted.generation_config = own
        drawn = draw(adapted, sampler(max_new_tokens=1))
        assert distance(drawn.response_ids[:, 0], softmax(model)) < NOISE
        assert adapted.get_base_model().generation_config is base
        assert adapted.generation_config is (own if held_outside else base)


class Tokenizer(PreTrainedTokenizerFast):
    """Only what is asked of it: its special tokens."""

    def __init__(self, eos, pad):
        self.special = {"eos_token_id": eos, "pad_token_id": pad}

    def __getattr__(self, name):
        return self.special[name]


class TestForTokenizer:
    @pytest.mark.parametrize(
        ("eos", "pad", "config", "expected"),
        [
            (2, 0, {}, (2, 0)),
            (2, None, {}, (2, 2)),  # no padding token: the end pads
            (2, 2, {}, (2, 2)),
            (2, 0, {"eos_token_id": [3, 4]}, ([3, 4], 0)),
            (2, None, {"eos_token_id": [3, 4]}, ([3, 4], 3)),
            (2, 0, {"eos_token_id": [3]}, ([3], 0)),
            (None, None, {"eos_token_id": 3}, (3, 3)),
            (2, 0, {"pad_token_id": 7}, (2, 7)),
        ],
    )
    def test_end_and_padding(self, eos, pad, config, expected):
        given = GenerationConfig(max_new_tokens=3, **config)
        effective = HFSampler.for_tokenizer(Tokenizer(eos, pad), given).effective
        assert (effective.eos_token_id, effective.pad_token_id) == expected

    def test_without_an_end_nothing_ends(self):
        with pytest.raises(ValueError, match=r"no eos token.*GenerationConfig\(eos_token_id=\)"):
            HFSampler.for_tokenizer(Tokenizer(None, 0), GenerationConfig(max_new_tokens=3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None; say how long"),
        ({"num_beams": 2}, "num_beams = 2, expected 1"),
        ({"num_return_sequences": 2, "do_sample": True}, r"TrainerConfig\.samples_per_prompt"),
        ({"stop_strings": ["\n\n"]}, r"stop_strings = \['.*'\], expected None.*eos_token_id="),
        ({"max_time": 5.0}, r"max_time = 5\.0, expected None: .*by the clock"),
        ({"token_healing": True}, "token_healing = True, expected None"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens = 3, .*one prompt at a time"),
        ({"assistant_early_exit": 1}, "assistant_early_exit = 1"),
        ({"is_assistant": True}, "is_assistant = True"),
        ({"force_words_ids": [[4]]}, r"force_words_ids = \[\[4\]\].*sampled one by one"),
        ({"penalty_alpha": 0.6, "top_k": 4}, r"penalty_alpha = 0\.6"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        sampler(**config)


def test_what_is_off_is_not_refused():
    off = dict.fromkeys(REFUSED, False) | {"penalty_alpha": 0.0, "num_beams": 1}
    config = GenerationConfig(max_new_tokens=LIMIT)
    vars(config).update(off)
    assert HFSampler(generation_config=config, eos_token_id=2, pad_token_id=0).departures == []


def test_every_field_that_is_refused_exists():
    newer = {"speculation_type", "use_mtp"}  # than transformers 5.17
    assert REFUSED.keys() - newer <= vars(GenerationConfig()).keys()


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "got 0"), ([[1], []], r"got 2, of which \[1\] are empty")]
)
def test_empty_prompts_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        sampler()(model, prompts)


def test_a_slip_is_recognized():
    with pytest.raises(TypeError, match="did you mean 'batch_size'"):
        HFSampler(batchsize=3)
