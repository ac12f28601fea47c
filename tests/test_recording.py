"""What a warped sampler drew from: noted while it runs, recomputed here token by token."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mossrlhf.models import policy_stats
from mossrlhf.recording import unwarped
from mossrlhf.sampling import HFSampler

V, END = 30, 2
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]] * 4
EVEN = [[5, 6, 7], [8, 9, 10]] * 6


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
    order = p.argsort(descending=True)
    keep = torch.ones(V, dtype=torch.bool)
    if "top_k" in config:
        keep[order[config["top_k"] :]] = False
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    if "top_p" in config:
        before = p[order].cumsum(-1) - p[order]  # likelier tokens together
        keep[order[before >= config["top_p"]]] = False
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    if "min_p" in config:
        keep &= p >= config["min_p"] * p.max()
        p = torch.where(keep, p, 0.0) / p[keep].sum()
    return p.log()


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize(
    "config",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"top_k": 8, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.1},
    ],
    ids=lambda config: "+".join(config),
)
def test_log_probabilities_of_the_sampler(model, config, batch_size):
    rollout = draw(model, batch_size, **config)
    rows = zip(rollout.prompts(), rollout.completions(), strict=True)
    for b, (prompt, response) in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].double()
        for t, token in enumerate(response):
            place = len(prompt) + t
            expected = warped(logits[place - 1], (prompt + response)[:place], config)[token]
            assert rollout.sampler_logprobs[b, t].item() == pytest.approx(expected.item(), abs=1e-4)
    assert not rollout.sampler_logprobs[~rollout.mask].any()
    assert rollout.sampler_logprobs.dtype == torch.float32


@pytest.mark.parametrize("config", [{}, {"temperature": 0.7}, {"do_sample": False}], ids=str)
def test_nothing_is_noted_where_scored_and_drawn_agree(model, config):
    assert draw(model, **config).sampler_logprobs is None


def test_the_recorder_changes_no_draw(model):
    """The warpers act as they do inside `generate`: token for token, from the same seed."""
    config = {"top_k": 5, "top_p": 0.9, "temperature": 0.8, "max_new_tokens": 4}
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


def test_unwarped_leaves_the_rest():
    given = GenerationConfig(
        top_k=3, top_p=0.5, min_p=0.1, typical_p=0.5, temperature=0.7, do_sample=True,
        repetition_penalty=1.2, max_new_tokens=9,
    )  # fmt: skip
    bare = unwarped(given)
    assert (bare.top_k, bare.top_p, bare.min_p, bare.typical_p) == (0, 1.0, None, 1.0)
    assert (bare.temperature, bare.repetition_penalty, bare.max_new_tokens) == (1.0, 1.2, 9)
    assert given.top_k == 3
