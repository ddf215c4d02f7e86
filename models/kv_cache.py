"""A KV cache with room for the tokens to come: a decoding step writes its keys and values, and moves nothing else.

transformers' DynamicCache concatenates at every step, which copies the whole cache for one new column. What all
prompts of a call begin with, such as a system prompt or few-shot examples, is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

LEAST = 16  # tokens of a common beginning that are worth a forward of their own

State = tuple[Tensor, Tensor]  # a layer's keys and values, (1, heads, S, dim) each


def roomy_cache(room: int, beginning: Sequence[State] = (), rows: int = 1) -> Cache:
    """A cache for one prefill, one `batch_repeat_interleave`, and then at most `room` decoding steps.

    With the `beginning` that all of `rows` prompts share (read_beginning), the prefill reads what comes after it.
    """
    if not beginning:
        fresh: Any = partial(RoomyLayer, room)
        return Cache(layer_class_to_replicate=fresh)
    layers: Any = [RoomyLayer(room, [state.expand(rows, -1, -1, -1) for state in layer]) for layer in beginning]
    return Cache(layers=layers)


def completions_cache(room: int) -> Cache:
    """A cache for `room` decoding steps, of completions whose prompts models/decode_attention.py keeps."""
    empty: Any = partial(RoomyLayer, room, grows=False)
    return Cache(layer_class_to_replicate=empty)


def common_beginning(model: Any, texts: Sequence[list[int]]) -> int:
    """How many tokens all texts begin with alike, less than the shortest of them has.

    0 where a forward of its own, which reads them once for all, would not pay, and for a model with a sliding window,
    which would count the padding between the beginning and the rest.
    """
    if len(texts) < 2 or getattr(model.config.get_text_config(), "sliding_window", None) is not None:
        return 0
    first, last = min(texts), max(texts)  # what these two share, those between them share, too
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    alike = min(alike, min(map(len, texts)) - 1)
    return alike if alike >= LEAST else 0


@torch.inference_mode()
def read_beginning(model: Any, ids: Sequence[int]) -> list[State]:
    """Every layer's keys and values of the tokens `ids`."""
    device = next(model.parameters()).device
    cache = roomy_cache(0)
    model(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: Any = cache.layers
    return [layer.whole for layer in layers]


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (B, heads, T, dim), as the filled part of two longer tensors."""

    def __init__(self, room: int, beginning: Sequence[Tensor] = (), grows: bool = True) -> None:
        super().__init__()
        self.room, self.grows = room, grows  # until the completions are laid out, with the room that they need
        if beginning:
            self._begin(*beginning)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append along T; returns all keys and values."""
        new = (key_states, value_states)
        if not self.is_initialized and self.grows:
            return self._begin(*new)
        if not self.is_initialized:
            self._begin(*(state.new_empty(*state.shape[:2], self.room, state.shape[3]) for state in new))
            self.length = 0
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.grows:
            keys, values = (torch.cat(parts, -2) for parts in zip(self.whole, new, strict=True))
            self.whole = (keys, values)
            return self._show()
        if self.length > self.whole[0].shape[-2]:
            raise ValueError(f"the cache has room for {self.whole[0].shape[-2]} tokens, not {self.length}")
        for whole, added in zip(self.whole, new, strict=True):
            whole[..., start : self.length, :] = added
        return self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every prompt's cache once for each of its completions, with the room that they need."""
        roomy = []
        for filled in self.whole:
            prompts, heads, length, dim = filled.shape
            whole = filled.new_empty(prompts * repeats, heads, length + self.room, dim)
            whole[..., :length, :] = filled.repeat_interleave(repeats, dim=0)
            roomy.append(whole)
        self.whole, self.grows = (roomy[0], roomy[1]), False
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.whole = (self.whole[0][indices], self.whole[1][indices])
        self._show()

    def _begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.whole, self.length = (keys, values), keys.shape[-2]
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (whole[..., : self.length, :] for whole in self.whole)
        return self.keys, self.values
