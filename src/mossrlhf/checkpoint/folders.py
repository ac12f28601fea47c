"""Folders of checkpoints: written atomically, listed, pruned."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

STATE = "mossrlhf_state.json"
"""The file that is written last and read first; a folder without it is no checkpoint of ours."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Lend a folder to write to, which takes its final name once everything in it is on the disk.

    Args:
        path: the final name; what stands there is replaced.

    Raises:
        OSError: where it could not be written whole; nothing of it is left, and what stood there
            still does.

    Source: ours; a half-written folder is never mistaken for a finished one.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        _flush(aside)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        if path.exists():
            shutil.rmtree(path)  # `finish_renames` of somebody who looked in at this instant
        aside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        finished = [found.name for found in checkpoints(path.parent)]
        raise OSError(
            f"output_dir: {path.name} could not be written to {str(path.parent)!r} ({error}); "
            f"finished there: {finished}. Free space or choose another folder, and go on with "
            "train(resume_from_checkpoint=)"
        ) from error


def _flush(folder: Path) -> None:
    """Have the disk hold what was written: a machine that is switched off forgets the rest."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints in a folder, oldest first.

    Args:
        folder: an output directory.

    Source: ours.
    """
    found = [p for p in folder.glob("checkpoint-*") if (p / STATE).is_file()]
    return sorted((p for p in found if _number(p).isdecimal()), key=lambda p: int(_number(p)))


def _number(path: Path) -> str:
    return path.name.removeprefix("checkpoint-")


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest finished checkpoint of a run, to go on from; None where there is none.

    ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))`` starts a run and goes
    on with it, whichever is due: the line for a job that may be killed and started again.

    Args:
        output_dir: of the run.

    Source: ours; named after ``get_last_checkpoint`` of transformers.
    """
    folder = Path(output_dir)
    finish_renames(folder)
    return next(reversed(checkpoints(folder)), None)


def finish_renames(folder: Path) -> None:
    """Give a checkpoint its name back whose replacement was about to take it when a run was killed.

    Args:
        folder: an output directory in which nobody is writing.

    Source: ours.
    """
    for old in folder.glob(".checkpoint-*.old"):
        path = folder / old.name.removeprefix(".").removesuffix(".old")
        if not path.exists():
            with suppress(FileNotFoundError):  # another process has just done it
                old.rename(path)


def prune(folder: Path, keep: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond a number, never the best.

    Args:
        folder: an output directory.
        keep: how many to keep beside the best; None for all.
        best: the one that stays whatever its age.

    Source: ours.
    """
    if keep is None:
        return
    stays = None if best is None else best.resolve()  # named by another way, perhaps
    others = [path for path in checkpoints(folder) if path.resolve() != stays]
    for path in others[:-keep]:
        # Renamed first: half of it is no checkpoint, should the run be killed meanwhile.
        gone = path.rename(path.with_name(f".{path.name}.gone"))
        shutil.rmtree(gone)


def sweep(folder: Path) -> None:
    """Delete what a killed run was writing or deleting.

    Args:
        folder: an output directory in which nobody is writing.

    Source: ours.
    """
    finish_renames(folder)
    for kind in ("partial", "old", "gone"):
        for path in folder.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(path)


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints after a step into a folder of their own: they are of another run.

    Left where they are, the newest by number would be theirs, to be resumed from and to be kept.

    Args:
        folder: an output directory.
        step: the last one that belongs to the run; -1 where none does.

    Returns:
        where they are now; None where there were none.

    Source: ours.
    """
    foreign = [p for p in checkpoints(folder) if int(_number(p)) > step]
    if not foreign:
        return None
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    there = folder / f"earlier-{number}"
    there.mkdir()
    for path in [*foreign, *([folder / "completions.jsonl"] if step < 0 else [])]:
        if path.exists():
            path.rename(there / path.name)
    return there


def require_writable(folder: Path) -> None:
    """Refuse an output directory that cannot be written to, before anything is computed.

    Args:
        folder: made where absent.

    Raises:
        OSError: where it cannot be written to; it says what to do.

    Source: ours.
    """
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
