"""Tokens drawn inside `generate`, and what is noted of each: recomputed here token by token."""

import copy

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, WatermarkingConfig
from transformers.generation.configuration_utils import logger as generation_logger

from mossrlhf.models import policy_stats
from mossrlhf.sampling import HFSampler
from mossrlhf.sampling.hf import WARPERS, SamplingProcessor, greedy_config

V, END = 30, 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]] * 4
EVEN = [[5, 6, 7], [8, 9, 10]] * 6


EVERY = {
    "temperature": 0.8, "top_h": 0.95, "top_k": 9, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9,
    "epsilon_cutoff": 0.04, "eta_cutoff": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def draw(model, batch_size=None, **config):
    torch.manual_seed(2)
    config = GenerationConfig(**{"max_new_tokens": 6, "do_sample": True, **config})
    sampler = HFSampler(
        generation_config=config, eos_token_id=END, pad_token_id=END, batch_size=batch_size
    )
    # transformers 5.17 penalizes the padding on the left as well, 5.23 no longer does.
    return sampler(model, EVEN if config.repetition_penalty else PROMPTS)


def warped(logits, context, config):
    """log π_sampler over the vocabulary, by the definition of each warper in turn."""
    penalty = config.get("repetition_penalty", 1.0)
    seen = torch.tensor(sorted(set(context)))
    picked = logits[seen]
    logits = logits.index_put((seen,), torch.where(picked < 0, picked * penalty, picked / penalty))
    p = (logits / config.get("temperature", 1.0)).softmax(-1)
    # By the order of `generate`; sizes and cutoffs by each method's paper.
    if "top_h" in config:
        ordered, order = p.sort(descending=True)
        spent = -(ordered * ordered.log()).cumsum(-1)
        kept = order[: max(1, int((spent <= config["top_h"] * spent[-1]).sum()))]
        p = among(p, torch.isin(torch.arange(V), kept))
    order = p.argsort(descending=True)
    if "top_k" in config:
        p = among(p, torch.isin(torch.arange(V), order[: config["top_k"]]))
    if "top_p" in config:
        before = torch.empty(V, dtype=p.dtype).scatter(0, order, p[order].cumsum(-1) - p[order])
        p = among(p, before < config["top_p"])  # what likelier tokens have together
    if "min_p" in config:
        p = among(p, p >= config["min_p"] * p.max())
    if "typical_p" in config:
        entropy = -torch.xlogy(p, p).sum()
        near = (-p.log() - entropy).abs().argsort()
        size = int((p[near].cumsum(-1) < config["typical_p"]).sum()) + 1
        # Alone among them it may leave the likeliest out.
        p = p.index_fill(0, near[size:], 0.0) / p[near[:size]].sum()
    if "epsilon_cutoff" in config:
        p = among(p, p >= config["epsilon_cutoff"])
    if "eta_cutoff" in config:
        eta, entropy = config["eta_cutoff"], -torch.xlogy(p, p).sum()
        p = among(p, p >= min(eta, eta**0.5 * (-entropy).exp()))
    return p.log()


def among(p, keep):
    """The distribution `p` among the tokens kept; the likeliest always is."""
    keep = keep | (p == p.max())
    return torch.where(keep, p, 0.0) / p[keep].sum()


def check(model, rollout, config):
    """Hold what was noted to the definitions, sequence by sequence, without padding."""
    rows = zip(rollout.prompts(), rollout.completions(), strict=True)
    noted = rollout.sampler_logprobs
    for b, (prompt, response) in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        for t, token in enumerate(response):
            place = len(prompt) + t
            expected = warped(logits[place - 1], (prompt + response)[:place], config)
            assert noted[b, t].item() == pytest.approx(expected[token].item(), abs=1e-4)


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_h": 0.5},
        {"typical_p": 0.6},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.09},
        {"repetition_penalty": 1.8},
        {"top_k": 8, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1},
        {"top_h": 0.9, "top_k": 9, "top_p": 0.95, "epsilon_cutoff": 0.04, "temperature": 1.3},
        EVERY,
    ],
    ids=lambda config: "+".join(config),
)
def test_log_probabilities_of_the_sampler(model, config, batch_size):
    rollout = draw(model, batch_size, **config)
    check(model, rollout, config)
    assert rollout.logprobs is None  # `Trainer.annotate` computes the policy's own
    assert not rollout.sampler_logprobs[~rollout.mask].any()
    assert rollout.sampler_logprobs.dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"temperature": 0.7}, {"temperature": 1.6}], ids=str)
def test_sampler_logprobs_at_a_temperature_alone_are_the_policys(model, config):
    rollout = draw(model, batch_size=5, **config)
    check(model, rollout, config)
    scored = policy_stats(model, rollout, config.get("temperature", 1.0))
    recorded = rollout.sampler_logprobs[rollout.mask]
    torch.testing.assert_close(recorded, scored.logprob, rtol=0, atol=1e-5)
    assert not rollout.mask.all()


def test_greedy_responses_have_no_sampler_logprobs(model):
    assert draw(model, do_sample=False).sampler_logprobs is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sampler_logprobs_are_float32_whatever_the_weights(model, dtype):
    other = copy.deepcopy(model).to(dtype)
    rollout = draw(other)
    assert rollout.sampler_logprobs.dtype == torch.float32
    gap = rollout.sampler_logprobs[rollout.mask] - policy_stats(other, rollout).logprob
    assert gap.abs().max() < 0.2  # by a cache and without one, half precision rounds differently


