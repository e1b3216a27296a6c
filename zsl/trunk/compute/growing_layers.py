"""Cache layers of transformers that append within spare room, so that a new token copies no other ones. Pure torch.

The room is `with_room` of the tokens that a layer holds. New tokens are written behind those of the layer that is
continued, which does not see them: a layer and its copy share the room. So a layer is continued once, or again if
nothing came of it (`zsl.trunk.sessions.cache_store` knows the newest version only).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zsl.trunk.costs import with_room


class GrowingLayer(DynamicLayer):
    """Keys and values of all tokens, as parts of larger tensors. After another edit the next update copies them."""

    keys: Any  # [rows, heads, tokens, dim]
    values: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._end = 0  # of the tokens in the room

    def copied(self) -> Self:
        """Return a layer that shares the tensors."""
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        return layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states.narrow(2, 0, 0), value_states.narrow(2, 0, 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._room = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._room = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.keys.shape[2], key_states.shape[2]
        needed = with_room(old + new)
        if self._room is None or self._room[0].shape[2] != needed or self._end + new > needed:
            self._room = _copied(self.keys, key_states, needed), _copied(self.values, value_states, needed)
            self._end = old
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room.narrow(2, self._end, new).copy_(states)
        self._end += new
        self.keys, self.values = (room.narrow(2, self._end - old - new, old + new) for room in self._room)
        return self.keys, self.values


class GrowingWindowLayer(GrowingLayer, DynamicSlidingWindowLayer):
    """Keys and values of a sliding window, and of the last request, whose tokens can be taken back."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.activate_past_recording()  # type: ignore[no-untyped-call]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = key_states.shape[2]
        self.cumulative_length += new
        keys, values = super().update(key_states, value_states)
        visible = self.sliding_window - 1 + new
        return keys[:, :, -visible:], values[:, :, -visible:]


def _copied(old: torch.Tensor, like: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a tensor for so many tokens that begins with the old ones."""
    rows, heads, _, dim = like.shape
    room = like.new_empty(rows, heads, tokens, dim)
    room.narrow(2, 0, old.shape[2]).copy_(old)
    return room
