"""What a warped sampler drew from: noted while it runs, recomputed here token by token."""

import copy

import pytest
import torch
from mossrlhf.sampling.recording import WARPERS, Recorder, unwarped
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, WatermarkingConfig

from mossrlhf.models import policy_stats
from mossrlhf.sampling import HFSampler

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
    for b, (prompt, response) in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        for t, token in enumerate(response):
            place = len(prompt) + t
            expected = warped(logits[place - 1], (prompt + response)[:place], config)[token]
            assert rollout.sampler_logprobs[b, t].item() == pytest.approx(expected.item(), abs=1e-4)


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
    assert not rollout.sampler_logprobs[~rollout.mask].any()
    assert rollout.sampler_logprobs.dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"temperature": 0.7}, {"do_sample": False}], ids=str)
def test_nothing_is_noted_where_scored_and_drawn_agree(model, config):
    assert draw(model, **config).sampler_logprobs is None


def test_nothing_comes_after_the_recorder(model):
    """Whatever warpers `generate` has of its own, none is left to act after ours, in its order."""

    def after(config):
        config.update(max_length=9, do_sample=True)
        mine = [Recorder(GenerationConfig(), "cpu")]
        listed = model._get_logits_processor(config, 3, logits_processor=mine, device="cpu")
        return [type(p) for p in listed[listed.index(mine[0]) + 1 :]]

    assert list(EVERY) == list(WARPERS)
    theirs = after(GenerationConfig(**EVERY))
    assert theirs == [type(p) for p in Recorder(GenerationConfig(**EVERY)).warpers]
    assert after(unwarped(GenerationConfig(**EVERY))) == []


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
    assert made(lambda: Recorder(config).warpers) == theirs


def test_a_watermark_is_refused():
    config = GenerationConfig(max_new_tokens=3, watermarking_config=WatermarkingConfig())
    message = "generation_config: watermarking_config = .*put on after everything else"
    with pytest.raises(ValueError, match=message):
        Recorder(config)
    with pytest.raises(ValueError, match=message):
        HFSampler(generation_config=config, eos_token_id=END, pad_token_id=END)


@pytest.mark.parametrize(
    "config",
    [{"top_k": 5, "top_p": 0.9, "temperature": 0.8}, EVERY],
    ids=["usual", "every warper"],
)
def test_the_recorder_changes_no_draw(model, config):
    """The warpers act as they do inside `generate`: token for token, from the same seed."""
    config = {**config, "max_new_tokens": 4}
    torch.manual_seed(7)
    rollout = draw(model, **config)
    torch.manual_seed(7)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[END] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    plain = model.generate(ids, attention_mask=mask, do_sample=True, pad_token_id=END, **config)
    for response, row in zip(rollout.completions(), plain[:, width:].tolist(), strict=True):
        assert row[: len(response)] == response


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


def test_unwarped_leaves_the_rest():
    given = GenerationConfig(
        **EVERY | {"top_k": 3}, do_sample=True, repetition_penalty=1.2, max_new_tokens=9,
    )  # fmt: skip
    bare = unwarped(given)
    assert (bare.top_k, bare.top_p, bare.min_p, bare.typical_p) == (0, 1.0, None, 1.0)
    assert (bare.top_h, bare.epsilon_cutoff, bare.eta_cutoff) == (None, 0.0, 0.0)
    assert (bare.temperature, bare.repetition_penalty, bare.max_new_tokens) == (1.0, 1.2, 9)
    assert given.top_k == 3
