"""Nothing that was written is lost, and nothing half-written is taken for finished."""

import errno
import random
from pathlib import Path

import pytest
import torch

from mossrlhf import checkpoint
from mossrlhf.checkpoint import STATE
from mossrlhf.resume import save_checkpoint


def full_disk(trainer, step, monkeypatch):
    """Let every file of tensors be cut off halfway from an iteration on."""
    whole = checkpoint.save_file

    def cut_off(tensors, path):
        whole(tensors, path)
        if trainer.run.state.global_step >= step:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", cut_off)


def test_a_full_disk_leaves_what_was_finished(make, monkeypatch, capsys):
    """The half-written checkpoint is gone, the one before it is whole, the error says both."""
    trainer = make(args=dict(total_steps=4, save_steps=1))
    full_disk(trainer, 3, monkeypatch)
    message = (
        r"output_dir: checkpoint-3 could not be written.*No space left.*'checkpoint-2'\]. Free"
    )
    with pytest.raises(OSError, match=message):
        trainer.train()
    assert "Nothing could be saved: output_dir: checkpoint-3" in capsys.readouterr().out
    assert sorted(p.name for p in trainer.output_dir.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "completions.jsonl",
    ]
    monkeypatch.undo()
    resumed = make(args=dict(total_steps=4))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run.state.global_step == 4


def test_a_checkpoint_that_could_not_be_replaced_is_still_there(make, monkeypatch):
    trainer = make(args=dict(total_steps=2))
    trainer.train()
    before = (trainer.output_dir / "checkpoint-2" / STATE).read_text()
    full_disk(trainer, 2, monkeypatch)
    with pytest.raises(OSError, match="checkpoint-2 could not be written"):
        save_checkpoint(trainer)
    assert (trainer.output_dir / "checkpoint-2" / STATE).read_text() == before


@pytest.mark.parametrize("missing", [STATE, "trained.safetensors"])
def test_a_half_written_folder_is_no_checkpoint(make, missing):
    """Copied by hand and cut off, or killed in between: it is passed over, or refused by name."""
    trainer = make(args=dict(total_steps=2, save_steps=1))
    trainer.train()
    half = trainer.output_dir / "checkpoint-2"
    (half / missing).unlink()
    again = make(args=dict(total_steps=3))
    if missing == STATE:
        with pytest.raises(FileNotFoundError, match=rf"is no finished checkpoint .*no {STATE}"):
            again.train(resume_from_checkpoint=half)
        again.train(resume_from_checkpoint=True)
        assert [entry["step"] for entry in again.history] == [1, 2, 3]
    else:
        with pytest.raises(FileNotFoundError, match=missing):
            again.train(resume_from_checkpoint=True)


def test_random_numbers_go_on_where_they_were():
    """Python's as well, which reward functions draw from."""
    noted = checkpoint.random_state()
    drawn = []
    for _ in range(2):
        checkpoint.set_random_state(*noted)
        drawn.append((random.random(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]
    assert drawn[0] != (random.random(), torch.rand(()).item())


def test_a_file_that_is_cut_off_is_named(make):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    file = trainer.output_dir / "checkpoint-1" / "optimizer_critic.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"optimizer_critic\.safetensors' is damaged.*earlier"):
        make(args=dict(total_steps=2)).train(resume_from_checkpoint=True)


def test_killed_while_one_checkpoint_takes_the_place_of_another(make):
    """Between the two renames neither has its name; the older one gets it back."""
    trainer = make(args=dict(total_steps=2))
    trainer.train()
    folder = trainer.output_dir
    (folder / "checkpoint-2").rename(folder / ".checkpoint-2.old")
    (folder / ".checkpoint-2.partial").mkdir()
    again = make(args=dict(total_steps=3))
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.history] == [1, 2, 3]
