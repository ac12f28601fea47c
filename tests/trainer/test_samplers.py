"""Whole iterations with samplers other than `HFSampler`; the engine is a stand-in for vLLM."""

import copy
import re
import sys
from dataclasses import replace

import pytest
import stand_in_vllm
import torch
from transformers import GenerationConfig

from mossrlhf import ContinuousSampler, PPOMaxLoss, VLLMSampler
from mossrlhf.functional import clipped_policy_loss
from mossrlhf.models import policy_stats
from mossrlhf.sampling import VLLMEngine
from mossrlhf.sampling.vllm import Synchronizer

GAP, OFF = "sampler/logprob_gap_nats", "sampler/ratio_off_fraction"


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", stand_in_vllm)


@pytest.fixture
def trainer(make, world):
    """Two steps with an engine that began as a copy of the policy."""

    def build(sampler=None, bf16=False, **options):
        config = GenerationConfig(max_new_tokens=8, do_sample=True)
        policy = make("policy").policy
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(10)  # further from uniform, where all weights say much the same
        engine = VLLMEngine(stand_in_vllm.LLM(copy.deepcopy(policy)))
        sampler = sampler or VLLMSampler.for_tokenizer(world.tokenizer(), config, engine)
        args = {"total_steps": 3, "learning_rate": 1e-2, "bf16": bf16}
        return make(model=policy, sampler=sampler, args=args, **options)

    return build


def test_engine_follows_the_policy(trainer):
    run = trainer()
    history = run.train()
    assert len(history) == 3
    assert all(row[GAP] < 1e-5 for row in history)
    assert all(row[OFF] == 0 for row in history)
    # Before the first iteration the reference is asked, with weights of its own.
    assert run.sampler.synchronizer.times == 4
    assert "VLLMEngine(LLM), times=4" in str(run)
    assert "max_new_tokens = 8" in str(run)


def test_without_synchronization_the_gap_grows(trainer, monkeypatch):
    monkeypatch.setattr(Synchronizer, "__call__", lambda self, model: False)
    history = trainer().train()
    assert history[0][GAP] < 1e-5  # a copy of the policy, as yet
    assert history[2][GAP] > 0.05
    assert history[2][OFF] > 0.1


def test_truncated_importance_weights_of_an_engine_that_is_off(trainer, monkeypatch):
    """The loss is Σ w·min(π_old/π_sampler, C)·L / Σ w, by hand."""
    cap = 1.2
    load = stand_in_vllm.Runner.load

    def perturbed(runner, weights):
        torch.manual_seed(5)
        load(runner, [(name, w + 0.01 * w.std() * torch.randn(w.shape)) for name, w in weights])

    monkeypatch.setattr(stand_in_vllm.Runner, "load", perturbed)
    run = trainer(loss=PPOMaxLoss(sampler_ratio_cap=cap))
    rollout = run.estimate(run.annotate(run.score(run.collect())))
    mask, stats = rollout.mask, policy_stats(run.policy, rollout)
    ratio = (rollout.logprobs - rollout.sampler_logprobs)[mask].exp()
    assert 0.1 < (ratio > cap).float().mean() < 0.9  # some are cut, some are not
    per_token = clipped_policy_loss(
        stats.logprob, rollout.logprobs[mask], rollout.advantages[mask], (0.2, 0.2)
    )
    expected = (per_token * ratio.clamp(max=cap)).sum() / mask.sum()
    torch.testing.assert_close(run.loss.policy(stats, rollout).loss, expected)
    plain = replace(rollout, sampler_logprobs=None)
    unweighted = run.loss.policy(stats, plain).loss
    torch.testing.assert_close(unweighted, per_token.mean())
    assert (unweighted - expected).abs() > 1e-3
    assert all(torch.isfinite(torch.tensor(row["policy/loss"])) for row in run.train())


@pytest.mark.parametrize("config", [{}, {"temperature": 0.7}, {"top_p": 0.5}], ids=str)
def test_the_gap_of_hf_sampler_is_logged(make, config):
    """0 but for rounding where tokens come from the policy itself, at whatever temperature."""
    settings = GenerationConfig(max_new_tokens=8, do_sample=True, **config)
    history = make(generation_config=settings, args={"total_steps": 2}).train()
    for row in history:
        assert (row[GAP] > 0.1) if "top_p" in config else (row[GAP] < 1e-5)
        assert (row[OFF] > 0) == ("top_p" in config)


def test_a_cap_changes_nothing_where_the_sampler_is_the_policy(make):
    run = make(loss=PPOMaxLoss(sampler_ratio_cap=1.2))
    rollout = run.estimate(run.annotate(run.score(run.collect())))
    stats = policy_stats(run.policy, rollout)
    plain = run.loss.policy(stats, replace(rollout, sampler_logprobs=None)).loss
    torch.testing.assert_close(run.loss.policy(stats, rollout).loss, plain, atol=1e-5, rtol=1e-4)


def test_continuous_batching(trainer, world):
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.8)
    run = trainer(ContinuousSampler.for_tokenizer(world.tokenizer(), config))
    history = run.train()
    assert all(row[GAP] < 1e-5 for row in history)
    assert "temperature = 0.8" in str(run)


def test_continuous_batching_beside_autocast(trainer, world):
    """Its thread knows nothing of autocast: it draws in the weights' own type."""
    config = GenerationConfig(max_new_tokens=8, do_sample=True)
    run = trainer(ContinuousSampler.for_tokenizer(world.tokenizer(), config), bf16=True)
    history = run.train()
    assert 1e-5 < history[0][GAP] < 0.3


def test_the_sampler_of_the_docs(trainer, world, root):
    page = (root / "docs" / "samplers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- tested -->\n```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {"tokenizer": world.tokenizer()}
    exec(block, names)
    history = trainer(names["OneAtATime"]()).train()
    assert all(row[GAP] < 1e-5 for row in history)
    assert {row["response/length_tokens"] <= 8 for row in history} == {True}
