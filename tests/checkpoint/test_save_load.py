"""Nothing that was written is lost, and nothing half-written is taken for finished."""

import errno
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mossrlhf import last_checkpoint
from mossrlhf import serialization as checkpoint
from mossrlhf.checkpoint.folders import STATE
from mossrlhf.checkpoint.save_load import save_checkpoint
from mossrlhf.randomness import random_state, set_random_state
from mossrlhf.serialization import with_checksum


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
        save_checkpoint(trainer.run.run_state)
    assert (trainer.output_dir / "checkpoint-2" / STATE).read_text() == before


def test_a_folder_without_a_state_is_no_checkpoint(make):
    """Copied by hand and cut off: it is passed over, or refused by name."""
    trainer = make(args=dict(total_steps=2, save_steps=1))
    trainer.train()
    half = trainer.output_dir / "checkpoint-2"
    (half / STATE).unlink()
    again = make(args=dict(total_steps=3))
    with pytest.raises(FileNotFoundError, match=rf"is no finished checkpoint .*no {STATE}"):
        again.train(resume_from_checkpoint=half)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.history] == [1, 2, 3]


def test_a_checkpoint_of_transformers_is_told_and_left_alone(make):
    trainer = make()
    foreign = trainer.output_dir / "checkpoint-500"
    foreign.mkdir(parents=True)
    (foreign / "trainer_state.json").write_text('{"global_step": 500}')
    with pytest.raises(FileNotFoundError, match="it is one of transformers' Trainer"):
        trainer.train(resume_from_checkpoint=foreign)
    trainer.train()
    assert (foreign / "trainer_state.json").exists()  # neither pruned nor moved aside


def emptied(file):
    file.write_bytes(b"")


def cut_off_at_the_end(file):
    file.write_bytes(file.read_bytes()[:-1])


def one_bit_turned(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [emptied, cut_off_at_the_end, one_bit_turned, Path.unlink])
@pytest.mark.parametrize(
    "name", ["trained", "optimizer_policy", "optimizer_critic", "random_0", "generator"]
)
def test_a_damaged_file_is_named_and_the_one_before_offered(damaged, parameters, name, damage):
    folder, fresh = damaged
    damage(folder / "checkpoint-2" / f"{name}.safetensors")
    trainer = fresh()
    before = parameters(trainer.model)
    message = rf"checkpoint-2': {name}\.safetensors is (damaged|missing).*checkpoint-1'$"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert torch.equal(before, parameters(trainer.model))  # nothing was put in its place yet


@pytest.fixture(scope="module")
def finished(build, tmp_path_factory):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    build(folder, args=dict(save_steps=1)).train()
    return folder


@pytest.fixture
def damaged(finished, build, tmp_path):
    """A copy of it to do harm to, and what builds trainers that write there."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run", lambda: build(tmp_path / "run", args=dict(total_steps=3))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ('{"version": ', rf"{STATE} is damaged"),
        (b"\xff\xfe", rf"{STATE} is damaged"),
        ("[]", rf"{STATE} is not of mossrlhf"),
        ('{"global_step": 7}', rf"{STATE} is not of mossrlhf"),
        ('{"version": "9.0", "format": 99}', r"written by mossrlhf 9\.0 in format 99.*install"),
    ],
)
def test_a_state_of_something_else(damaged, written, message):
    folder, fresh = damaged
    written = written.encode() if isinstance(written, str) else written
    (folder / "checkpoint-2" / STATE).write_bytes(written)
    with pytest.raises(ValueError, match=f"{message}.*checkpoint-1'$"):
        fresh().train(resume_from_checkpoint=True)


def test_where_nothing_is_whole_that_is_said(damaged):
    folder, fresh = damaged
    for step in (1, 2):
        emptied(folder / f"checkpoint-{step}" / "trained.safetensors")
    with pytest.raises(ValueError, match="no whole one before it; train from the start"):
        fresh().train(resume_from_checkpoint=True)


def test_names_in_a_state_do_not_lead_out_of_the_folder(damaged):
    """A planted state cannot have other files read."""
    folder, fresh = damaged
    (folder / "secret.safetensors").write_bytes(b"")
    state = folder / "checkpoint-2" / STATE
    content = json.loads(state.read_text())
    content["files"]["../secret.safetensors"] = {"bytes": 0, "crc32": "00000000"}
    state.write_text(json.dumps(with_checksum(content)))
    with pytest.raises(ValueError, match=r"\.\./secret\.safetensors is missing"):
        fresh().train(resume_from_checkpoint=True)


def test_another_reference_is_told(make, policy):
    trainer = make(args=dict(total_steps=1))
    trainer.train()
    other = make(args=dict(total_steps=2), ref_model=policy(3))
    with pytest.warns(UserWarning, match="the reference is not the one the run began with"):
        other.train(resume_from_checkpoint=True)


def test_adapters_over_another_base_are_refused(make, policy):
    adapted = dict(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    make(args=dict(total_steps=1), model=policy(0), **adapted).train()
    other = make(args=dict(total_steps=2), model=policy(3), **adapted)
    with pytest.raises(ValueError, match="trained on other frozen weights"):
        other.train(resume_from_checkpoint=True)
    same = make(args=dict(total_steps=2), model=policy(0), **adapted)
    same.train(resume_from_checkpoint=True)
    assert same.run.state.global_step == 2


def test_the_last_checkpoint_or_none(make):
    trainer = make(args=dict(total_steps=2, save_steps=1))
    assert last_checkpoint(trainer.output_dir) is None
    assert last_checkpoint(trainer.output_dir / "nowhere") is None
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.output_dir))
    assert last_checkpoint(str(trainer.output_dir)) == trainer.output_dir / "checkpoint-2"


def test_the_warm_up_is_saved_on_the_way(make):
    options = dict(critic_pretrain_steps=3, save_steps=2, total_steps=1)
    trainer = make(args=options)
    trainer.pretrain_critic()
    seen = json.loads((trainer.output_dir / "checkpoint-0" / STATE).read_text())
    assert seen["pretrained"] == 2


class Counting(TrainerCallback, ExportableState):
    def __init__(self):
        self.steps = 0

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_callbacks_with_a_state_are_resumed(make):
    make(args=dict(total_steps=2), callbacks=[Counting()]).train()
    later = Counting()
    make(args=dict(total_steps=3), callbacks=[later]).train(resume_from_checkpoint=True)
    assert later.steps == 3


def test_random_numbers_go_on_where_they_were():
    """Python's and NumPy's as well, which reward functions draw from."""
    noted = random_state()
    tensors, plain = noted

    def draw():
        return random.random(), torch.rand(()).item(), np.random.rand(), np.random.randn()

    drawn = []
    for _ in range(2):
        set_random_state(tensors, json.loads(json.dumps(plain)))
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(draw())


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
