"""A key-value cache that rows can be removed from."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):
    """A `DynamicLayer` that copies its keys and values once in `room` tokens.

    Args:
        room: tokens to allocate whenever the buffers are full.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "PreallocatedLayer":
        """Take over the keys and values of a layer."""
        made = cls(room)
        made.__dict__.update(vars(layer))
        return made

    def update(
        self,
        key_states: Float[Tensor, "B H N D"],
        value_states: Float[Tensor, "B H N E"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T E"]]:
        """Append N tokens; return views of all T keys and values in the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # The keys may be empty, or replaced by somebody else, as `batch_select_indices` does.
        held = self.keys.shape[-2] if self.keys.ndim == key_states.ndim else 0
        total = held + key_states.shape[-2]
        valid = self._buffers is not None and self.keys is self._view
        if not valid or self._buffers is None or total > self._buffers[0].shape[-2]:
            size = max(total, held + self.room)
            self._buffers = (
                _enlarged(self.keys, key_states, held, size),
                _enlarged(self.values, value_states, held, size),
            )
        keys, values = self._buffers
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        self._view = self.keys
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " K"]) -> None:
        """Keep K rows."""
        super().batch_select_indices(indices)
        # Frees the old buffers now: until the next token, all layers would hold both.
        self._buffers = self._view = None


def _enlarged(old: Tensor, new: Tensor, held: int, size: int) -> Tensor:
    buffer = new.new_empty(*new.shape[:-2], size, new.shape[-1])
    if held:
        buffer[..., :held, :] = old
    return buffer


def preallocate(cache: Any, room: int) -> None:
    """Have the plain layers of a `DynamicCache` allocate `room` tokens at a time, in place."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer.of(layer, room)
        elif type(layer) is PreallocatedLayer:
            layer.room = room


def can_drop_rows(cache: Any) -> bool:
    """Whether all layers of a cache hold keys and values and nothing else, as subclasses may."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, PreallocatedLayer)
    layers = getattr(cache, "layers", [])
    return isinstance(cache, DynamicCache) and all(type(layer) in plain for layer in layers)
