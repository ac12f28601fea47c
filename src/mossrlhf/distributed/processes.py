"""Errors of one process that reach the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed


class PeerError(RuntimeError):
    """Another process has failed, or is gone; this one is well, and stops with it."""


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Let what is raised on one process within the block end it on all of them, without a hang.

    All processes come to the end of the block, so nothing within it may wait for the others where
    one may have raised. `is_shared` knows what was raised.

    Args:
        accelerator: of the processes; with one of them the block is as any other.

    Raises:
        PeerError: on the processes that are well; it says what the others raised.
    """
    if accelerator.num_processes == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    try:
        raised = _exchange(accelerator, own)
    except Exception:
        if own is not None:
            raise own from None  # the cause; that the others are gone as well says less
        raise
    if own is not None:
        raise on_all(own)
    if raised:
        raise on_all(PeerError(f"this process stops, since {raised[0]}"))


def on_all(error: Exception) -> Exception:
    """Mark an exception as one that all processes are raising at this place.

    Args:
        error: on this process.
    """
    error.__dict__["on_all_processes"] = True
    return error


def is_shared(error: Exception) -> bool:
    """Whether all processes are raising at this place, so that they can still act together.

    Args:
        error: on this process.
    """
    return bool(error.__dict__.get("on_all_processes", False))


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an exception says that another process is gone, or has not answered in time.

    Args:
        error: from a collective operation of any backend.

    Source: ours; gloo's errors are plain `RuntimeError`s, told by their words.
    """
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    if isinstance(error, kinds) and distributed.is_initialized():
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        words in said
        for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def _exchange(accelerator: Accelerator, own: Exception | None) -> list[str]:
    """What processes have raised, in their order; nothing is pickled where none has."""
    flag = torch.tensor([float(own is not None)], device=accelerator.device)
    if not float(accelerator.reduce(flag, reduction="sum")):
        return []
    index = accelerator.process_index
    told = None if own is None else f"process {index} raised {type(own).__name__}: {own}"
    return [said for said in gather_object([told]) if said is not None]
