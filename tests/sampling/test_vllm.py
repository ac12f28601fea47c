"""`VLLMSampler` against a stand-in for vLLM with weights of its own; vLLM itself is not run."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import stand_in_vllm
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

from mossrlhf import Sampler, ToyWorld, VLLMSampler
from mossrlhf.models import policy_stats
from mossrlhf.sampling import Completion, Engine, HFSampler, VLLMEngine
from mossrlhf.sampling import vllm as vllm_engine
from mossrlhf.sampling.vllm import (
    Synchronizer,
    WeightReceiver,
    checkpoint_weights,
    weight_checksums,
)

V, END, LIMIT = 40, 2, 6
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [10]]


def llama(seed=1, vocabulary=V, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
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


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)


def engine(seed=7, **options):
    """An engine that begins with weights of its own."""
    return VLLMEngine(stand_in_vllm.LLM(llama(seed), **options))


def sampler(subject=None, eos=END, **config):
    config = GenerationConfig(**{"max_new_tokens": LIMIT, "do_sample": True, **config})
    return VLLMSampler(
        engine=subject or engine(), generation_config=config, eos_token_id=eos, pad_token_id=0
    )


def scored(model, rollout, temperature=1.0):
    found = torch.zeros(rollout.mask.shape)
    found[rollout.mask] = policy_stats(model, rollout, temperature=temperature).logprob.detach()
    return found


def adapted(**options):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


class TestSynchronization:
    """The engine says what the policy says, whatever happened to the policy's weights."""

    def check(self, subject, model):
        rollout = subject(model, PROMPTS)
        gap = (rollout.sampler_logprobs - scored(model, rollout)).abs().max()
        assert gap < 1e-4, gap

    def test_policy_moves(self):
        model, subject = llama(), sampler()
        self.check(subject, model)
        for fused in (False, True):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            self.check(subject, model)
        model.load_state_dict(llama(3).state_dict())
        self.check(subject, model)
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)  # no counter of torch's sees it
        self.check(subject, model)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 16))
        self.check(subject, model)
        assert subject.synchronizer.times == 6

    def test_another_model(self):
        """As evaluation does, which asks the reference as well."""
        subject, models = sampler(), [llama(), llama(2)]
        for model in (*models, *models):
            self.check(subject, model)
        assert subject.synchronizer.times == 4

    def test_nothing_is_sent_twice(self):
        model, subject = llama(), sampler()
        for _ in range(3):
            self.check(subject, model)
        assert subject.synchronizer(model) is False
        assert subject.synchronizer(llama(2)) is True
        subject.synchronizer(model)
        assert subject.synchronizer.times == 3
        assert "times=3" in repr(subject.synchronizer)

    def test_changes_that_leave_the_sum_of_bits(self):
        """Two weights change places."""
        model, subject = llama(), sampler()
        self.check(subject, model)
        weight = model.model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            weight.copy_(weight.flip(0))
        self.check(subject, model)

    def test_without_it_the_engine_is_stale(self, monkeypatch):
        monkeypatch.setattr(Synchronizer, "__call__", lambda self, model: False)
        model, subject = llama(), sampler()
        rollout = subject(model, PROMPTS)
        assert (rollout.sampler_logprobs - scored(model, rollout)).abs().max() > 0.5

    def test_adapters(self):
        model, subject = adapted(target_modules=["q_proj", "up_proj"]), sampler()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.check(subject, model)
        with model.disable_adapter():
            self.check(subject, model)
        self.check(subject, model)
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.mul_(2)
        self.check(subject, model)
        assert subject.synchronizer.times == 4
        changed = [name for name, weight in model.state_dict().items()
                   if not torch.equal(weight, before[name])]  # fmt: skip
        assert len(changed) == 1  # the one changed above: merging leaves the policy alone

    def test_names_are_those_of_the_checkpoint(self, tmp_path):
        from safetensors.torch import load_file

        for model in (llama(), llama(tie_word_embeddings=True)):
            model.save_pretrained(tmp_path)
            saved = load_file(tmp_path / "model.safetensors")
            sent = checkpoint_weights(model)
            assert sent.keys() == saved.keys()
            assert all(torch.equal(sent[name], saved[name]) for name in saved)
        assert checkpoint_weights(adapted()).keys() == llama().state_dict().keys()

    def test_experts_go_by_their_own_names(self, tmp_path):
        """Transformers stacks them as it loads."""
        from safetensors.torch import load_file
        from transformers import MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        )  # fmt: skip
        model = MixtralForCausalLM(config)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        sent = checkpoint_weights(model)
        assert sent.keys() == saved.keys()
        assert any(".experts.1.w2" in name for name in sent)
        assert all(torch.equal(sent[name], saved[name]) for name in saved)

    def test_a_failure_leaves_no_belief(self):
        """Half of the weights may have arrived: the next call sends all again."""
        model, subject = llama(), sampler()
        subject(model, PROMPTS)
        other = llama(3)
        send, subject.engine.llm.collective_rpc = subject.engine.llm.collective_rpc, None
        with pytest.raises(RuntimeError, match="workers did not take the policy's weights"):
            subject(other, PROMPTS)
        subject.engine.llm.collective_rpc = send
        self.check(subject, model)

    def test_inference_tensors_have_no_counter(self):
        with torch.inference_mode():
            model = llama()
            first = weight_checksums(model)
            model.lm_head.weight.mul_(2)
            assert weight_checksums(model) != first

    def test_weights_travel_in_files_that_are_removed(self, monkeypatch, tmp_path):
        monkeypatch.setattr(vllm_engine, "CHUNK_BYTES", 3000)
        subject = VLLMEngine(stand_in_vllm.LLM(llama(7)), folder=tmp_path)
        subject.load_weights(llama().state_dict().items())
        files = [Path(file) for file in subject.llm.files]
        assert len(files) > 3
        assert {file.parent.parent for file in files} == {tmp_path}
        assert not list(tmp_path.iterdir())
        own, given = subject.llm.model.state_dict(), llama().state_dict()
        assert all(torch.equal(own[name], given[name]) for name in given)


