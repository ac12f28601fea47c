"""Folders of checkpoints: written atomically, listed, pruned, moved out of the way."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

STATE = "mossrlhf_state.json"
"""Written last and read first; a folder without it is not a finished checkpoint."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        if path.exists():
            shutil.rmtree(path)  # another process called `finish_renames` just now
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        finished = [found.name for found in checkpoints(path.parent)]
        raise OSError(
            f"output_dir: {path.name} could not be written to {str(path.parent)!r} ({error}); "
            f"finished there: {finished}. Free space or choose another folder, and resume with "
            "train(resume_from_checkpoint=)"
        ) from error


def _flush(folder: Path) -> None:
    """Sync the files to the disk, so that a power cut after the rename loses nothing."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, by step, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / STATE).is_file()]
    return sorted((p for p in found if _number(p).isdecimal()), key=lambda p: int(_number(p)))


def _number(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest finished checkpoint of a run; None where there is none.

    ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))`` starts a run or
    resumes it: the line for a job that may be killed and started again.

    Args:
        output_dir: the run's output directory.
    """
    folder = Path(output_dir)
    finish_renames(folder)
    return next(reversed(checkpoints(folder)), None)


def finish_renames(folder: Path) -> None:
    """Restore a checkpoint whose replacement was interrupted between its two renames."""
    for old in folder.glob(".checkpoint-*.old"):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            with suppress(FileNotFoundError):  # another process has just done it
                old.rename(path)


def prune(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond `keep` (None keeps all), but never the best."""
    if keep is None:
        return
    stays = None if best is None else best.resolve()
    others = [path for path in checkpoints(folder) if path.resolve() != stays]
    for path in others[:-keep]:
        # Renamed first, so that a killed run never leaves half a checkpoint under its name.
        gone = path.rename(path.with_name(f".{path.name}.gone"))
        shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Delete what a killed run was writing or deleting."""
    finish_renames(folder)
    for kind in ("partial", "old", "gone"):
        for path in folder.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(path)


def move_later_checkpoints(folder: Path, step: int) -> Path | None:
    """Move checkpoints after a step, which belong to another run, into ``earlier-<n>``.

    Left in place, the newest by number would be theirs: resumed from, and kept by `prune`.
    """
    later = [p for p in checkpoints(folder) if int(_number(p)) > step]
    if not later:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    for path in [*later, *([folder / "completions.jsonl"] if step < 0 else [])]:
        if path.exists():
            path.rename(target / path.name)
    return target


def require_writable(folder: Path) -> None:
    """Create an output directory, or raise OSError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output_dir: {str(folder)!r} cannot be written to ({error}); choose another folder, "
            "or free space"
        ) from error
