"""A loss or gradient that is not finite: the step is not taken, and its batch is kept."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from mossrlhf import AdvantageEstimator, PPOMaxLoss
from mossrlhf.checkpoint.folders import checkpoints
from mossrlhf.nan_debug import NonFiniteError, read_fault, write_fault


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def spoiled(row, calls=1):
    """An estimator that makes one advantage infinite in some iteration."""
    seen = []

    def estimate(rewards, values, mask):
        done = AdvantageEstimator()(rewards, values, mask)
        seen.append(0)
        if len(seen) == calls:
            done.advantages[row, 0] = torch.inf
        return done

    return estimate


def test_a_batch_that_is_not_finite_is_kept(make, parameters):
    trainer = make(advantage=spoiled(5, calls=2), args=dict(minibatch_size=8))
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    folder = trainer.output_dir / "faults" / "step-2"
    fault = read_fault(folder)
    (suspect,) = fault.suspects
    prompt = fault.rollout.columns["prompt"][suspect.sample]
    assert trainer.prompts.dataset[suspect.prompt]["prompt"] == prompt
    assert torch.isinf(fault.rollout.advantages[suspect.sample, 0])
    assert "policy/loss" in fault.terms
    message = str(caught.value)
    assert f"advantages of sample {suspect.sample} is not finite" in message
    assert f"prompt {suspect.prompt} of train_dataset" in message
    assert f"read_fault({str(folder)!r})" in message
    assert len(fault.rollout) == 8  # the minibatch, and no more
    # The batch alone shows the fault again, to whoever looks for it.
    fresh = make("fresh")
    with pytest.raises(NonFiniteError, match=f"advantages of sample {suspect.sample} "):
        fresh.engine.step(fault.rollout, PPOMaxLoss())


def test_a_step_that_is_not_finite_is_not_taken(make, parameters):
    trainer = make(advantage=spoiled(0), args=dict(minibatch_size=8))
    before = parameters(trainer.model)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert torch.equal(parameters(trainer.model), before)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_from_before_the_fault(make, world, parameters, first):
    """In the first step of an update nothing has moved; after that there is part of an update."""
    options = dict(total_steps=3, minibatch_size=4)
    parts = dict(loss=PPOMaxLoss(ptx_coef=0.1), ptx_dataset=world.sft_examples(16))
    trainer = make("run", args=options, **parts)
    step, calls = trainer.engine.step, []

    def spoils(minibatch, *rest):
        calls.append(0)
        if len(calls) == (3 if first else 4):  # two to an iteration
            minibatch.advantages[0, 0] = torch.nan
        return step(minibatch, *rest)

    trainer.engine.step = spoils
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert steps_in(trainer.output_dir) == (["checkpoint-1"] if first else [])
    assert (trainer.output_dir / "unfinished").exists() != first
    if first:
        trainer.train()  # it can go on itself
        whole = make("whole", args=options, **parts)
        whole.train()
        assert torch.equal(parameters(trainer.model), parameters(whole.model))
        resumed = make("run", args=options, **parts)
        resumed.train(resume_from_checkpoint=trainer.output_dir / "checkpoint-1")
        assert torch.equal(parameters(resumed.model), parameters(whole.model))


@dataclass(frozen=True, kw_only=True)
class Overflows(PPOMaxLoss):
    """Of tokens with one advantage the value's or the policy's loss overflows."""

    where: str = "critic"
    mark: float = 12345.0

    def value_loss(self, value, old_value, returns):
        loss = super().value_loss(value, old_value, returns)
        hot = (returns == self.mark) & (self.where == "critic")
        return torch.where(hot, torch.inf, loss)

    def policy_loss(self, logprob, old_logprob, advantage, entropy=None):
        loss = super().policy_loss(logprob, old_logprob, advantage, entropy)
        hot = (advantage == self.mark) & (self.where == "policy")
        # The root of nothing: zero itself, and infinitely steep.
        return loss + torch.where(hot, logprob - logprob.detach(), 1.0).sqrt()


@pytest.mark.parametrize(
    ("where", "term"), [("critic", "critic forward"), ("policy", "policy backward")]
)
@pytest.mark.parametrize("micro", [None, 3])
def test_a_sample_the_models_stumble_over_is_found(make, where, term, micro):
    """The rollout is finite, so each sample is tried alone."""

    def estimate(rewards, values, mask):
        done = AdvantageEstimator()(rewards, values, mask)
        done.advantages[6, 1] = done.returns[6, 1] = 12345.0
        return done

    args = dict(minibatch_size=8, micro_batch_size=micro)
    trainer = make(advantage=estimate, loss=Overflows(where=where), args=args)
    with pytest.raises(NonFiniteError, match=f"{term} of sample"):
        trainer.train()
    fault = read_fault(trainer.output_dir / "faults" / "step-1")
    (suspect,) = fault.suspects
    assert suspect.term == term
    assert fault.rollout.returns[suspect.sample, 1] == 12345.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_an_advantage_spread_by_normalization_is_traced_to_its_sample(make):
    trainer = make(
        advantage=spoiled(3), loss=PPOMaxLoss(advantage_norm=True), args=dict(minibatch_size=8)
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    (suspect,) = read_fault(trainer.output_dir / "faults" / "step-1").suspects
    assert suspect.term == "advantages"


def test_weights_that_are_not_finite_are_named(make):
    trainer = make()
    rollout = trainer.estimate(trainer.annotate(trainer.score(trainer.collect())))
    with torch.no_grad():
        trainer.critic.score.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"weights themselves are not finite: critic\.score"):
        trainer.update(rollout)


def test_pre_training_data_is_kept_too(make, world):
    trainer = make(
        advantage=spoiled(0),
        loss=PPOMaxLoss(ptx_coef=0.1),
        ptx_dataset=world.sft_examples(16),
        args=dict(minibatch_size=8),
    )
    with pytest.raises(NonFiniteError):
        trainer.train()
    fault = read_fault(trainer.output_dir / "faults" / "step-1")
    assert fault.ptx["labels"].shape == fault.ptx["input_ids"].shape
    assert set(fault.denominators) == {"critic", "policy", "ptx"}


def test_the_warm_up_leaves_its_batch_under_its_own_name(make):
    trainer = make(args=dict(critic_pretrain_steps=1))
    with torch.no_grad():
        trainer.critic.score.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert read_fault(trainer.output_dir / "faults" / "pretrain-1").roles == ["critic"]


def test_a_batch_that_cannot_be_kept_does_not_hide_the_fault(make):
    trainer = make(advantage=spoiled(0), args=dict(minibatch_size=8))
    (trainer.output_dir / "faults").write_text("in the way")
    with pytest.raises(NonFiniteError, match=r"advantages of sample .* could not be kept in"):
        trainer.train()


def test_what_an_earlier_run_on_more_processes_left_is_not_read(make):
    trainer = make(advantage=spoiled(5), args=dict(minibatch_size=8))
    folder = trainer.output_dir / "faults" / "step-1"
    with pytest.raises(NonFiniteError):
        trainer.train()
    fault = read_fault(folder)
    (suspect,) = fault.suspects
    write_fault(replace(fault, suspects=[replace(suspect, process=1)], process=1), folder)
    write_fault(replace(fault, suspects=[]), folder)  # now on one process, which suspects nothing
    assert (read_fault(folder).process, read_fault(folder).suspects) == (0, [])
    assert [path.name for path in folder.iterdir()] == ["process-0"]


def test_a_folder_without_a_fault_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="name a folder like <output_dir>/faults/step-3"):
        read_fault(tmp_path)
