"""Each stage does what it is asked for, for as many responses as it is asked for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mossrlhf import AdvantageEstimator, PPOMaxLoss, RewardShaper
from mossrlhf.models import IGNORED_LABEL
from mossrlhf.optimization import StepOutput


def brevity(*, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def ones(*, completions, **columns):
    return [1.0] * len(completions)


@pytest.fixture
def two_processes(monkeypatch):
    """Let a trainer believe that another process does half of the work."""

    def pretend(trainer):
        kind = type(trainer.accelerator)
        monkeypatch.setattr(kind, "num_processes", property(lambda self: 2))
        return trainer

    return pretend


def test_a_rollout_has_its_size(make, two_processes):
    trainer = make(args=dict(rollout_size=8))
    assert len(trainer.collect()) == 8
    assert len(two_processes(trainer).collect()) == 4


def test_several_responses_to_a_prompt_stand_together(make):
    trainer = make(args=dict(rollout_size=8, samples_per_prompt=2))
    prompts = [tuple(ids) for ids in trainer.collect().prompts()]
    assert prompts[::2] == prompts[1::2]
    assert len(prompts) == 8
    assert trainer.prompts.position == 4


def test_an_answer_for_each_prompt(make, world):
    trainer = make()
    assert len(trainer.respond(world.prompts(5))) == 5
    assert len(trainer.respond(world.prompts(5), reference=True)) == 5


def test_responses_are_at_most_512_tokens_by_default(make, policy):
    trainer = make(model=policy(max_position_embeddings=1024), generation_config=None)
    assert trainer.sampler.max_new_tokens == 512


def test_a_shaper_that_says_nothing_of_the_end_scores_the_last_token(make):
    trainer = make(shaper=lambda rollout: rollout.mask * rollout.scores[:, None])
    assert trainer.collect().state_mask is None
    assert make("end", shaper=RewardShaper(score_after_end=True)).collect().state_mask is not None


def test_rewards_are_one_or_several_with_weights(make):
    one = make(reward=brevity)
    assert one.rewards.weights == {"brevity": 1.0}
    several = make("several", reward=[brevity, (ones, -0.5)])
    assert several.rewards.weights == {"brevity": 1.0, "ones": -0.5}
    rollout = several.score(several.collect())
    expected = -rollout.response_lengths.float() - 0.5
    torch.testing.assert_close(rollout.scores, expected)
    with_tuple = make("tuple", reward=(brevity, (ones, 2.0)))
    assert with_tuple.rewards.weights == {"brevity": 1.0, "ones": 2.0}


def test_without_a_critic_values_are_zero(make):
    """The return of an early token is the sum of what follows, with λ = 1."""
    trainer = make(
        reward=ones,
        critic=False,
        shaper=RewardShaper(kl_coef=None),
        advantage=AdvantageEstimator(lam=1.0),
    )
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    assert torch.equal(rollout.advantages, rollout.mask.float())
    assert torch.equal(rollout.returns, rollout.mask.float())


def test_dropout_stays_on_where_asked_for(make, policy):
    args = dict(minibatch_size=8, disable_dropout=False)
    trainer = make(model=policy(attention_dropout=0.5), args=args)
    assert abs(trainer.step(trainer.collect())["policy/ratio"] - 1) > 1e-4


def test_gradient_checkpointing_reaches_policy_and_critic(make):
    args = dict(gradient_checkpointing=True)
    trainer = make(args=args)
    assert trainer.policy.is_gradient_checkpointing
    assert trainer.critic.backbone.is_gradient_checkpointing
    make("alone", critic=False, args=args).train()


@pytest.mark.parametrize(
    ("size", "processes", "steps"), [(4, 1, 2), (3, 1, 3), (4, 2, 4), (1, 2, 8), (8, 2, 2)]
)
def test_minibatches_are_shared_out(make, two_processes, monkeypatch, size, processes, steps):
    """A rollout of 8 sequences of this process; its share of each minibatch is a part of them."""
    trainer = make(args=dict(minibatch_size=size))
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    if processes == 2:
        two_processes(trainer)
    taken = []
    nothing = StepOutput({}, {}, {})
    monkeypatch.setattr(trainer.engine, "step", lambda *given: (taken.append(given), nothing)[1])
    trainer.update(rollout)
    assert len(taken) == steps
    names = Counter(tuple(ids) for given in taken for ids in given[0].completions())
    assert names == Counter(tuple(ids) for ids in rollout.completions())


def test_statistics_of_minibatches_weigh_what_they_are_means_of(make, monkeypatch, world):
    """Tokens, states (finished responses have one more of them) and labels."""
    trainer = make(
        args=dict(minibatch_size=3),
        shaper=RewardShaper(score_after_end=True),
        loss=PPOMaxLoss(ptx_coef=0.1),
        ptx_dataset=world.sft_examples(16),
    )
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    seen, step = [], trainer.engine.step

    def watched(minibatch, loss, roles, ptx):
        done = step(minibatch, loss, roles, ptx)
        labels = int((ptx["labels"][:, 1:] != IGNORED_LABEL).sum())
        counts = int(minibatch.mask.sum()), int(minibatch.states.sum()), labels
        seen.append((dict(zip(("policy", "critic", "ptx"), counts, strict=True)), done))
        return done

    monkeypatch.setattr(trainer.engine, "step", watched)
    metrics = trainer.update(rollout)
    for role in ("policy", "critic", "ptx"):
        weights = [counts[role] for counts, _ in seen]
        losses = [done.stats[f"{role}/loss"].item() for _, done in seen]
        assert len(set(weights)) > 1
        expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        assert metrics[f"{role}/loss"] == pytest.approx(expected, rel=1e-5), role
    plain = sum(done.norms["policy/grad_norm"].item() for _, done in seen) / len(seen)
    assert metrics["policy/grad_norm"] == pytest.approx(plain, rel=1e-5)


def test_pre_training_data_need_no_prompts_and_may_be_one_record(make, world):
    (example,) = world.sft_examples(1)
    loss = PPOMaxLoss(ptx_coef=0.1)
    trainer = make(loss=loss, ptx_dataset=[{"text": example["response"]}])
    assert "ptx/loss" in trainer.train()[-1]


def test_pre_training_data_wait_for_the_policy(make, world):
    """The critic's warm-up takes none of them, nor does a loss without their term."""
    trainer = make(loss=PPOMaxLoss(ptx_coef=0.1), ptx_dataset=world.sft_examples(16))
    trainer.pretrain_critic(1)
    assert trainer.ptx.position == 0
    trainer.step(trainer.collect())
    assert trainer.ptx.position == 8
    trainer.loss = replace(trainer.loss, ptx_coef=None)
    assert "ptx/loss" not in trainer.step(trainer.collect())
    assert trainer.ptx.position == 8


def test_annotate_computes_what_a_rollout_holds_already_again(make):
    """Of another policy, or of tokens that have changed since, it would be wrong."""
    trainer = make()
    rollout = trainer.collect()
    expected = trainer.annotate(rollout)
    wrong = torch.full_like(expected.logprobs, -9.0)
    found = trainer.annotate(replace(expected, logprobs=wrong, entropies=wrong, values=wrong))
    for name in ("logprobs", "entropies", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
