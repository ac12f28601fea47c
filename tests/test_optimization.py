"""Schedules, rates and bounds: what the optimizers are told to do."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from mossrlhf import PPOMaxLoss, RewardShaper
from mossrlhf import optimization as engine
from mossrlhf.models import IGNORED_LABEL
from mossrlhf.optimization import pack_optimizer, unpack_optimizer


def rates(trainer, role, steps):
    """The learning rate of a role at each of its next optimizer steps."""
    found = []
    for _ in range(steps):
        found.append(trainer.engine.learning_rates()[role])
        trainer.engine.optimizers[role].step()
        trainer.engine.schedulers[role].step()
    return found


@pytest.mark.parametrize(
    ("warmup", "policy", "critic"),
    [
        # Two iterations of two minibatches, and one more of the critic's warm-up: 4 and 6 steps.
        (0, [1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        (0.5, [0, 1 / 2, 1, 1], [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (0.3, [0, 1 / 2, 1, 1], [0, 1 / 2, 1, 1, 1, 1]),  # 1.2 and 1.8 steps: rounded up
        (1, [0, 1, 1, 1], [0, 1, 1, 1, 1, 1]),  # one step, not all of them
        (2, [0, 1 / 2, 1, 1], [0, 1 / 2, 1, 1, 1, 1]),
    ],
)
def test_warmup_is_a_share_of_each_roles_own_steps_or_a_number_of_them(
    make, warmup, policy, critic
):
    args = dict(warmup_steps=warmup, critic_pretrain_steps=1, critic_learning_rate=1e-2)
    trainer = make(args=args)
    assert rates(trainer, "policy", 4) == pytest.approx([1e-3 * share for share in policy])
    assert rates(trainer, "critic", 6) == pytest.approx([1e-2 * share for share in critic])


def test_schedules_are_transformers(make):
    trainer = make(args=dict(lr_scheduler_type="linear", warmup_steps=1))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler("linear", optimizer, 1, 4)
    expected = []
    for _ in range(4):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(trainer, "policy", 4) == pytest.approx(expected)
    assert len(set(expected)) == 4


def test_a_rate_changed_under_way_goes_on_along_its_schedule(make):
    trainer = make(args=dict(lr_scheduler_type="linear", warmup_steps=0))
    usual = rates(trainer, "policy", 4)
    other = make("other", args=dict(lr_scheduler_type="linear", warmup_steps=0))
    assert rates(other, "policy", 2) == usual[:2]
    other.engine.set_learning_rate("policy", 3e-3)
    assert rates(other, "policy", 2) == pytest.approx([3 * rate for rate in usual[2:]])
    assert rates(other, "critic", 4) == usual


@pytest.mark.parametrize("jointly", [False, True])
def test_gradients_are_bounded_by_role_or_together(make, jointly):
    """Norms are reported as they were; what the optimizers see is scaled down to the bound."""
    trainer = make(args=dict(max_grad_norm=1e-3, clip_grad_jointly=jointly, minibatch_size=8))
    seen = {}
    for role, optimizer in trainer.engine.optimizers.items():

        def look(optimizer, *_, role=role):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen[role] = torch.cat([grad.flatten() for grad in grads]).norm().item()

        optimizer.optimizer.register_step_pre_hook(look)
    metrics = trainer.step(trainer.collect())
    norms = {name: value for name, value in metrics.items() if name.endswith("grad_norm")}
    assert all(norm > 2e-3 for norm in norms.values())
    if jointly:
        assert set(norms) == {"joint/grad_norm"}
        assert sum(norm**2 for norm in seen.values()) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
        assert max(seen.values()) < 1e-3
    else:
        assert set(norms) == {"policy/grad_norm", "critic/grad_norm"}
        assert list(seen.values()) == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_minibatch_is_prepared_as_a_whole(make, parameters):
    """Whitened and clipped before it is cut up, as if it had come so."""
    args = dict(minibatch_size=8, micro_batch_size=2)
    loss = PPOMaxLoss(advantage_norm=True, advantage_clip=0.5)
    asked, given = make("asked", loss=loss, args=args), make("given", args=args)
    rollout = asked.estimate(asked.annotate(asked.score(asked.collect())))
    asked.engine.step(rollout, loss)
    given.engine.step(loss.prepare(rollout), PPOMaxLoss())
    assert torch.equal(parameters(asked.model), parameters(given.model))


@pytest.mark.parametrize("after_end", [False, True])
def test_a_spare_micro_batch_adds_nothing(make, parameters, monkeypatch, after_end):
    """What a process does while another has more of its own; states after the end count as well."""
    shaper = RewardShaper(score_after_end=after_end)
    alone, waiting = (make(name, shaper=shaper) for name in ("alone", "waiting"))
    rollout = alone.estimate(alone.annotate(alone.score(alone.collect())))
    monkeypatch.setattr(waiting.engine, "_missing", lambda count: 2)
    one, other = (trainer.engine.step(rollout, PPOMaxLoss()) for trainer in (alone, waiting))
    assert other.stats == one.stats
    assert torch.equal(parameters(waiting.model), parameters(alone.model))


@pytest.mark.parametrize(("size", "parts"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize(("sharded", "exchanges"), [(False, 1), (True, 3)])
def test_processes_exchange_gradients_once(
    make, monkeypatch, world, size, parts, sharded, exchanges
):
    """All backward passes of a step wait for the last one; sharded, those of a role."""
    monkeypatch.setattr(engine, "is_sharded", lambda *models: sharded)
    loss, args = PPOMaxLoss(ptx_coef=0.1), dict(micro_batch_size=size)
    trainer = make(loss=loss, ptx_dataset=world.sft_examples(16), args=args)
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    waited, no_sync = [], trainer.accelerator.no_sync
    monkeypatch.setattr(
        trainer.accelerator, "no_sync", lambda model: waited.append(model) or no_sync(model)
    )
    waits, accumulate = [], trainer.engine._accumulate

    def noted(*args, **kwargs):
        before = len(waited)
        output = accumulate(*args, **kwargs)
        waits.append(len(waited) > before)
        return output

    monkeypatch.setattr(trainer.engine, "_accumulate", noted)
    trainer.engine.step(rollout, loss, ptx=trainer._ptx_batch(8))
    assert waited == [trainer.engine.model] * (3 * parts - exchanges)
    expected = (
        ([True] * (parts - 1) + [False]) * 3 if sharded else [True] * (3 * parts - 1) + [False]
    )
    assert waits == expected


def test_what_the_mask_leaves_out_is_not_suspected(make):
    trainer = make()
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    mask, logprobs, advantages = (
        x.clone() for x in (rollout.mask, rollout.logprobs, rollout.advantages)
    )
    mask[0, 0], logprobs[0, 0], advantages[2, 0] = False, torch.nan, torch.inf
    broken = replace(rollout, mask=mask, logprobs=logprobs, advantages=advantages)
    with pytest.raises(FloatingPointError, match="advantages of sample 2 is not finite"):
        trainer.engine.step(broken, PPOMaxLoss())


def test_what_is_not_finite_elsewhere_stops_this_process_as_well(make, monkeypatch, parameters):
    """Or the others would wait for it in vain. Another process adds 1 to whatever is summed."""
    trainer = make()
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    before = parameters(trainer.model)
    monkeypatch.setattr(trainer.engine, "reduce", lambda tensor: tensor + 1)
    with pytest.raises(FloatingPointError, match="The minibatch itself is finite"):
        trainer.engine.step(rollout, PPOMaxLoss())
    assert torch.equal(parameters(trainer.model), before)


def test_without_a_bound_gradients_are_left_as_they_are(make, monkeypatch):
    """As in the presets for vanilla PPO and TRL's."""
    trainer = make(args=dict(max_grad_norm=None, minibatch_size=8))
    before, norms, original = [], [], trainer.engine._clip

    def watched(roles):
        parameters = list(trainer.critic.parameters())
        # As large as no gradient of these models is.
        parameters[0].grad += 1e3
        before.append([p.grad.clone() for p in parameters])
        norms.append(original(roles))
        assert all(torch.equal(a, p.grad) for a, p in zip(before[0], parameters, strict=True))
        return norms[0]

    monkeypatch.setattr(trainer.engine, "_clip", watched)
    trainer.step(trainer.collect())
    assert norms[0]["critic/grad_norm"] > 1e3


