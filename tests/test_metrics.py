"""Metrics match loops over the tokens; means do not depend on how the tokens are split."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mossrlhf.metrics import Meter, distinct_2, explained_variance, quantiles, rollout_metrics
from mossrlhf.types import Rollout

LENGTHS = [3, 1, 5]


def rollout_of(lengths=LENGTHS, **fields):
    """A rollout with random per-token fields, NaN wherever the mask does not reach."""
    count, width = len(lengths), max(lengths)
    response = torch.tensor(lengths)
    mask = torch.arange(width) < response[:, None]
    generator = torch.Generator().manual_seed(3)

    def noise(scale=1.0):
        x = scale * torch.randn(count, width, generator=generator)
        return torch.where(mask, x, torch.nan)

    values = dict(
        input_ids=torch.arange(count * (width + 2)).view(count, width + 2) % 7,
        prompt_lengths=torch.full((count,), 2),
        response_lengths=response,
        truncated=torch.tensor([False] * (count - 1) + [True]),
        mask=mask,
        logprobs=-noise().abs(),
        ref_logprobs=-noise(2.0).abs(),
        entropies=noise().abs(),
        values=noise(),
        returns=noise(),
        advantages=noise(),
        rewards=torch.where(mask, noise(), 0.0),
        scores=torch.randn(count, generator=generator),
    )
    return Rollout(**{**values, **fields})


def tokens(rollout, x):
    """The entries of a [B, T] tensor at the response's tokens, one by one."""
    return [
        x[row, place].item()
        for row, length in enumerate(rollout.response_lengths.tolist())
        for place in range(length)
    ]


@pytest.fixture
def rollout():
    return rollout_of()


@pytest.mark.parametrize("who", ["policy", "ref"])
def test_perplexity_is_exp_of_the_token_mean(rollout, who):
    logprobs = rollout.logprobs if who == "policy" else rollout.ref_logprobs
    nll = [-value for value in tokens(rollout, logprobs)]
    expected = math.exp(sum(nll) / len(nll))
    assert rollout_metrics(rollout)[f"perplexity/{who}"] == pytest.approx(expected, rel=1e-5)


def test_kl_per_token_and_per_sequence(rollout):
    pairs = list(
        zip(tokens(rollout, rollout.logprobs), tokens(rollout, rollout.ref_logprobs), strict=True)
    )
    k1 = sum(ours - theirs for ours, theirs in pairs)
    k3 = sum(math.exp(theirs - ours) - 1 - (theirs - ours) for ours, theirs in pairs)
    metrics = rollout_metrics(rollout)
    assert metrics["kl/ref_per_sequence"] == pytest.approx(k1 / 3, rel=1e-4)
    assert metrics["kl/ref_per_token"] == pytest.approx(k1 / 9, rel=1e-4)
    assert metrics["kl/ref_k3_per_sequence"] == pytest.approx(k3 / 3, rel=1e-4)
    assert metrics["kl/ref_k3_per_token"] == pytest.approx(k3 / 9, rel=1e-4)


def test_k1_is_positive_if_the_policy_is_more_certain():
    log_half, log_tenth = math.log(0.5), math.log(0.1)
    rollout = rollout_of(
        logprobs=torch.full((3, 5), log_half), ref_logprobs=torch.full((3, 5), log_tenth)
    )
    metrics = rollout_metrics(rollout)
    assert metrics["kl/ref_per_token"] == pytest.approx(math.log(5), rel=1e-6)
    assert metrics["kl/ref_per_sequence"] == pytest.approx(3 * math.log(5), rel=1e-6)
    assert metrics["perplexity/policy"] == pytest.approx(2, rel=1e-6)
    assert metrics["perplexity/ref"] == pytest.approx(10, rel=1e-6)


