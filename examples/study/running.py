"""All runs, in parallel processes, and their records on disk."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mossrlhf.metrics import CollapseWarning
from mossrlhf.version import versions
from study import measuring, preparing
from study.arms import ARMS
from study.plan import Job, Scale, World, jobs, worlds

SETTINGS = "settings.json"


def everything(scale: Scale, folder: Path, workers: int) -> None:
    """Make all missing runs, and gather their records.

    Args:
        scale: sizes of the study.
        folder: of all results, of the same scale.
        workers: processes, one thread each; the results do not depend on their number.

    Raises:
        SystemExit: if the folder is of another scale.
        KeyboardInterrupt: at Ctrl-C; finished runs are kept.
    """
    remember(scale, folder)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, before they import torch
    began, context = time.perf_counter(), multiprocessing.get_context("spawn")
    try:
        with context.Pool(workers, _begin) as pool:
            homes = [(place, scale, folder / str(place)) for place in worlds(scale)]
            for place, seconds in pool.imap_unordered(_prepare, homes):
                print(f"{place!s:6} SFT model, reward model, language model {seconds:5.0f} s")
            todo = [job for job in jobs(scale, list(ARMS)) if not record_of(job, folder).exists()]
            tasks = [(job, scale, folder) for job in todo]
            for count, line in enumerate(pool.imap_unordered(_run, tasks), 1):
                print(f"{count:3}/{len(todo)} {line}", flush=True)
            pool.close()
            pool.join()
    finally:
        note_time(folder, time.perf_counter() - began)


def remember(scale: Scale, folder: Path) -> None:
    """Record the scale of the folder, or check that it is the same; seeds may be added."""
    ours = {name: value for name, value in asdict(scale).items() if isinstance(value, int)}
    path = folder / SETTINGS
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"scale": ours, "wall_seconds": 0.0}, indent=1) + "\n")
    elif json.loads(path.read_text())["scale"] != ours:
        sys.exit(
            f"--output_dir {folder}: it holds results of another scale (--quick, or an earlier "
            "version of the study); give another folder, or delete it"
        )


def note_time(folder: Path, seconds: float) -> None:
    """Add to the total time of all calls."""
    known = json.loads((folder / SETTINGS).read_text())
    known["wall_seconds"] = round(known["wall_seconds"] + seconds, 1)
    (folder / SETTINGS).write_text(json.dumps(known, indent=1) + "\n")


def record_of(job: Job, folder: Path) -> Path:
    """Path of a finished run's record."""
    return folder / str(job.world) / f"{job.name}.json"


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    # A collapse is what is studied here; equal answers in a pair are part of this world.
    warnings.simplefilter("ignore", CollapseWarning)
    warnings.filterwarnings("ignore", message="both responses to")


def _prepare(task: tuple[World, Scale, Path]) -> tuple[World, float]:
    began = time.perf_counter()
    preparing.prepare(*task)
    return task[0], time.perf_counter() - began


def _run(task: tuple[Job, Scale, Path]) -> str:
    job, scale, folder = task
    # Long runs are resumed from their checkpoints, the others are begun anew.
    found = measuring.run(job, scale, folder / str(job.world))
    measuring.write(found, record_of(job, folder))
    # Or a run whose record somebody deletes, its arm having changed, would be taken for finished.
    for left in (folder / str(job.world) / job.name).glob("checkpoint-*"):
        shutil.rmtree(left)
    return measuring.describe(job, found)


def gather(scale: Scale, folder: Path, results: Path, command: str) -> None:
    """Write each world's runs to one file, with everything needed to reproduce them.

    Args:
        scale: sizes of the study.
        folder: of the runs.
        results: folder of the files, one for each world.
        command: the command of the study.
    """
    results.mkdir(parents=True, exist_ok=True)
    for place in worlds(scale):
        mine = [job for job in jobs(scale, list(ARMS)) if job.world == place]
        runs = {job.name: json.loads(record_of(job, folder).read_text()) for job in mine}
        record = {
            "world": {"lang": place.lang, "seed": place.seed},
            "command": command,
            "versions": versions(),
            "scale": asdict(scale),
            "wall_seconds": json.loads((folder / SETTINGS).read_text())["wall_seconds"],
            "facts": json.loads((folder / str(place) / preparing.FACTS).read_text()),
            "runs": dict(sorted(runs.items())),
        }
        (results / f"{place}.json").write_text(dumped(record))


def dumped(record: Mapping[str, Any]) -> str:
    """Return JSON with a line for each run, readable and easy to compare with `git diff`."""
    runs = record["runs"]
    head = json.dumps({**record, "runs": {}}, indent=1).rstrip("{}\n ")
    lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
    return head + "{\n" + ",\n".join(lines) + "\n }\n}\n"


def read(results: Path) -> list[dict[str, Any]]:
    """Return the records of all worlds, English first.

    Args:
        results: the folder `gather` wrote.
    """
    found: Sequence[Path] = sorted(results.glob("*.json"))
    return [json.loads(path.read_text()) for path in found]