class TestDrawing:
    """Responses are those asked for."""

    @torch.no_grad()
    def greedy(self, model, prompt, ends):
        response = []
        while len(response) < LIMIT and not set(response) & set(ends):
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits
            response.append(int(logits[0, -1].argmax()))
        return response

    def test_greedy(self):
        model = llama()
        free = [self.greedy(model, prompt, []) for prompt in PROMPTS]
        ends = [free[0][2], free[1][3]]
        # The checkpoint's own end is none here.
        subject = sampler(engine(eos=free[2][0]), eos=ends, do_sample=False)
        rollout = subject(model, PROMPTS)
        expected = [self.greedy(model, prompt, ends) for prompt in PROMPTS]
        assert rollout.prompts() == PROMPTS
        assert rollout.completions() == expected
        assert rollout.truncated.tolist() == [not set(r) & set(ends) for r in expected]
        assert 0 < rollout.truncated.sum() < 4
        assert rollout.sampler_logprobs is None
        asked = subject.engine.llm.asked[0]
        assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.0, 1.0, -1, 0.0)

    def test_end_at_the_limit_is_an_end(self):
        model = llama()
        end = self.greedy(model, PROMPTS[0], [])[0]
        subject = sampler(eos=end, do_sample=False, max_new_tokens=1)
        assert not subject(model, PROMPTS[:1]).truncated.any()
        drawn = Completion(token_ids=[end], logprobs=[0.0], finish_reason="length")
        assert not sampler(Fixed([drawn]), eos=end, max_new_tokens=1)(
            model, PROMPTS[:1]
        ).truncated.any()

    def test_every_field_is_given(self):
        subject = sampler(temperature=0.7, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2)
        subject(llama(), PROMPTS)
        asked = subject.engine.llm.asked
        assert len({one.seed for one in asked}) == len(PROMPTS)
        assert 2**28 < max(one.seed for one in asked) < 2**31
        assert replace(asked[0], seed=None) == stand_in_vllm.SamplingParams(
            n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.2,
            temperature=0.7, top_p=0.9, top_k=9, min_p=0.05, seed=None, stop=None,
            stop_token_ids=[END], ignore_eos=True, max_tokens=LIMIT, min_tokens=0, logprobs=0,
            prompt_logprobs=None, detokenize=False,
        )  # fmt: skip
        plain = sampler()
        plain(llama(), PROMPTS)
        free = plain.engine.llm.asked[0]
        assert (free.temperature, free.top_p, free.top_k, free.min_p) == (1.0, 1.0, -1, 0.0)
        assert (free.repetition_penalty, free.max_tokens) == (1.0, LIMIT)

    def test_temperature_is_in_the_logprobs(self):
        model = llama()
        rollout = sampler(temperature=0.6)(model, PROMPTS * 2)
        own = scored(model, rollout, 0.6)
        torch.testing.assert_close(rollout.sampler_logprobs, own, atol=1e-4, rtol=0)
        assert (scored(model, rollout) - own).abs().max() > 0.1

    def test_draws_follow_from_the_generator(self):
        def drawn(seed):
            subject, model = sampler(), llama()
            torch.manual_seed(seed)
            return [subject(model, PROMPTS * 2).completions() for _ in range(2)]

        first = drawn(0)
        assert first == drawn(0)
        assert first[0] != first[1]
        assert first[0][1] != first[0][3]  # to equal prompts
        assert first != drawn(1)


