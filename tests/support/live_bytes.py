"""The bytes of the tensors of a real run, counted from outside of it: an oracle for `plan`."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operation returns for as long as it is held.

    Scratch memory inside of an operation is not seen, so that the count is the same on every
    processor.

    Args:
        held: tensors that are there already, which are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in held})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._seen:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen[storage] = None
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


def tensors_of(*models: Any) -> list[Tensor]:
    """Parameters and buffers of models, shared ones once; None is passed over."""
    found = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()) if model is not None else ():
            found[id(tensor)] = tensor
    return list(found.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
