"""Who computes: decided in one place, once for each kind of device, with a reason to read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = {"triton": "triton_rows", "torch": "torch_rows"}
"""Names of the backends, and the modules they live in: two functions each, of one signature."""

_forced: list[str] = []
"""What `use_backend` says, on all threads: gradients on CUDA are computed on another."""


@dataclass(frozen=True)
class Backend:
    """Who computes over rows of logits, and why.

    Args:
        name: one of `BACKENDS`.
        reason: a clause to follow "since".

    Source: ours.
    """

    name: str
    reason: str

    @property
    def module(self) -> ModuleType:
        """What has the functions ``stats`` and ``gradient``."""
        return import_module(f"mossrlhf.kernels.{BACKENDS[self.name]}")


@cache
def _chosen(device_type: str, dtype: torch.dtype) -> Backend:
    if device_type != "cuda":
        return Backend("torch", f"the device is {device_type!r}, and triton's kernels need CUDA")
    if find_spec("triton") is None:
        return Backend("torch", "triton is not installed")
    if dtype == torch.float64:
        return Backend("torch", "float64 is scored in float64, which triton's kernels do not")
    return Backend("triton", "the device is CUDA, and triton is installed")


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """Return the backend of a device: triton on CUDA where it is installed, else torch in blocks.

    Args:
        device: where the logits live.
        dtype: of the logits.

    Source: ours.
    """
    if _forced:
        return Backend(_forced[-1], "use_backend() says so")
    return _chosen(torch.device(device).type, dtype)


def backend_of(logits: Tensor) -> ModuleType:
    """Return the module that computes over these logits.

    Args:
        logits: ``[N, V]``.

    Source: ours.
    """
    return backend(logits.device, logits.dtype).module


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let one backend compute whatever the device is; for tests and measurements.

    Args:
        name: one of `BACKENDS`. "triton" on CPU tensors needs ``TRITON_INTERPRET=1`` in the
            environment before triton is imported.

    Raises:
        ValueError: where there is no such backend.

    Source: ours.
    """
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
