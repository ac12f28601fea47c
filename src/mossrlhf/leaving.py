"""How a run is left: what is saved, where to, and what is said of it."""

import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from mossrlhf.checkpoint import checkpoints, written_aside
from mossrlhf.interrupts import TERMINATED
from mossrlhf.processes import PeerError, is_loss_of_a_peer, is_shared, together
from mossrlhf.resume import is_saved, restore, save_checkpoint

if TYPE_CHECKING:
    from mossrlhf.run import Run


def leave(run: "Run", folder: Path | None = None) -> Path | None:
    """Save on the way out, however it came to that.

    Args:
        run: at its end, or stopped.
        folder: where to; None for the output directory.

    Returns:
        the checkpoint to go on from; None where part of an iteration's steps has been taken, or
        nothing yet.

    Raises:
        OSError: where nothing could be written.

    Source: ours.
    """
    trainer = run.trainer
    if not run.between_iterations:
        # Part of an iteration's steps: no state to resume from, but the models are there.
        with together(run.accelerator):
            if run.accelerator.is_main_process:
                path = (folder or trainer.output_dir) / "unfinished"
                with written_aside(path) as aside:
                    trainer.save_model(aside)
                tqdm.write(f"The models as they are: {path}.")
        return None
    if not run.state.global_step and not run.pretrained:
        return None
    if run.before is not None:
        # Nothing has moved yet; resumed, the iteration begins anew.
        restore(trainer, run.before)
        # Looked up by one for all: the others may have no such folder.
        saved = torch.tensor([float(is_saved(trainer))], device=run.accelerator.device)
        if bool(trainer.engine.reduce(saved)) and folder is None:
            return trainer.output_dir / f"checkpoint-{run.state.global_step}"
    return save_checkpoint(trainer, folder)


def leave_in_error(run: "Run", error: Exception) -> Exception:
    """Save what can still be saved after an exception, and say what there is.

    Args:
        run: in which it was raised.
        error: what was raised.

    Returns:
        what to raise: the error, or one that says that another process is gone.

    Source: ours.
    """
    step, accelerator = run.state.global_step, run.accelerator
    if accelerator.num_processes > 1 and not is_shared(error):
        # The others wait elsewhere, and would never come to save with this one.
        if is_loss_of_a_peer(error):
            return PeerError(_lost(run, error))
        tqdm.write(
            f"{type(error).__name__} in iteration {step + 1} on process "
            f"{accelerator.process_index} alone: it saves nothing, and the others stop once it "
            f"has ended. {_newest(run)}"
        )
        return error
    if accelerator.is_main_process:
        tqdm.write(f"{type(error).__name__} in iteration {step + 1}.")
    try:
        leave(run)
    except (OSError, PeerError) as unsaved:
        _leave_elsewhere(run, unsaved)
    return error


def stop_at_once(run: "Run", number: int) -> None:
    """Forget half an iteration, as a second Ctrl-C or SIGTERM asked for.

    Args:
        run: broken off.
        number: the signal's.

    Raises:
        KeyboardInterrupt, SystemExit: where there are other processes; they may be anywhere, so
            nothing can be saved together.

    Source: ours.
    """
    for optimizer in run.trainer.engine.optimizers.values():
        optimizer.zero_grad()
    where = f"Stopped within iteration {run.state.global_step + 1}."
    if run.accelerator.num_processes == 1:
        tqdm.write(f"{where} train() goes on from here.")
        return
    tqdm.write(f"{where} {_newest(run)}")
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _leave_elsewhere(run: "Run", unsaved: Exception) -> None:
    """Save to the folder for temporary files, rather than lose what was learned."""
    folder = Path(tempfile.gettempdir())
    try:
        with together(run.accelerator):
            if run.accelerator.is_main_process:
                folder = Path(tempfile.mkdtemp(prefix="mossrlhf-"))
                _require_room(run, folder)
        path = leave(run, folder)
    except (OSError, PeerError):
        if folder.name.startswith("mossrlhf-"):
            shutil.rmtree(folder, ignore_errors=True)
        tqdm.write(f"Nothing could be saved: {unsaved}")
        return
    if run.accelerator.is_main_process:
        hint = f" go on with train(resume_from_checkpoint={str(path)!r})." if path else ""
        tqdm.write(f"{unsaved}\nSaved to {folder} instead; move it before it is cleaned up.{hint}")


def _require_room(run: "Run", folder: Path) -> None:
    """Refuse to fill up what other programs need too."""
    parameters = list(run.trainer.model.parameters())
    # The models for others to load, the trained weights, and twice those for Adam.
    needed = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        raise OSError(f"{str(folder)!r} has {free} bytes left, expected {2 * needed}")


def _lost(run: "Run", error: Exception) -> str:
    accelerator = run.accelerator
    return (
        f"process {accelerator.process_index} of {accelerator.num_processes} stops in iteration "
        f"{run.state.global_step + 1}, since another one is gone, or has not answered for "
        f"{run.args.ddp_timeout:g} s (TrainerConfig(ddp_timeout=)): {error!s:.200}. The first "
        "error in the other processes' output is the cause; where there is none, the process was "
        f"killed, as for lack of memory. Start all of them anew. {_newest(run)}"
    )


def _newest(run: "Run") -> str:
    found = checkpoints(run.trainer.output_dir)
    if not found:
        return f"There is no checkpoint in {str(run.trainer.output_dir)!r} to go on from."
    return f"train(resume_from_checkpoint=True) goes on from {str(found[-1])!r}."