def test_optimizers_are_told_what_was_asked_for(make):
    args = dict(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3, weight_decay=0.1)
    trainer = make(args=args)
    for role, rate in (("policy", 1e-3), ("critic", 1e-3)):
        (group,) = trainer.engine.optimizers[role].param_groups
        assert (group["lr"], group["betas"]) == (rate, (0.8, 0.9))
        assert (group["eps"], group["weight_decay"]) == (1e-3, 0.1)


@pytest.mark.parametrize(
    ("limit", "rows"),
    [
        ({}, [4]),
        (dict(micro_batch_size=1), [1, 1, 1, 1]),
        (dict(micro_batch_size=3), [3, 1]),
        (dict(micro_batch_size=9), [4]),
        (dict(max_tokens=1), [1, 1, 1, 1]),  # a longer one gets a part of its own
        (dict(max_tokens=75), [3, 1]),  # 3 of 25 tokens each
        (dict(max_tokens=74), [2, 2]),
        (dict(max_tokens=74, micro_batch_size=1), [1, 1, 1, 1]),
        (dict(max_tokens=1000), [4]),
    ],
    ids=str,
)
def test_pre_training_data_is_cut_up_like_everything_else(make, world, limit, rows):
    def run(name, **args):
        trainer = make(
            name,
            loss=PPOMaxLoss(ptx_coef=1.0),
            ptx_dataset=world.sft_examples(16),
            args=dict(total_steps=1, **args),
        )
        policy = trainer.model.double().policy
        sizes, original = [], trainer.engine._accumulate

        def noted(sync, role, part, share, **extra):
            sizes.append(len(part["labels"]))
            return original(sync, role, part, share, **extra)

        trainer.engine._accumulate = noted
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(6, 100, (4, 25), generator=generator)
        labels = torch.where(torch.rand(4, 25, generator=generator) < 0.5, ids, IGNORED_LABEL)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        stats = {}
        trainer.engine._backward_ptx(batch, trainer.loss, stats)
        assert float(stats["ptx/loss"]) == pytest.approx(policy(**batch).loss.item())  # in float32
        grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return torch.cat(grads), float(stats["ptx/loss"]), sizes

    whole, loss, _ = run("whole")
    cut, same, sizes = run("cut", **limit)
    assert sizes == rows
    assert torch.linalg.vector_norm(cut - whole) <= 1e-12 * torch.linalg.vector_norm(whole)
    assert same == pytest.approx(loss, rel=1e-12)


def test_a_fused_optimizer_resumes_from_one_that_was_not_fused():
    """Optimizers of an earlier release were not fused."""
    weight = nn.Parameter(torch.ones(3))
    old, new = (torch.optim.AdamW([weight], lr=0.1, fused=fused) for fused in (None, True))
    weight.grad = torch.ones(3)
    old.step()
    tensors, plain = pack_optimizer(old)
    unpack_optimizer(new, copy.deepcopy(tensors), copy.deepcopy(plain))
    assert new.param_groups[0]["fused"] is True
    assert new.param_groups[0]["lr"] == 0.1
    new.step()
