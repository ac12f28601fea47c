"""What goes wrong in a run: what is said, what is left on disk, and that it goes on from there."""

import errno
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mossrlhf import AdvantageEstimator, PatientReward, PPOMaxLoss, Trainer
from mossrlhf import serialization as checkpoint
from mossrlhf.checkpoint.folders import checkpoints
from mossrlhf.nan_debug import NonFiniteError, read_fault, write_fault


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


# Not finite.


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


# Rewards that raise or hang.


@pytest.mark.parametrize("warm_up", [0, 3])
def test_a_reward_that_hangs_leaves_a_checkpoint_to_go_on_from(make, world, parameters, warm_up):
    """In PPO, and in the critic's warm-up: the iteration begins anew, to the same numbers."""
    hangs = [False, False, True]

    def judged(**arguments):
        if hangs and hangs.pop(0):
            time.sleep(30)
        return world.reward(**arguments)

    options = dict(total_steps=3, critic_pretrain_steps=warm_up)
    patient = PatientReward(judged, timeout=2.0, retries=0)
    trainer = make("run", reward=patient, critic=None, args=options)
    with pytest.raises(ValueError, match="reward 'judged' raised TimeoutError: no answer within 2"):
        trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-0" if warm_up else "checkpoint-2"]
    resumed = make("run", reward=patient, critic=None, args=options)
    resumed.train(resume_from_checkpoint=True)
    whole = make("whole", reward=judged, critic=None, args=options)
    whole.train()
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


# Signals.


class Terminated(Trainer):
    """Gets SIGTERM in its second iteration, as often as asked for."""

    times = 1

    def estimate(self, rollout):
        if self.run.state.global_step == 1:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGTERM)
        return super().estimate(rollout)


def test_a_notebook_goes_on_after_sigterm(make, parameters):
    options = dict(total_steps=3)
    trainer = make(kind=Terminated, args=options)
    with pytest.raises(SystemExit) as end:
        trainer.train()
    assert end.value.code == 143
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer.train()
    whole = make("whole", args=options)
    whole.train()
    assert torch.equal(parameters(trainer.model), parameters(whole.model))


def test_who_has_a_handler_of_their_own_decides(make):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        trainer = make(kind=Terminated, args=dict(total_steps=3))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]


def test_where_sigterm_is_ignored_it_stays_ignored(make):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer = make(kind=Terminated, args=dict(total_steps=3))
        assert len(trainer.train()) == 3
    finally:
        signal.signal(signal.SIGTERM, before)


# Disks and trackers.


def test_what_the_disk_has_no_room_for_is_saved_elsewhere(
    make, monkeypatch, tmp_path, capsys, parameters
):
    trainer = make(args=dict(total_steps=4, save_steps=2))
    whole_file = checkpoint.save_file

    def full(tensors, path):
        if str(path).startswith(str(trainer.output_dir)) and trainer.run.state.global_step > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_file(tensors, path)

    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="checkpoint-4 could not be written"):
        trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]
    (saved,) = spare.glob("mossrlhf-*/checkpoint-4")
    assert f"resume by train(resume_from_checkpoint={str(saved)!r})" in capsys.readouterr().out
    monkeypatch.undo()
    resumed = make("resumed", args=dict(total_steps=5))
    resumed.train(resume_from_checkpoint=saved)
    whole = make("whole", args=dict(total_steps=5))
    whole.train()
    assert torch.equal(parameters(resumed.model), parameters(whole.model))


def test_models_are_not_written_where_others_need_the_room(make, monkeypatch, tmp_path, capsys):
    """Nor lost: the last checkpoint fails, and once there is room the same trainer goes on."""
    trainer = make(args=dict(total_steps=2))
    spare = tmp_path / "spare"
    spare.mkdir()

    whole_file = checkpoint.save_file

    def full(tensors, path):
        if str(path).startswith(str(trainer.output_dir)):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_file(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(spare))
        patched.setattr(checkpoint, "save_file", full)
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="checkpoint-2 could not be written"):
            trainer.train()
    assert "Nothing could be saved: output_dir: checkpoint-2" in capsys.readouterr().out
    assert list(spare.iterdir()) == []
    trainer.train()
    assert steps_in(trainer.output_dir) == ["checkpoint-2"]


class Tracker:
    """A tracker that fails where it is told to."""

    def __init__(self, name: str, fails: tuple[str, ...] = ()) -> None:
        self.name, self.fails, self.logged = name, fails, []

    def log(self, values, step):
        """Take metrics, or fail."""
        if "log" in self.fails:
            raise ConnectionError("the service is out")
        self.logged.append(step)


def test_trackers_that_fail_cost_a_warning_each(make, monkeypatch):
    trainer = make(args=dict(total_steps=3, report_to=["tensorboard"]))
    accelerator = trainer.accelerator
    broken, well = Tracker("broken", ("log",)), Tracker("well")
    accelerator.log_with = [Tracker("absent", ("begin",)), broken, well]

    def begin(project):
        (tracker,) = accelerator.log_with
        if "begin" in tracker.fails:
            raise ImportError("nobody is logged in")
        accelerator.trackers.append(tracker)

    monkeypatch.setattr(accelerator, "init_trackers", begin)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = trainer.train()
    said = [str(w.message) for w in caught if "report_to" in str(w.message)]
    assert [text.split(" (")[0] for text in said] == [
        "report_to: absent could not be started",
        "report_to: broken took no metrics",
    ]
    assert well.logged == [1, 2, 3]
    assert len(history) == 3


def test_an_error_in_saving_does_not_hide_its_cause(make, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("the cause")

    def unsaved(*_):
        raise ValueError("cannot be saved")

    trainer = make()
    trainer.run.state.global_step = 1
    monkeypatch.setattr(trainer, "score", fail)
    monkeypatch.setattr("mossrlhf.shutdown.save_checkpoint", unsaved)
    monkeypatch.setattr("mossrlhf.shutdown.is_saved", lambda _: False)
    with pytest.raises(KeyError, match="the cause"):
        trainer.train()
    assert "Nothing could be saved: ValueError: cannot be saved" in capsys.readouterr().out
