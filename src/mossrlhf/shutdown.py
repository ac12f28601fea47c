"""Early ends of a run: Ctrl-C, SIGTERM, an exception, a full disk, a lost process."""

import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from mossrlhf.checkpoint.folders import atomic_folder, checkpoints
from mossrlhf.checkpoint.save_load import is_saved, save_checkpoint
from mossrlhf.checkpoint.state import RunState
from mossrlhf.distributed.processes import PeerError, is_loss_of_a_peer, is_shared, together
from mossrlhf.nan_debug import Fault, NonFiniteError, Suspect, with_prompts, write_fault

TERMINATED = 128 + signal.SIGTERM
"""The exit code that shells report for a command ended by SIGTERM: 143."""


class _AtOnce(BaseException):
    """Raised by a second SIGTERM; no `Exception`, so that user code does not catch it."""


class Signals:
    """Handlers of Ctrl-C and SIGTERM: the first is a request, the second interrupts.

    `stop` is called with the number and False in the handler, with True after an interruption.
    """

    def __init__(self, stop: Callable[[int, bool], None]) -> None:
        self.stop = stop
        self.terminated = False
        self._before: Any = signal.SIG_DFL

    def exit(self) -> None:
        """Call the user's SIGTERM handler; without one raise SystemExit(143)."""
        if callable(self._before):
            self._before(signal.SIGTERM, None)
        else:
            raise SystemExit(TERMINATED)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within the block; outside the main thread do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupt = signal.signal(signal.SIGINT, self._interrupt)
        self._before = signal.getsignal(signal.SIGTERM)
        # SIG_IGN is set on purpose; None is a handler that was not set from Python.
        handles = self._before is not signal.SIG_IGN and self._before is not None
        if handles:
            signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        except KeyboardInterrupt:
            self.stop(signal.SIGINT, True)
        except _AtOnce:
            self.stop(signal.SIGTERM, True)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            if handles:
                signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        # Not the previous handler: a shell starts background jobs with interrupts ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop(number, False)

    def _terminate(self, number: int, frame: Any) -> None:
        if self.terminated:
            raise _AtOnce
        self.terminated = True
        self.stop(number, False)


def save_at_exit(run: RunState) -> Path | None:
    """Save a run that ends, for any reason."""
    try:
        return _save(run)
    except (OSError, PeerError) as unsaved:
        _save_elsewhere(run, unsaved)
        raise


def _save(run: RunState, folder: Path | None = None) -> Path | None:
    if run.updating:
        # Some optimizer steps of the iteration are done: the models can be saved, a state to
        # resume from cannot.
        with together(run.accelerator):
            if run.accelerator.is_main_process:
                path = (folder or run.output_dir) / "unfinished"
                with atomic_folder(path) as temporary:
                    run.save_models(temporary)
                tqdm.write(f"The models as they are: {path}.")
        return None
    if not run.progress.global_step and not run.pretrained:
        return None
    if run.before is not None:
        # No model has changed yet; the resumed run repeats the iteration.
        run.rewind(run.before)
        # Only one process checks: the others may not see the folder.
        saved = torch.tensor([float(is_saved(run))], device=run.accelerator.device)
        if bool(run.engine.reduce(saved)) and folder is None:
            return run.checkpoint
    return save_checkpoint(run, folder)


def save_after_error(run: RunState, error: Exception) -> Exception:
    """Save what can be saved after an exception, print where, and return the error to raise."""
    step, accelerator = run.progress.global_step, run.accelerator
    if accelerator.num_processes > 1 and not is_shared(error):
        # The other processes wait elsewhere, and would never save together with this one.
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
    if isinstance(error, NonFiniteError) and run.steps_before == run.engine.steps:
        run.updating = False  # the first step of the update was not taken: no model has moved
    try:
        save_at_exit(run)
    except (OSError, PeerError):
        pass  # `save_at_exit` has printed it; the error to raise is the first one
    except Exception as unsaved:  # no error of saving may replace the first one either
        tqdm.write(f"Nothing could be saved: {type(unsaved).__name__}: {unsaved}")
    return error


def stop_at_once(run: RunState, number: int) -> None:
    """Drop half an iteration after a second Ctrl-C or SIGTERM."""
    run.engine.zero_grad()
    where = f"Stopped within iteration {run.progress.global_step + 1}."
    if run.accelerator.num_processes == 1:
        resumes = number == signal.SIGINT
        tqdm.write(f"{where} train() continues from here." if resumes else where)
        return
    tqdm.write(f"{where} {_newest(run)}")
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def print_terminated(run: RunState, saved: Path | None) -> None:
    """Print the checkpoint of a run ended by SIGTERM."""
    if run.accelerator.is_main_process:
        at = "" if saved is None else f" Written: {str(saved)!r}."
        step = run.progress.global_step
        tqdm.write(f"Ended by SIGTERM after iteration {step}.{at} {_newest(run)}")


def keep_fault(run: RunState, fault: Fault) -> tuple[str, Sequence[Suspect]]:
    """Write the batch of a failed step to ``faults/``."""
    fault = with_prompts(fault, run.prompts.dealt, run.prompts.dataset)
    warm_up = "policy" not in fault.roles
    step = run.progress.global_step + 1
    name = f"pretrain-{run.pretrained + 1}" if warm_up else f"step-{step}"
    folder = run.output_dir / "faults" / name
    try:
        write_fault(fault, folder)
    except (OSError, SafetensorError) as error:
        return f"The batch could not be kept in {str(folder)!r} ({error}). ", fault.suspects
    return f"mossrlhf.nan_debug.read_fault({str(folder)!r}) returns the batch. ", fault.suspects


def _save_elsewhere(run: RunState, unsaved: Exception) -> None:
    """Save to the folder for temporary files."""
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
        hint = f" resume by train(resume_from_checkpoint={str(path)!r})." if path else ""
        tqdm.write(f"{unsaved}\nSaved to {folder} instead; move it before it is cleaned up.{hint}")


def _require_room(run: RunState, folder: Path) -> None:
    """Refuse a disk with less than twice the needed space, which other programs may need."""
    # The models for transformers, the trained weights, and two moments of Adam.
    parameters = run.engine.bare.parameters()
    needed = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)
    free = shutil.disk_usage(folder).free
    if free < 2 * needed:
        raise OSError(f"{str(folder)!r} has {free} bytes left, expected {2 * needed}")


def _lost(run: RunState, error: Exception) -> str:
    accelerator = run.accelerator
    return (
        f"process {accelerator.process_index} of {accelerator.num_processes} stops in iteration "
        f"{run.progress.global_step + 1}, since another one is gone, or has not responded for "
        f"{run.args.ddp_timeout:g} s (TrainerConfig(ddp_timeout=)): {error!s:.200}. The first "
        "error in the other processes' output is the cause; where there is none, the process was "
        f"killed, as for lack of memory. Start all of them again. {_newest(run)}"
    )


def _newest(run: RunState) -> str:
    found = checkpoints(run.output_dir)
    if not found:
        return f"There is no checkpoint in {str(run.output_dir)!r} to resume from."
    return f"train(resume_from_checkpoint=True) resumes from {str(found[-1])!r}."
