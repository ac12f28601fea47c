"""Counting the bytes of tensors that have no memory."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Ledger(TorchDispatchMode):
    """Keeps the account of every tensor that operations make, until it is let go.

    Works below autograd, on the meta device: what a forward saves for its backward, what a backward
    recomputes and the gradients it leaves are on the account for as long as they would be held.

    Args:
        held: tensors there already; neither they nor views of them are counted.

    Source: ours; torch's ``MemTracker`` for FSDP counts the same way.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in held:
            self._known[tensor.untyped_storage()] = True

    def forget_peak(self) -> None:
        """Let the peak begin anew, at what there is now."""
        self.peak = self.live

    def _free(self, size: int) -> None:
        self.live -= size

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return output


def tensors_of(*modules: nn.Module | None) -> dict[int, Tensor]:
    """Return parameters and buffers of modules by their identity, shared ones once.

    Args:
        modules: None is passed over.

    Source: ours.
    """
    found: dict[int, Tensor] = {}
    for module in modules:
        if module is not None:
            found.update({id(p): p for p in module.parameters()})
            found.update({id(b): b for b in module.buffers()})
    return found


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors.

    Args:
        tensors: of any type.

    Source: ours.
    """
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Keep the random numbers of whoever asks as they are."""
    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
