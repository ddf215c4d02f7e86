"""A KV cache with room for the tokens to come: a decoding step writes its keys and values, and moves nothing else.

transformers' DynamicCache concatenates at every step, which copies the whole cache for one new column.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def roomy_cache(room: int) -> Cache:
    """A cache for one prefill, one `batch_repeat_interleave`, and then at most `room` decoding steps."""
    layer: Any = partial(RoomyLayer, room)
    return Cache(layer_class_to_replicate=layer)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, T, dim), as the filled part of two longer tensors."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append along T; returns all keys and values."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.whole, self.length = (key_states, value_states), key_states.shape[-2]
            return self._show()
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.whole[0].shape[-2]:
            raise ValueError(f"the cache has room for {self.whole[0].shape[-2]} tokens, not {self.length}")
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[..., start : self.length, :] = new
        return self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every prompt's cache once for each of its completions, with the room that they need."""
        roomy = []
        for filled in (self.keys, self.values):
            assert filled is not None
            prompts, heads, length, dim = filled.shape
            whole = filled.new_empty(prompts * repeats, heads, length + self.room, dim)
            whole[..., :length, :] = filled.repeat_interleave(repeats, dim=0)
            roomy.append(whole)
        self.whole = (roomy[0], roomy[1])
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.whole = (self.whole[0][indices], self.whole[1][indices])
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (whole[..., : self.length, :] for whole in self.whole)
        return self.keys, self.values
