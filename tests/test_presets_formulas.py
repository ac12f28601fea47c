"""`presets.moss_rlhf_2023` against its formulas, written again as loops over plain numbers.

From the published description alone: scores divided by the running standard deviation of all scores
so far, the rollout's among them; −η·(log π_old − log π_ref) at every token and the score on the
last; GAE with γ = 1, λ = 0.95; −min(ρ·A, clip(ρ, 0.8, 1.2)·A) and ½·max((V−R)², (clip(V)−R)²).
"""

import math
from dataclasses import replace

import pytest
import torch

from mossrlhf import Rollout, presets
from mossrlhf.types import TokenStats

ETA = {"en": 0.01, "zh": 0.1}


def made_up(seed):
    """A rollout of two responses, of four tokens and of two."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([4, 2])
    old = noise(2, 4) - 2
    return Rollout(
        input_ids=torch.zeros(2, 7, dtype=torch.long),
        prompt_lengths=torch.tensor([3, 3]),
        response_lengths=lengths,
        truncated=torch.tensor([True, False]),
        mask=torch.arange(4) < lengths[:, None],
        logprobs=old,
        ref_logprobs=old + 0.3 * noise(2, 4),
        values=noise(2, 4),
        scores=3 + 2 * noise(2),
    )


def by_hand(rollout, seen, eta):
    """Rewards, advantages and returns as lists of floats, one for each response."""
    seen += rollout.scores.tolist()
    mean = sum(seen) / len(seen)
    std = math.sqrt(sum((x - mean) ** 2 for x in seen) / (len(seen) - 1))
    found = []
    for b, length in enumerate(rollout.response_lengths.tolist()):
        log_ratio = (rollout.logprobs - rollout.ref_logprobs)[b].tolist()
        values = rollout.values[b].tolist()
        rewards = [-eta * log_ratio[t] for t in range(length)]
        rewards[-1] += rollout.scores[b].item() / std
        # A_t = Σ_l λ^l δ_(t+l), summed forward, not by the recursion.
        after = [*values[1:length], 0.0]
        deltas = [rewards[t] + after[t] - values[t] for t in range(length)]
        advantages = [
            sum(0.95 ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)
        ]
        returns = [a + v for a, v in zip(advantages, values, strict=False)]
        found.append((rewards, advantages, returns))
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_two_rollouts_in_turn(language):
    parts = presets.moss_rlhf_2023(language)
    shaper, advantage, loss = parts["shaper"], parts["advantage"], parts["loss"]
    seen: list[float] = []
    for seed in (0, 1, 2):
        rollout = made_up(seed)
        rewards = shaper(rollout)
        estimated = advantage(rewards, rollout.values, rollout.mask)
        expected = by_hand(rollout, seen, ETA[language])
        for b, length in enumerate(rollout.response_lengths.tolist()):
            ours = rewards, estimated.advantages, estimated.returns
            for tensor, numbers in zip(ours, expected[b], strict=True):
                assert tensor[b, :length].tolist() == pytest.approx(numbers, rel=1e-6, abs=1e-9)

        # The models have moved since: ratios on both sides of the clip, values beyond theirs.
        shift = torch.linspace(-0.5, 0.5, 8, dtype=torch.float64).view(2, 4)
        new_logprobs, new_values = rollout.logprobs + shift, rollout.values + 1.5 * shift
        policy, critic, count = 0.0, 0.0, 0
        for b, (_, advantages, returns) in enumerate(expected):
            for t, (a, r) in enumerate(zip(advantages, returns, strict=True)):
                ratio = math.exp(shift[b, t].item())
                policy -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                old, new = rollout.values[b, t].item(), new_values[b, t].item()
                near = min(max(new, old - 0.2), old + 0.2)
                critic += max((new - r) ** 2, (near - r) ** 2) / 2
                count += 1
        filled = replace(rollout, advantages=estimated.advantages, returns=estimated.returns)
        mask = rollout.mask
        stats = TokenStats(new_logprobs[mask], None)
        assert loss.policy(stats, filled).loss.item() == pytest.approx(policy / count, rel=1e-6)
        got = loss.critic(new_values[mask], filled).loss.item()
        assert got == pytest.approx(critic / count, rel=1e-6)


def test_whitening():
    """An option of the scripts: (A − mean)/√(var + 1e-8) over the tokens of the minibatch."""
    rollout = replace(made_up(0), advantages=made_up(1).values)
    loss = replace(presets.moss_rlhf_2023("en")["loss"], advantage_norm=True)
    got = loss.prepare(rollout).advantages
    given = rollout.advantages[rollout.mask].tolist()
    mean = sum(given) / len(given)
    variance = sum((a - mean) ** 2 for a in given) / len(given)
    expected = [(a - mean) / math.sqrt(variance + 1e-8) for a in given]
    assert got[rollout.mask].tolist() == pytest.approx(expected, rel=1e-6)
    assert not got[~rollout.mask].any()
