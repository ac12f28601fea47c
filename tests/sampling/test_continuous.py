"""`ContinuousSampler` by transformers' own continuous batching, which runs on a CPU too."""

import threading

import peft
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf import Sampler, ToyWorld
from mossrlhf.models import policy_stats
from mossrlhf.sampling import ContinuousSampler, HFSampler, continuous

V, END, LIMIT = 40, 2, 6
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


def llama(**options):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=END,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return llama()


def sampler(eos=END, batching=None, **config):
    config = GenerationConfig(**{"max_new_tokens": LIMIT, "do_sample": True, **config})
    return ContinuousSampler(
        generation_config=config, eos_token_id=eos, pad_token_id=0, batching=batching
    )


@torch.no_grad()
def greedy(model, prompt, ends):
    """The oracle: one prompt, no cache, the most likely token again and again."""
    response = []
    while len(response) < LIMIT and not set(response) & set(ends):
        logits = model(torch.tensor([prompt + response]), use_cache=False).logits
        response.append(int(logits[0, -1].argmax()))
    return response


def scored(model, rollout, temperature=1.0):
    stats = policy_stats(model, rollout, temperature=temperature)
    found = torch.zeros(rollout.mask.shape)
    found[rollout.mask] = stats.logprob.detach()
    return found


class TestGreedy:
    """Responses are those of every prompt alone."""

    @pytest.mark.parametrize("tight", [False, True])
    def test_equals_one_prompt_at_a_time(self, model, tight):
        free = [greedy(model, prompt, []) for prompt in PROMPTS]
        ends = [free[0][2], free[1][3]]
        # Too few pages for all at once: prompts wait, and begin again.
        few = ContinuousBatchingConfig(**{continuous._PAGE: 4}, num_blocks=3, max_batch_tokens=8)
        subject = sampler(eos=ends, batching=few if tight else None, do_sample=False)
        rollout = subject(model, PROMPTS)
        expected = [greedy(model, prompt, ends) for prompt in PROMPTS]
        assert rollout.prompts() == PROMPTS
        assert rollout.completions() == expected
        assert rollout.truncated.tolist() == [not set(r) & set(ends) for r in expected]
        assert 0 < rollout.truncated.sum() < 3
        assert rollout.sampler_logprobs is None

    def test_adapters_speak(self, model):
        adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.eval()
        drawn = sampler(do_sample=False)(adapted, PROMPTS).completions()
        assert drawn == [greedy(adapted, prompt, [END]) for prompt in PROMPTS]
        assert drawn != [greedy(model, prompt, [END]) for prompt in PROMPTS]


class TestSampling:
    """Tokens follow the policy's softmax, and say how likely they were."""

    def test_first_tokens_follow_the_softmax(self, model):
        count, temperature = 2000, 0.8
        rollout = sampler(max_new_tokens=1, temperature=temperature)(model, [PROMPTS[0]] * count)
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
        expected = (logits / temperature).softmax(-1)
        drawn = torch.bincount(rollout.response_ids[:, 0], minlength=V) / count
        # Five standard deviations of a share, for each of the tokens.
        spread = (expected * (1 - expected) / count).sqrt()
        assert ((drawn - expected).abs() < 5 * spread + 1e-3).all()
        assert (drawn - logits.softmax(-1)).abs().max() > 0.02

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_logprobs_are_those_scored(self, model, temperature):
        rollout = sampler(temperature=temperature)(model, PROMPTS * 3)
        own = scored(model, rollout, temperature)
        torch.testing.assert_close(rollout.sampler_logprobs, own, atol=1e-4, rtol=0)
        assert (scored(model, rollout, 1.3) - own).abs().max() > 0.05

    def test_top_p_and_top_k_are_in_the_logprobs(self, model):
        subject = sampler(top_p=0.5, top_k=3)
        assert subject.departures == ["top_k=3", "top_p=0.5"]
        rollout = subject(model, PROMPTS * 3)
        above = (rollout.sampler_logprobs - scored(model, rollout))[rollout.mask]
        assert (above > -1e-4).all()
        assert above.mean() > 0.1  # what was cut away left more for the rest

    def test_draws_follow_from_the_generator(self, model):
        def drawn(seed):
            torch.manual_seed(seed)
            subject = sampler()
            return [subject(model, PROMPTS * 2).completions() for _ in range(2)]

        first = drawn(0)
        assert first == drawn(0)
        assert first[0] != first[1]
        assert first != drawn(1)


def test_cache_on_a_cpu_is_of_what_can_be_needed(model):
    """Left to itself transformers takes more than half of the memory there is."""
    assert sampler()._batching(model, PROMPTS, 1).num_blocks == 2 + 2 + 2
    four = ContinuousBatchingConfig(**{continuous._PAGE: 4})
    assert sampler(batching=four)._batching(model, PROMPTS, 1).num_blocks == 4 + 3 + 4
    told = ContinuousBatchingConfig(num_blocks=5, max_batch_tokens=7)
    found = sampler(batching=told)._batching(model, PROMPTS, 1)
    assert (found.num_blocks, found.max_batch_tokens, found.seed) == (5, 7, 1)


