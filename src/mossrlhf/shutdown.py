"""How a run ends early: signals, errors, a full disk, a lost process."""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from mossrlhf.checkpoint.folders import checkpoints, written_aside
from mossrlhf.checkpoint.save_load import is_saved, save_checkpoint
from mossrlhf.checkpoint.state import restore
from mossrlhf.distributed.processes import PeerError, is_loss_of_a_peer, is_shared, together
from mossrlhf.nan_debug import Fault, NonFiniteError, Suspect, with_prompts, write_fault

if TYPE_CHECKING:
    from mossrlhf.run import Run


TERMINATED = 128 + signal.SIGTERM
"""The exit code of a command that SIGTERM has ended, as shells count: 143."""


class _AtOnce(BaseException):
    """Raised by a second SIGTERM. No `Exception`: nothing on the way may take it for its own."""


class Signals:
    """What a process has been asked for while it was busy.

    Args:
        stop: called with the signal's number and False when it comes, from within its handler,
            and with True once a second one has broken off what was going on.

    Source: ours.
    """

    def __init__(self, stop: Callable[[int, bool], None]) -> None:
        self.stop = stop
        self.terminated = False
        self._before: Any = signal.SIG_DFL

    def leave(self) -> None:
        """End the process as SIGTERM would have, or let a handler of the user's decide.

        Raises:
            SystemExit: with `TERMINATED`, where nobody else had a handler for SIGTERM.
        """
        if callable(self._before):
            self._before(signal.SIGTERM, None)
        else:
            raise SystemExit(TERMINATED)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM be a wish, and only the second break off the block.

        Outside the main thread, where Python sets no signal handlers, nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupt = signal.signal(signal.SIGINT, self._interrupt)
        self._before = signal.getsignal(signal.SIGTERM)
        # Ignored, it was meant to be; None is a handler that is not Python's.
        heeds = self._before is not signal.SIG_IGN and self._before is not None
        if heeds:
            signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        except KeyboardInterrupt:
            self.stop(signal.SIGINT, True)
        except _AtOnce:
            self.stop(signal.SIGTERM, True)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            if heeds:
                signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        # Not the handler before: a shell starts its background jobs with interrupts ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop(number, False)

    def _terminate(self, number: int, frame: Any) -> None:
        if self.terminated:
            raise _AtOnce
        self.terminated = True
        self.stop(number, False)


def leave(run: "Run") -> Path | None:
    """Save on the way out, however it came to that.

    Args:
        run: at its end, or stopped.

    Returns:
        the checkpoint to go on from; None where part of an iteration's steps has been taken, or
        nothing yet.

    Raises:
        OSError: where it could not be written to the output directory; it has then been written
            to the folder for temporary files, if there was room. `PeerError` on other processes.

    Source: ours.
    """
    try:
        return _save(run)
    except (OSError, PeerError) as unsaved:
        _save_elsewhere(run, unsaved)
        raise


def _save(run: "Run", folder: Path | None = None) -> Path | None:
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
    if isinstance(error, NonFiniteError) and run.steps_before == run.trainer.engine.steps:
        run.between_iterations = True  # the first step of an update was not taken: nothing moved
    try:
        leave(run)
    except (OSError, PeerError):
        pass  # said by `leave`; what is raised is how it began
    except Exception as unsaved:  # nor may anything else that saving raises take its place
        tqdm.write(f"Nothing could be saved: {type(unsaved).__name__}: {unsaved}")
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
    run.trainer.engine.forget()
    where = f"Stopped within iteration {run.state.global_step + 1}."
    if run.accelerator.num_processes == 1:
        tqdm.write(f"{where} train() goes on from here." if number == signal.SIGINT else where)
        return
    tqdm.write(f"{where} {_newest(run)}")
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def say_terminated(run: "Run", saved: Path | None) -> None:
    """Say what a run that SIGTERM has ended leaves.

    Args:
        run: ended.
        saved: what `leave` returned.

    Source: ours.
    """
    if run.accelerator.is_main_process:
        at = "" if saved is None else f" Written: {str(saved)!r}."
        tqdm.write(f"Ended by SIGTERM after iteration {run.state.global_step}.{at} {_newest(run)}")


def keep_fault(run: "Run", fault: Fault) -> tuple[str, Sequence[Suspect]]:
    """Leave the batch of a step that was not taken in ``faults/``.

    Args:
        run: in which it happened.
        fault: of this process.

    Returns:
        a sentence on where it is, and the suspects with their prompts.

    Source: ours.
    """
    prompts = run.trainer.prompts
    fault = with_prompts(fault, prompts.dealt, prompts.dataset)
    warm_up = "policy" not in fault.roles
    name = f"pretrain-{run.pretrained + 1}" if warm_up else f"step-{run.state.global_step + 1}"
    folder = run.trainer.output_dir / "faults" / name
    try:
        write_fault(fault, folder)
    except (OSError, SafetensorError) as error:
        return f"The batch could not be kept in {str(folder)!r} ({error}). ", fault.suspects
    said = f"mossrlhf.nan_debug.read_fault({str(folder)!r}) returns the batch. "
    return said, fault.suspects


def _save_elsewhere(run: "Run", unsaved: Exception) -> None:
    """Save to the folder for temporary files, rather than lose what was learned."""
    folder = Path(tempfile.gettempdir())
    try:
        with together(run.accelerator):
            if run.accelerator.is_main_process:
                folder = Path(tempfile.mkdtemp(prefix="mossrlhf-"))
                _require_room(run, folder)
        path = _save(run, folder)
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