def test_response_and_reward_metrics_by_loops(rollout):
    metrics = rollout_metrics(rollout)
    assert metrics["response/length_tokens"] == 3
    assert metrics["response/truncated_fraction"] == pytest.approx(1 / 3)
    assert metrics["response/distinct_2"] == distinct_2(rollout.completions())
    total = sum(tokens(rollout, rollout.rewards))
    assert metrics["reward/return_mean"] == pytest.approx(total / 3, rel=1e-5)
    entropies = tokens(rollout, rollout.entropies)
    assert metrics["policy/entropy_nats_per_token"] == pytest.approx(np.mean(entropies), rel=1e-5)
    for name in ("advantages", "values", "returns"):
        column = tokens(rollout, getattr(rollout, name))
        assert metrics[f"{name}/mean"] == pytest.approx(np.mean(column), rel=1e-5)
        assert metrics[f"{name}/std"] == pytest.approx(np.std(column), rel=1e-5)


def test_moments_leave_non_finite_rewards_out():
    some = torch.tensor([1.0, torch.nan, 4.0])
    metrics = rollout_metrics(rollout_of(scores=some, extra={"reward/a": some, "other": some}))
    for name in ("reward/score_", "reward/a/"):
        assert metrics[f"{name}mean"] == pytest.approx(2.5)
        assert metrics[f"{name}std"] == pytest.approx(1.5)
    assert not [name for name in metrics if "other" in name]


def test_sampler_gap_and_ratio():
    gap = torch.tensor([0.05, 0.2, 0.0, 0.0, 0.0])  # exp(0.2) is off by more than a tenth
    rollout = rollout_of(lengths=[2, 5])
    metrics = rollout_metrics(
        rollout_of(
            lengths=[2, 5], sampler_logprobs=rollout.logprobs - gap * torch.tensor([[1], [-1]])
        )
    )
    assert metrics["sampler/logprob_gap_nats"] == pytest.approx(0.5 / 7, rel=1e-5)
    assert metrics["sampler/ratio_off_fraction"] == pytest.approx(2 / 7, rel=1e-5)


def test_metrics_of_missing_tensors_are_left_out():
    annotated = ["logprobs", "ref_logprobs", "entropies", "values"]
    estimated = ["scores", "rewards", "advantages", "returns"]
    rollout = rollout_of(**dict.fromkeys([*annotated, *estimated]))
    assert {name.split("/")[0] for name in rollout_metrics(rollout)} == {"response"}


def test_explained_variance_matches_numpy(rollout):
    returns = np.array(tokens(rollout, rollout.returns))
    values = np.array(tokens(rollout, rollout.values))
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert float(explained_variance(rollout)) == pytest.approx(expected, rel=1e-5)
    assert rollout_metrics(rollout)["critic/explained_variance"] == pytest.approx(expected)


def test_explained_variance_of_perfect_constant_and_inverted_critics(rollout):
    returns = torch.where(rollout.mask, rollout.returns, 0.0)
    cases = [(returns, 1.0), (returns + 5, 1.0), (torch.zeros(3, 5), 0.0), (-returns, -3.0)]
    for values, expected in cases:
        critic = rollout_of(returns=returns, values=values)
        assert float(explained_variance(critic)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.7, 1e4])
def test_explained_variance_is_zero_for_constant_returns(level):
    # At 0.1 the float32 mean of equal numbers is off in its last bit: no variance to explain.
    lengths = [7] * 29
    rollout = rollout_of(lengths, returns=torch.full((29, 7), level))
    assert float(explained_variance(rollout)) == 0


def test_explained_variance_counts_states_beyond_the_mask():
    returns, values = torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    states = torch.tensor([[True, True, True]])
    rollout = rollout_of([3], returns=returns, values=values)
    short = rollout_of(
        [3], returns=returns, values=values, mask=torch.tensor([[True, True, False]])
    )
    assert float(explained_variance(short)) == 1
    assert float(explained_variance(rollout)) == pytest.approx(1 - (50 / 9) / (8 / 3))
    widened = rollout_of([3], returns=returns, values=values, mask=short.mask, state_mask=states)
    assert float(explained_variance(widened)) == float(explained_variance(rollout))


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        ([[1, 2, 3]], 1.0),  # (1, 2), (2, 3)
        ([[1, 2, 3], [1, 2, 4]], 3 / 4),  # (1, 2) twice
        ([[7, 7, 7, 7, 7]], 1 / 4),
        ([[1, 2], [2, 1]], 1.0),  # order matters
        ([[1, 2], [3]], 1.0),  # no bigram across responses
        ([[1], []], 0.0),
        ([], 0.0),
    ],
)
def test_distinct_2(completions, expected):
    assert distinct_2(completions) == expected


