"""How runs end early: hanging rewards, signals, full disks, trackers that fail."""

import errno
import signal
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mossrlhf import PatientReward, Trainer
from mossrlhf import serialization as checkpoint
from mossrlhf.checkpoint.folders import checkpoints


def steps_in(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


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
    with pytest.raises(ValueError, match="reward 'judged' raised TimeoutError: no result within 2"):
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
