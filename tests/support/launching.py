"""Scripts in new processes, forked from a server that has imported the libraries already."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).parent
SECONDS = 900.0
"""After which a process is taken to hang."""

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "deepspeed",
        "matplotlib.pyplot",
        "peft",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
    ]
)  # not this package: the script finds it on the path, where tools/mutants.py puts a faulty copy


def start(
    script: Path,
    *args: str,
    output: Path,
    settings: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a script in a new process, in the current folder.

    Args:
        script: its file.
        args: its command line.
        output: the file that stdout and stderr go to.
        settings: environment variables, beside those of this process.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(settings or {})}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the processes that the script starts
    output = output.resolve()
    process = _server.Process(target=_run, args=(Path.cwd(), script, args, output, env, sys.path))
    process.start()
    return process


def _run(
    folder: Path,
    script: Path,
    args: Sequence[str],
    output: Path,
    env: Mapping[str, str],
    path: Sequence[str],
) -> None:
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [str(script.parent), *path]
    sys.argv = [str(script), *args]
    runpy.run_path(str(script), run_name="__main__")


def finish(process: BaseProcess, output: Path) -> str:
    """Wait for a process, which must end without an error; return what it printed."""
    process.join(SECONDS)
    code = process.exitcode
    process.kill()
    assert code == 0, f"exit code {code}\n{output.read_text()[-5000:]}"
    return output.read_text()


def run(script: Path, *args: str, output: Path, **settings: str) -> str:
    """Run a script in a new process, as `start` does; return what it printed."""
    return finish(start(script, *args, output=output, settings=settings), output)


def launch(
    folder: Path, processes: int, script: str = "ddp_step.py", *args: str, **settings: str
) -> dict[str, Any]:
    """Run a script of this folder on some processes; return what the first left in ``result.pt``.

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
        env = dict(settings)
        if processes > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        output = folder / f"output-{rank}"
        words = (str(folder), *args)
        running.append((start(SUPPORT / script, *words, output=output, settings=env), output))
    for process, output in running:
        finish(process, output)
    return torch.load(folder / "result.pt")
