"""A run that is killed goes on as if it had not been; on more or fewer processes too."""

import json
import shutil

import pytest
import torch
from launching import launch, run

from mossrlhf import last_checkpoint
from mossrlhf.checkpoint.folders import STATE


@pytest.mark.parametrize(
    ("processes", "runs", "more"),
    [
        pytest.param(1, 3, [], marks=pytest.mark.slow),
        (2, 3, []),
        (1, 3, ["--adapters"]),
    ],
)
def test_killed_runs_end_as_if_they_had_not_been(root, tmp_path, processes, runs, more):
    """While sampling, while updating, while saving; all 25: tools/kill_runs.py."""
    figures = tmp_path / "figures.json"
    words = ["--runs", str(runs), "--processes", str(processes), "--json", str(figures), *more]
    run(root / "tools" / "kill_runs.py", *words, output=tmp_path / "output")
    [found] = json.loads(figures.read_text()).values()
    assert found["equal"] == runs
    assert set(found["killed_while"].values()) == {1}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_more_or_fewer_processes(tmp_path, before, after):
    """The same state; other random numbers, and that is said."""
    first = launch(tmp_path, before, "resumed.py", "2")
    assert first == {"step": 0, "warned": first["warned"]}
    folder = last_checkpoint(tmp_path / "run")
    shutil.copy(folder / STATE, tmp_path / "before.json")
    for file in folder.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    second = launch(tmp_path, after, "resumed.py", "3")
    told = [text for text in second.pop("warned") if text.startswith("resume_from_checkpoint")]
    assert second == {
        "step": 2, "trained": True, "policy": True, "critic": True, "prompts": True, "moments": True
    }  # fmt: skip
    assert len(told) == 1
    assert f"written by {before} processes and is resumed by {after}" in told[0]
    assert json.loads((last_checkpoint(tmp_path / "run") / STATE).read_text())["global_step"] == 3


def test_the_25_runs_that_are_kept_came_out_equal(root):
    kept = json.loads((root / "benchmarks" / "results" / "kill_runs.json").read_text())
    for processes in ("1", "2", "1 with adapters"):
        assert kept[processes]["runs"] == kept[processes]["equal"] == 25
        assert min(kept[processes]["killed_while"].values()) >= 8
    assert torch.tensor([kept[p]["resumed_from_nothing"] for p in kept]).max() < 13