class Fixed:
    """An engine that returns what it is told to."""

    vocabulary, processed_logprobs = V, True

    def __init__(self, drawn, **options):
        self.drawn = drawn
        vars(self).update(options)

    def load_weights(self, weights):
        assert len(list(weights)) > 3

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, asked, seeds):
        return self.drawn


def answer(tokens=(4, END), logprobs=(-1.0, -2.0), reason="stop"):
    known = None if logprobs is None else list(logprobs)
    return Completion(token_ids=list(tokens), logprobs=known, finish_reason=reason)


class TestRawLogprobs:
    """Of raw logits they are of another distribution, which is said once."""

    def test_said_once_and_left_out(self):
        subject = sampler(engine(logprobs_mode="raw_logprobs"), temperature=0.5, top_p=0.9)
        with pytest.warns(
            UserWarning,
            match=r"mean -\d+\.\d+ nats over \d+ tokens\) are of the raw logits, .* "
            r"temperature=0.5, top_p=0.9.* logprobs_mode=\"processed_logprobs\"",
        ):
            assert subject(llama(), PROMPTS).sampler_logprobs is None
        assert subject(llama(), PROMPTS).sampler_logprobs is None  # a warning would raise

    def test_raw_ones_are_those_drawn_from_where_nothing_is_changed(self):
        model, subject = llama(), sampler(engine(logprobs_mode="raw_logprobs"))
        rollout = subject(model, PROMPTS)
        torch.testing.assert_close(rollout.sampler_logprobs, scored(model, rollout), atol=1e-4,
                                   rtol=0)  # fmt: skip

    def test_vllm_that_does_not_say_is_taken_for_raw(self):
        silent = VLLMEngine(SimpleNamespace())
        assert silent.processed_logprobs is False
        assert silent.vocabulary is None


