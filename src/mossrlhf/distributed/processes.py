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
    """Pass an exception within the block on to all processes, which otherwise would hang.

    All processes reach the end of the block, so nothing within it may be collective.

    Raises:
        PeerError: on the processes without an exception; it says what the others raised.
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
            raise own from None  # the cause; that the others are gone matters less
        raise
    if own is not None:
        raise on_all(own)
    if raised:
        raise on_all(PeerError(f"this process stops, since {raised[0]}"))


def on_all(error: Exception) -> Exception:
    """Mark an exception as raised by all processes at this point, and return it."""
    error.__dict__["on_all_processes"] = True
    return error


def is_shared(error: Exception) -> bool:
    """Whether all processes raised at this point, so that they can still act together."""
    return bool(error.__dict__.get("on_all_processes", False))


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether an exception of a collective operation means that another process is gone.

    Gloo raises plain `RuntimeError`s, which are recognized by their words.
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
    """Gather what processes raised, in their order; nothing is pickled where none did."""
    flag = torch.tensor([float(own is not None)], device=accelerator.device)
    if not float(accelerator.reduce(flag, reduction="sum")):
        return []
    index = accelerator.process_index
    told = None if own is None else f"process {index} raised {type(own).__name__}: {own}"
    return [said for said in gather_object([told]) if said is not None]
