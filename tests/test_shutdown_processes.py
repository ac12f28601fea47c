"""Signals, full disks and lost processes, as whole processes meet them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mossrlhf.checkpoint.folders import checkpoints
from mossrlhf.nan_debug import read_fault
from mossrlhf.serialization import load_tensors

SCRIPT = Path(__file__).parent / "support" / "faults.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where every scenario has been played, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("faults")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=env, check=True, timeout=900)
    return folder


@pytest.fixture
def ended(folder):
    """How the processes of a scenario ended; never by being killed for want of an end."""

    def of(name: str) -> list[dict]:
        rows = json.loads((folder / "results.json").read_text())[name]
        assert all(row["code"] is not None for row in rows), rows
        return rows

    return of


def kept(folder: Path, name: str) -> list[str]:
    return [path.name for path in checkpoints(folder / name / "run")]


def test_sigterm_ends_a_script_after_its_iteration(folder, ended):
    (row,) = ended("sigterm")
    assert row["code"] == 143
    assert kept(folder, "sigterm") == ["checkpoint-2"]
    assert "Ended by SIGTERM after iteration 2. Written:" in row["output"]
    assert not (folder / "sigterm" / "after").exists()


def test_a_second_sigterm_ends_it_at_once(folder, ended):
    (row,) = ended("sigterm_twice")
    assert row["code"] == 143
    assert kept(folder, "sigterm_twice") == ["checkpoint-1"]
    assert "Ended by SIGTERM after iteration 1." in row["output"]


def test_sigterm_to_one_process_ends_both(folder, ended):
    assert [row["code"] for row in ended("one_is_told")] == [143, 143]
    assert kept(folder, "one_is_told") == ["checkpoint-2"]


def test_a_file_cut_off_by_the_system_leaves_the_checkpoint_before(folder, ended):
    (row,) = ended("full_disk")
    assert row["code"] == 1
    run = folder / "full_disk" / "run"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-1", "completions.jsonl"]
    for file in (run / "checkpoint-1").glob("*.safetensors"):
        load_tensors(file)
    said = f"OSError: output_dir: checkpoint-2 could not be written to {str(run)!r}"
    assert said in row["output"]
    assert "Nothing could be saved" in row["output"]
    assert "Free space or choose another folder, and resume with" in row["output"]


def test_a_reward_that_raises_on_one_process_stops_both(folder, ended):
    well, failed = ended("reward_raises")
    assert (well["code"], failed["code"]) == (1, 1)
    cause = "reward 'judged' raised ConnectionError: the judge is out"
    assert (
        f"PeerError: this process stops, since process 1 raised ValueError: {cause}"
        in (well["output"])
    )
    assert f"ValueError: {cause}" in failed["output"]
    assert kept(folder, "reward_raises") == ["checkpoint-1"]


def test_what_both_have_left_goes_on_as_if_nothing_had_happened(folder, ended):
    assert [row["code"] for row in ended("resumed") + ended("whole")] == [0] * 4
    for file in ("trained", "optimizer_policy", "optimizer_critic", "random_0", "random_1"):
        one, other = (
            load_tensors(folder / name / "run" / "checkpoint-3" / f"{file}.safetensors")
            for name in ("resumed", "whole")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("killed", "Connection"),  # closed or reset
        ("stopped", "Timed out waiting 6000ms"),
        ("raises_alone", "Connection"),
    ],
)
def test_a_process_that_is_lost_stops_the_other(folder, ended, name, reason):
    left, lost = ended(name)
    assert left["code"] == 1
    assert left["seconds"] < 60
    said = left["output"]
    assert "PeerError: process 0 of 2 stops in iteration 2, since another one is gone" in said
    assert reason in said
    newest = folder / name / "run" / "checkpoint-1"
    assert f"train(resume_from_checkpoint=True) resumes from {str(newest)!r}" in said
    assert kept(folder, name) == ["checkpoint-1"]
    if name == "raises_alone":
        assert "LookupError in iteration 2 on process 1 alone: it saves nothing" in lost["output"]


def test_a_sample_of_one_process_is_named_by_both(folder, ended):
    rows = ended("not_finite")
    faults = [
        read_fault(folder / "not_finite" / "run" / "faults" / "step-2" / f"process-{i}")
        for i in range(2)
    ]
    assert not faults[0].suspects
    assert kept(folder, "not_finite") == ["checkpoint-1"]
    (suspect,) = faults[1].suspects
    sample = suspect.sample
    assert torch.isinf(faults[1].rollout.advantages).any(1).nonzero().flatten().tolist() == [sample]
    for row in rows:
        assert row["code"] == 1
        assert (
            f"advantages of sample {sample} is not finite (process 1, prompt {suspect.prompt} of "
            "train_dataset)" in row["output"]
        )


def test_a_process_that_cannot_write_does_not_leave_the_other_waiting(folder, ended):
    writer, other = ended("cannot_save")
    assert (writer["code"], other["code"]) == (1, 1)
    assert "OSError: output_dir: checkpoint-2 could not be written" in writer["output"]
    assert "PeerError: this process stops, since process 0 raised OSError" in other["output"]
    assert kept(folder, "cannot_save") == []
