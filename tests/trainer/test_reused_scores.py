"""Log-probabilities noted while responses are drawn, in the place of those scored afterwards."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from mossrlhf import Trainer


class Rescoring(Trainer):
    """Scores by the policy what the sampler has noted already."""

    def annotate(self, rollout):
        assert rollout.logprobs is not None
        scored = super().annotate(dataclasses.replace(rollout, logprobs=None, entropies=None))
        mask = rollout.mask
        for name in ("logprobs", "entropies"):
            noted, ours = getattr(rollout, name), getattr(scored, name)
            torch.testing.assert_close(noted[mask], ours[mask], rtol=0, atol=1e-5)
        return scored


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("split", [{}, {"micro_batch_size": 3}], ids=str)
def test_a_run_is_that_of_one_that_scores_again(make, temperature, split):
    config = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=temperature)
    histories = [
        make(
            kind.__name__,
            kind=kind,
            generation_config=config,
            args=dict(total_steps=2, rollout_size=8, seed=5, **split),
        ).train()
        for kind in (Trainer, Rescoring)
    ]
    ours, theirs = histories
    assert len(ours) == len(theirs) == 2
    for got, expected in zip(ours, theirs, strict=True):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith("time"):
                assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_policy_is_asked_where_nothing_is_noted(make):
    """The policy of all responses, or of two, to confirm what is noted; and the reference."""
    asked = {}
    for name, config in {
        "noted": {},
        "warped": {"top_k": 5},
        "greedy": {"do_sample": False},
    }.items():
        settings = GenerationConfig(**{"max_new_tokens": 8, "do_sample": True, **config})
        trainer = make(name, generation_config=settings)
        score, calls = trainer.model.score, []

        def spy(*args, score=score, calls=calls, **kwargs):
            calls.append(kwargs.get("policy"))
            return score(*args, **kwargs)

        trainer.model.score = spy
        rollout = trainer.annotate(trainer.collect())
        assert rollout.logprobs is not None
        assert rollout.entropies is not None
        asked[name] = [policy is None for policy in calls]
    assert asked == {"noted": [True, False], "warped": [True, False], "greedy": [True, False]}
