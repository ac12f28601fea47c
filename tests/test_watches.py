"""Collapse is detected at any length, and a policy that does not move is reported."""

import math
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from mossrlhf.metrics import (
    LATELY,
    CollapseWarning,
    CollapseWatch,
    StillPolicyWarning,
    StillWatch,
    distinct_2,
)
from mossrlhf.toyworld import ToyWorld


def described(responses, kl):
    return {"kl/ref_per_sequence": kl, "response/distinct_2": distinct_2(responses)}


def varied(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 60, (count, length), generator=generator).tolist()


HEALTHY = varied(64, 17)
PHRASE = [5, 6, 7, 8]

COLLAPSED = {
    "one phrase to the limit": [PHRASE * 8] * 64,
    "one token to the limit": [[9] * 32] * 64,
    "one sentence for everyone": [HEALTHY[0]] * 64,
    "two words": [[3, 4, 1]] * 64,
    "nothing but the end": [[1]] * 64,
}


@pytest.fixture
def watch():
    return CollapseWatch(kl_bound=25.0, reference_distinct_2=distinct_2(HEALTHY))


@pytest.mark.parametrize("name", COLLAPSED)
def test_collapse_is_detected_at_any_length(watch, name):
    with pytest.warns(CollapseWarning, match=r"303.0 nats per sequence .bound 25"):
        assert watch(described(COLLAPSED[name], kl=303.0))


@pytest.mark.parametrize(
    ("responses", "kl"),
    [
        (HEALTHY, 4.8),
        (varied(64, 32, seed=1), 30.0),  # far from the reference, and still many things to say
        (varied(64, 3, seed=2), 40.0),  # short alone is no collapse
        (COLLAPSED["two words"], 2.0),  # nor is monotony that the reference shares
    ],
)
def test_healthy_policy_is_not_flagged(watch, responses, kl):
    assert not watch(described(responses, kl))


def test_collapse_warning_is_repeated_only_after_ten_healthy_iterations(watch):
    bad, good = described(COLLAPSED["two words"], 50.0), described(HEALTHY, 3.0)
    told = []
    for step, metrics in enumerate([bad, bad, *[good] * (LATELY - 1), bad, *[good] * LATELY, bad]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert watch(metrics) == (metrics is bad)
        told += [step] * len(caught)
        assert watch.lately == (metrics is bad or step < 2 * LATELY + 1)
    assert told == [0, 2 * LATELY + 2]


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"kl/ref_per_sequence": 99.0},
        {"response/distinct_2": 0.0},
        described([[1, 1]], math.nan),
    ],
)
def test_collapse_needs_both_metrics(watch, metrics):
    assert not watch(metrics)
    assert not CollapseWatch(25.0, None)(described([[1, 1, 1]], 99.0))


# A policy that does not move.


def trained(dtype, rate, steps):
    """Yield the share of a language model's weights that changed, after each step of AdamW."""
    config = ToyWorld().model_config(hidden_size=16, num_layers=1)
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    watch = StillWatch(model.parameters(), patience=3)
    ids = torch.arange(120).view(4, 30)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield watch(rate)


def test_still_watch_warns_in_bfloat16_at_a_small_learning_rate():
    with pytest.warns(StillPolicyWarning, match="float32") as caught:
        changed = list(trained(torch.bfloat16, 5e-7, steps=6))
    assert max(changed) < 0.05
    assert len(caught) == 1  # once, not at every step


def test_float32_moves_at_the_same_learning_rate():
    assert min(trained(torch.float32, 5e-7, steps=6)) > 0.5


def test_bfloat16_moves_at_a_large_learning_rate():
    assert min(trained(torch.bfloat16, 1e-2, steps=6)) > 0.5


def test_still_watch_counts_iterations_in_a_row():
    model = nn.Linear(4, 4)
    watch = StillWatch(model.parameters(), patience=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [watch(1.0), watch(1.0)] == [0, 0]
        with torch.no_grad():
            model.weight.add_(1.0)
        assert watch(1.0) == pytest.approx(16 / 20)
        assert [watch(1.0), watch(1.0)] == [0, 0]
    with pytest.warns(StillPolicyWarning, match="3 iterations in a row"):
        watch(1.0)


def test_still_watch_expects_no_change_at_learning_rate_zero():
    watch = StillWatch(nn.Linear(4, 4).parameters(), patience=1)
    assert watch(0.0) == 0


def test_still_watch_ignores_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    watch = StillWatch(model.parameters(), patience=1)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(1.0)
    assert watch(1.0) == 1
    nothing = StillWatch(nn.Linear(4, 4).requires_grad_(False).parameters(), patience=1)
    assert nothing(1.0) == 1  # no place to see it from: nothing is claimed
