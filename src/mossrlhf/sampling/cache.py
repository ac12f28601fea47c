"""Keys and values with room for more: transformers' cache copies all of them for every token."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):
    """A layer that copies its keys and values once in a while, not with every token.

    Args:
        room: tokens to make room for whenever there is none left.

    Source: ours; the numbers are those of ``DynamicLayer``.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._rooms: tuple[Tensor, Tensor] | None = None
        self._shown: Tensor | None = None

    @classmethod
    def of(cls, layer: DynamicLayer, room: int) -> "RoomyLayer":
        """Take over what a layer holds.

        Args:
            layer: of transformers.
            room: tokens to make room for whenever there is none left.
        """
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
        """Append tokens.

        Args:
            key_states: ``[B, H, N, D]``.
            value_states: ``[B, H, N, E]``.
            *args: of no meaning here, as in ``DynamicLayer``.
            **kwargs: likewise.

        Returns:
            all keys ``[B, H, T, D]`` and values ``[B, H, T, E]``: views, of room that is written
            to later, behind them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Of an empty layer; or somebody has put other keys there, as `batch_select_indices` does.
        held = self.keys.shape[-2] if self.keys.ndim == key_states.ndim else 0
        total = held + key_states.shape[-2]
        known = self._rooms is not None and self.keys is self._shown
        if not known or self._rooms is None or total > self._rooms[0].shape[-2]:
            size = max(total, held + self.room)
            self._rooms = (
                _roomy(self.keys, key_states, held, size),
                _roomy(self.values, value_states, held, size),
            )
        keys, values = self._rooms
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        self._shown = self.keys
        return self.keys, self.values

    def batch_select_indices(self, indices: Int[Tensor, " K"]) -> None:
        """Only keep some rows.

        Args:
            indices: ``[K]`` of them.
        """
        super().batch_select_indices(indices)
        # Or, until their next token, all layers would hold all rows beside those that are kept.
        self._rooms = self._shown = None


def _roomy(old: Tensor, new: Tensor, held: int, size: int) -> Tensor:
    room = new.new_empty(*new.shape[:-2], size, new.shape[-1])
    if held:
        room[..., :held, :] = old
    return room


def make_room(cache: Any, room: int) -> None:
    """Have a cache of transformers make room for tokens ahead, in place.

    Args:
        cache: any; only plain layers of a ``DynamicCache`` are changed.
        room: tokens to make room for whenever there is none left.

    Source: ours.
    """
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = RoomyLayer.of(layer, room)
        elif type(layer) is RoomyLayer:
            layer.room = room


_OF_ROWS = (DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer)
"""Layers that hold keys and values and nothing else, as their subclasses may."""


def has_rows(cache: Any) -> bool:
    """Whether rows of a cache can be let go.

    Args:
        cache: what ``generate`` has returned, or None.

    Source: ours.
    """
    layers = getattr(cache, "layers", [])
    return isinstance(cache, DynamicCache) and all(type(layer) in _OF_ROWS for layer in layers)
