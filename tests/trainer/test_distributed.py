"""Two processes equal one: parameters and metrics, however the work is split."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rollouts import recorded_rollout

SCRIPT = Path(__file__).parent.parent / "support" / "ddp_step.py"


def launch(folder: Path, processes: int, **settings: str) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(processes):
        env = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        if processes > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        command = [sys.executable, str(SCRIPT), str(folder)]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)
    return torch.load(folder / "result.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from mossrlhf import ToyWorld

    folder = tmp_path_factory.mktemp("distributed")
    torch.save(recorded_rollout(ToyWorld()), folder / "rollout.pt")
    return folder


# Without the PTX term the policy is the last to exchange gradients. At 34 padded tokens one process
# has three micro-batches, the other two.
@pytest.mark.parametrize(
    ("ptx", "splits"), [("1", [{}, {"MICRO": "1"}, {"TOKENS": "34"}]), ("0", [{}, {"MICRO": "1"}])]
)
def test_two_processes_equal_one(folder, ptx, splits):
    one = launch(folder, 1, PTX=ptx)
    for settings in splits:
        two = launch(folder, 2, PTX=ptx, **settings)
        difference = torch.norm(one["parameters"] - two["parameters"])
        assert difference <= 1e-12 * torch.norm(one["parameters"]), settings
        local = ("time/", "response/distinct_2")
        for name, value in one["metrics"].items():
            if not name.startswith(local):
                assert two["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_statistics_weigh_minibatches_by_the_tokens_of_all_processes(folder):
    metrics = launch(folder, 2, MINI="4")["metrics"]
    ranks = [torch.load(folder / f"steps{rank}.pt") for rank in range(2)]
    weights = [sum(tokens for tokens, _ in steps) for steps in zip(*ranks, strict=True)]
    losses = [sum(share for _, share in steps) for steps in zip(*ranks, strict=True)]
    assert len(set(weights)) > 1
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert metrics["policy/loss"] == pytest.approx(expected, rel=1e-9)