class TestRefused:
    """Errors say what to do instead."""

    @pytest.mark.parametrize(
        ("drawn", "kind", "message"),
        [
            ([answer()], ValueError, "engine: returned 1 responses to 2 prompts"),
            ([answer(), answer(logprobs=None)], ValueError,
             "engine: returned no log-probabilities for 1 of 2 responses"),
            ([answer(), answer(logprobs=[-1.0])], ValueError,
             "logprobs: got 1 for the 2 tokens of response 1"),
            ([answer(), answer(reason="abort")], RuntimeError,
             r"engine: broke response 1 off \(finish_reason='abort'\)"),
            ([answer(), answer(tokens=[4, 5])], ValueError,
             r"response 1 \(2 tokens, finish_reason='stop'\) ends with \[5\], expected one of \[2"),
            ([answer(), answer(tokens=[], logprobs=[])], ValueError, r"response 1 \(0 tokens"),
            ([answer(), answer(tokens=[4] * 9, reason="length")], ValueError,
             r"response 1 \(9 tokens, .* or 6 tokens"),
            ([answer(), answer(tokens=[], logprobs=[], reason="length")], ValueError,
             r"completions: \[1\] have no token"),
        ],
    )  # fmt: skip
    def test_of_the_engine(self, drawn, kind, message):
        with pytest.raises(kind, match=message):
            sampler(Fixed(drawn))(llama(), PROMPTS[:2])

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"typical_p": 0.9}, r"typical_p = 0.9, expected 1.0: the engine would pass over it"),
            ({"min_new_tokens": 2}, "min_new_tokens = 2, expected 0"),
            ({"max_new_tokens": None}, "max_new_tokens is None"),
            ({"num_beams": 2}, "num_beams = 2, expected 1"),
            ({"temperature": 0.0}, "temperature = 0.0, expected a number above 0"),
            ({"top_p": 0.0}, r"top_p = 0, expected a number in \(0, 1\]"),
        ],
    )
    def test_config(self, config, message):
        with pytest.raises(ValueError, match=f"generation_config: {message}"):
            sampler(**config)

    def test_rest(self, monkeypatch):
        with pytest.raises(ValueError, match="among 40 tokens, the model among 50, so its tokens"):
            sampler()(llama(vocabulary=50), PROMPTS)
        with pytest.raises(ValueError, match=r"prompts: got 2, of which \[1\] are empty"):
            sampler()(llama(), [[5], []])
        with pytest.raises(TypeError, match=r"engine: got .*expected VLLMEngine\(llm\)"):
            sampler(stand_in_vllm.LLM(llama()))
        with pytest.raises(RuntimeError, match=r"AttributeError.*worker_extension_cls='mossrlhf"):
            sampler(engine(extended=False))(llama(), PROMPTS)
        with pytest.raises(ValueError, match=r"temperature = 0.001, expected at least 0.01"):
            sampler(temperature=0.001)(llama(), PROMPTS)
        prompted = peft.get_peft_model(
            llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        with pytest.raises(ValueError, match=r"adapter \(PROMPT_TUNING\) acts outside of layers"):
            sampler()(prompted, PROMPTS)
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(ImportError, match=r'pip install "mossrlhf\[vllm\]"; or use HFS'):
            VLLMEngine.load("org/model")


def test_load_asks_vllm_for_what_is_needed(monkeypatch):
    made = {}
    monkeypatch.setattr(stand_in_vllm, "LLM", lambda **given: made.update(given))
    config = GenerationConfig(max_new_tokens=3, do_sample=True)
    tokenizer = ToyWorld(lang="en", seed=0).tokenizer()
    subject = VLLMSampler.load("org/model", tokenizer, config, max_model_len=64)
    assert made == {
        "model": "org/model",
        "worker_extension_cls": "mossrlhf.sampling.vllm.WeightReceiver",
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "max_model_len": 64,
    }
    module, name = made["worker_extension_cls"].rsplit(".", 1)
    assert getattr(sys.modules[module], name) is WeightReceiver
    other = HFSampler.for_tokenizer(tokenizer, config)
    assert isinstance(subject, Sampler)
    assert isinstance(subject.engine, Engine)
    assert subject.effective.to_dict() == other.effective.to_dict()
    assert subject.departures == other.departures == []