def test_sampler_logprobs_are_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        rollout = draw(model)
        scored = policy_stats(model, rollout).logprob
    assert rollout.sampler_logprobs.dtype == torch.float32
    assert (rollout.sampler_logprobs[rollout.mask] - scored).abs().max() < 0.2


def test_float64_as_the_default_type_changes_nothing(model):
    expected = draw(model)
    torch.set_default_dtype(torch.float64)
    try:
        rollout = draw(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rollout.input_ids, expected.input_ids)
    torch.testing.assert_close(rollout.sampler_logprobs, expected.sampler_logprobs)


def test_transformers_has_nothing_to_say(model, monkeypatch):
    """Of fields that go unused: they are ours to apply."""
    said = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(generation_logger, name, lambda *words, **_: said.append(words))
    draw(model)
    draw(model, **EVERY)
    assert said == []


def given(config, rows=1, steps=1):
    return SamplingProcessor(config, torch.rand(rows, steps, dtype=torch.float64))


def test_nothing_comes_after_the_draw(model):
    """Whatever warpers `generate` has of its own, none is left to act after ours, in its order."""

    def after(config):
        config.update(max_length=9, do_sample=True)
        mine = [given(GenerationConfig())]
        listed = model._get_logits_processor(config, 3, logits_processor=mine, device="cpu")
        return [type(p) for p in listed[listed.index(mine[0]) + 1 :]]

    assert list(EVERY) == list(WARPERS)
    theirs = after(GenerationConfig(**EVERY))
    assert theirs == [type(p) for p in given(GenerationConfig(**EVERY)).warpers]
    bare = greedy_config(GenerationConfig(**EVERY))
    assert bare.do_sample is False
    listed = model._get_logits_processor(bare, 3, logits_processor=[mine := given(bare)])
    assert listed[-1] is mine


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_a_warper_acts_where_that_of_generate_does(model, name, value):
    """Also at the ends of its range, or it is refused in the same words."""
    fields = {
        "top_k": 0,
        "do_sample": True,
        name: value if value is None else type(EVERY[name])(value),
    }
    config = GenerationConfig()
    vars(config).update(fields)  # unchecked, as a config of another release may be

    def made(build):
        try:
            return [type(p).__name__ for p in build()]
        except ValueError as error:
            return str(error)

    theirs = made(lambda: model._get_logits_processor(config, 3, device="cpu"))
    assert made(lambda: given(config).warpers) == theirs


def test_a_watermark_is_refused():
    config = GenerationConfig(max_new_tokens=3, watermarking_config=WatermarkingConfig())
    message = "generation_config: watermarking_config = .*put on after everything else"
    with pytest.raises(ValueError, match=message):
        given(config)
    with pytest.raises(ValueError, match=message):
        HFSampler(generation_config=config, eos_token_id=END, pad_token_id=END)


def test_sampler_and_policy_differ_by_the_warping(model):
    rollout = draw(model, top_k=3)
    scored = policy_stats(model, rollout).logprob
    drawn = rollout.sampler_logprobs[rollout.mask]
    assert (drawn > scored).all()  # the same three tokens share all of the probability


@pytest.mark.gpu
def test_every_warper_works_on_a_gpu(model):
    rollout = draw(copy.deepcopy(model).cuda(), **EVERY)
    assert rollout.sampler_logprobs.is_cuda
    check(model, rollout.to("cpu"), EVERY)


def test_greedy_config_leaves_other_fields():
    config = GenerationConfig(
        **EVERY | {"top_k": 3}, do_sample=True, repetition_penalty=1.2, max_new_tokens=9,
    )  # fmt: skip
    bare = greedy_config(config)
    assert [getattr(bare, name) for name in WARPERS] == [None] * len(WARPERS)
    assert (bare.do_sample, bare.repetition_penalty, bare.max_new_tokens) == (False, 1.2, 9)
    assert (config.top_k, config.do_sample) == (3, True)


# ---- drawing itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"temperature": 0.5}, {"top_k": 3}], ids=str)
def test_frequencies_are_the_distribution(config):
    """Of one row of scores asked over and over, with evenly spread numbers: no chance in it."""
    torch.manual_seed(0)
    count, scores = 20_000, torch.randn(V) * 2
    uniform = (torch.arange(count, dtype=torch.float64) / count)[:, None]
    draws = SamplingProcessor(GenerationConfig(**config), uniform)
    said = draws(torch.zeros(count, 1, dtype=torch.long), scores.expand(count, V).clone())
    tokens = said.argmax(-1)
    assert said.gather(1, tokens[:, None]).eq(0).all()
    assert said.isneginf().sum(-1).eq(V - 1).all()
    expected = warped(scores.double(), [0], config).exp()
    found = tokens.bincount(minlength=V).double() / count
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / count + 1e-6)
    logprobs, exact = draws.logprobs[:, 0].double(), dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs, expected[tokens].log(), **exact)


def test_each_step_has_its_own_numbers():
    """Row by row, and step by step: 0.1 takes the first of two tokens, 0.9 the second."""
    wanted = torch.tensor([[0, 1, 1], [1, 0, 1]])
    draws = SamplingProcessor(GenerationConfig(), torch.where(wanted.bool(), 0.9, 0.1).double())
    steps = [draws(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 2)) for _ in range(3)]
    assert torch.equal(torch.stack([s.argmax(-1) for s in steps], 1), wanted)
    assert draws.logprobs.shape == (2, 3)


def test_broken_weights_are_reported_with_the_prompt(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = torch.nan  # of the second prompt
    with pytest.raises(FloatingPointError, match=r"number 1\b.*weights are broken"):
        draw(broken, batch_size=5)