class TestAsFound:
    """What drawing changes is put back, where it fails too."""

    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_model(self, monkeypatch, attention, fails):
        model = llama(attn_implementation=attention)
        model.train()
        model.model.layers[0].eval()
        own, modes = model.generation_config, [m.training for m in model.modules()]
        torch.manual_seed(0)
        torch.randint(2**31, ())
        expected = torch.get_rng_state()
        torch.manual_seed(0)
        if fails:
            monkeypatch.setattr(type(model), "forward", broken)
            with pytest.raises(RuntimeError, match=r"3 of 3 responses .* \(a fault of the model"):
                sampler()(model, PROMPTS)
        else:
            sampler()(model, PROMPTS)
        assert model.config._attn_implementation == attention
        assert model.generation_config is own
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), expected)
        assert not [t for t in threading.enumerate() if "_run_generation_loop" in t.name]

    def test_where_it_cannot_begin(self, monkeypatch):
        """The attention is switched first."""
        model = llama(attn_implementation="eager")
        monkeypatch.setattr(type(model), "_get_logits_processor", broken)
        with pytest.raises(FloatingPointError, match="a fault of the model"):
            sampler()(model, PROMPTS)
        assert model.config._attn_implementation == "eager"

    def test_checkpoint_leaks_nothing_in(self, model):
        """Its own config asks for few tokens and another end."""
        leaking = llama()
        leaking.generation_config = GenerationConfig(
            do_sample=True, top_k=1, temperature=3.0, max_new_tokens=1, eos_token_id=list(range(V))
        )
        torch.manual_seed(0)
        drawn = sampler()(leaking, PROMPTS).completions()
        torch.manual_seed(0)
        assert drawn == sampler()(model, PROMPTS).completions()


def broken(*_, **__):
    raise FloatingPointError("a fault of the model")


class TestRefused:
    """Errors say what to do instead."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"repetition_penalty": 1.1}, r"repetition_penalty = 1.1, expected 1.0: continuous .*"
             "would pass over it; leave it out, or use HFSampler"),
            ({"min_p": 0.1}, "min_p = 0.1, expected 0.0"),
            ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size = 2, expected 0"),
            ({"max_new_tokens": None}, "max_new_tokens is None"),
            ({"num_beams": 2}, "num_beams = 2, expected 1"),
            ({"temperature": -1.0}, "temperature = -1.0, expected a number above 0"),
            ({"stop_strings": "."}, "stop_strings = '.', expected None"),
        ],
    )  # fmt: skip
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=f"generation_config: {message}"):
            sampler(**config)

    def test_rest(self, model):
        with pytest.raises(ValueError, match="eos_token_id: got none"):
            sampler(eos=[])
        with pytest.raises(ValueError, match="batching: seed = 3, expected None"):
            sampler(batching=ContinuousBatchingConfig(seed=3))
        with pytest.raises(ValueError, match=r"prompts: got 2, of which \[1\] are empty"):
            sampler()(model, [[5], []])
        with pytest.raises(ValueError, match=r"Linear has no generate_batch.*HFSampler"):
            sampler()(torch.nn.Linear(2, 2), PROMPTS)
        prompted = peft.get_peft_model(
            llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        with pytest.raises(ValueError, match=r"adapter \(PROMPT_TUNING\) acts outside of layers"):
            sampler()(prompted, PROMPTS)

    def test_manager_of_earlier_weights(self):
        model = llama()
        model._cached_continuous_batching_manager = object()
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            sampler()(model, PROMPTS)


def test_for_tokenizer_and_protocol():
    tokenizer = ToyWorld(lang="en", seed=0).tokenizer()
    config = GenerationConfig(max_new_tokens=3, temperature=0.5, do_sample=True)
    subject = ContinuousSampler.for_tokenizer(tokenizer, config)
    other = HFSampler.for_tokenizer(tokenizer, config)
    assert isinstance(subject, Sampler)
    assert subject.effective.to_dict() == other.effective.to_dict()
    assert (subject.temperature, subject.max_new_tokens) == (0.5, 3)
    with pytest.raises(TypeError, match="has no option 'batch_size'"):
        ContinuousSampler(generation_config=config, eos_token_id=2, pad_token_id=0, batch_size=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """With whatever attention is there: the log-probabilities are those scored."""
    model = llama().to("cuda", dtype)
    rollout = sampler()(model, PROMPTS * 10)
    assert rollout.input_ids.device.type == "cuda"
    own = policy_stats(model, rollout).logprob.detach()
    gap = (rollout.sampler_logprobs[rollout.mask] - own).abs()
    assert gap.max() < (1e-3 if dtype is torch.float32 else 0.2)
    assert model.config._attn_implementation == "sdpa"