def test_meter_weights_means():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0)}, torch.tensor(30.0))
    meter.add({"loss": torch.tensor(4.0), "rare": torch.tensor(7.0)}, torch.tensor(10.0))
    assert meter.compute() == {"loss": pytest.approx((30 + 40) / 40), "rare": pytest.approx(7)}
    assert Meter().compute() == {}


def test_meter_is_exact_over_many_steps():
    meter = Meter()
    for _ in range(1000):
        meter.add({"x": torch.tensor(0.1)}, torch.tensor(3.0))
    assert meter.compute()["x"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_meter_adds_the_shares_of_processes():
    # Two processes with 6 and 2 of a step's 8 tokens; each adds its share, weighed by all 8.
    full, ours, theirs = Meter(), Meter(), Meter()
    for mine, others in [(1.5, 0.25), (0.5, 1.0)]:
        weight = torch.tensor(8.0)
        ours.add({"loss": torch.tensor(mine)}, weight)
        theirs.add({"loss": torch.tensor(others)}, weight)
        full.add({"loss": torch.tensor(mine + others)}, weight)
    collected = []
    theirs.compute(lambda sums: collected.append(sums) or sums)
    assert ours.compute(lambda sums: sums + collected[0]) == full.compute()


SCORES = np.random.default_rng(0).normal(3.0, 2.0, 61)


@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        SCORES**3,
        SCORES.round(),  # ties, and one at the mean
        np.array([0.0] * 19 + [1.0]),  # as far from the mean as a twentieth can be
        np.array([-1.0] + [0.0] * 19),
        np.array([1e6, -5.0, 2.0]),
        np.array([0.1] * 7),
        np.array([4.0]),
        np.arange(20.0),
    ],
)
def test_quantiles_match_numpy(scores):
    shares = (0.05, 0.25, 0.5, 0.95)
    expected = np.quantile(scores, shares, method="inverted_cdf")
    mixed = torch.tensor([math.nan, *scores, math.inf], dtype=torch.float64)
    found = quantiles(mixed, torch.isfinite(mixed), shares)
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_quantiles_of_the_scores_are_logged():
    scores = torch.tensor([*range(100), math.nan])
    metrics = rollout_metrics(rollout_of(lengths=[1] * 101, scores=scores))
    names = [f"reward/score_p{percent}" for percent in ("05", "50", "95")]
    assert [metrics[name] for name in names] == pytest.approx([4.0, 49.0, 94.0])


def test_quantiles_of_no_scores_are_zero():
    nothing = torch.full((3,), math.nan, dtype=torch.float64)
    assert quantiles(nothing, torch.isfinite(nothing), (0.5,)).tolist() == [0.0]


def test_metrics_of_two_processes_equal_those_of_one(rollout):
    parts = [rollout.select(torch.tensor([0])), rollout.select(torch.tensor([1, 2]))]
    ours, theirs = together(parts)
    assert ours == theirs
    expected = rollout_metrics(rollout)
    del expected["response/distinct_2"]  # pooled within a process
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def together(parts):
    """Compute the metrics of each part in its own thread, as processes do."""
    barrier, sent = threading.Barrier(len(parts), timeout=60), [None] * len(parts)

    def process(rank):
        def reduce(tensor):
            sent[rank] = tensor
            barrier.wait()
            total = sum(sent)
            barrier.wait()
            return total

        return rollout_metrics(parts[rank], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(process, range(len(parts))))
