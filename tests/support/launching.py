"""Scripts of this folder, started as one process or as several that know of each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).parent


def launch(
    folder: Path, processes: int, script: str = "ddp_step.py", *args: str, **settings: str
) -> dict[str, Any]:
    """Run a script on some processes, and return what the first left in ``result.pt``.

    Args:
        folder: that it works in.
        processes: how many.
        script: its file.
        args: further words.
        settings: environment variables.
    """
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
        command = [sys.executable, str(SUPPORT / script), str(folder), *args]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)
    return torch.load(folder / "result.pt")
