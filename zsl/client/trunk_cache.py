"""Keys and values of the trunk's layers for a cache of transformers: at the daemon, and their inputs at the client.

The cache's own layers stand in the places of the trunk's layers, and hold numbers of rows in place of keys and values:
one number for each token, in the first of those layers only. So what a generation does to its cache (reorder, repeat,
select, crop, reset, copy) can be read there before the next forward, and is sent with it. If the daemon has lost its
keys and values, they are computed again from the inputs that are kept here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from zsl.client.replayable_step import Answer, CallAdapter, HeldCache, Step
from zsl.client.shared_lock import SharedLock
from zsl.client.trunk_client import TrunkClient
from zsl.errors import ModelError, OverloadedError, UnknownCacheError
from zsl.wire.messages import Cut, Reveal

PIECE_TOKENS = 512  # of a prompt in one request, of all rows: tokens of others are computed between two pieces
MAX_LOSSES = 8  # of one cache, in one forward
ALONE_AFTER_LOSSES = 2  # more than a restart of the daemon explains
LONGEST_PAUSE_SECONDS = 2.0  # before keys and values that were lost again and again are computed again
TRUNK_CACHE = "trunk_cache"  # attribute of the cache's first layer in the trunk
_DYNAMIC = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
_STATIC = {StaticLayer, StaticSlidingWindowLayer}

_locks: WeakKeyDictionary[TrunkClient, SharedLock] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Piece:
    """Inputs of the trunk in one forward, as they are sent. `adapter`: the one in the trunk's layers."""

    activations: torch.Tensor  # [rows, tokens, hidden]
    position_ids: torch.Tensor | None  # [rows or 1, tokens]
    adapter: CallAdapter | None

    @property
    def tokens(self) -> int:
        return self.activations.shape[1]

    def of(self, rows: torch.Tensor, tokens: int) -> Piece:
        """Return the first tokens of these rows."""
        positions = self.position_ids
        if positions is not None:
            positions = positions[:, :tokens] if positions.shape[0] == 1 else positions[rows, :tokens]
        return Piece(self.activations[rows, :tokens], positions, self.adapter)


class TrunkCache:
    """Inputs of the trunk for all tokens of a cache, and their keys and values at the daemon."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._rows = torch.empty(0, 0, dtype=torch.long)  # [pieces, rows]: the row of a piece in each row of the cache
        self._held: HeldCache | None = None  # None: not at the daemon, or lost

    def __deepcopy__(self, memo: dict[int, Any]) -> TrunkCache:
        """Copy a cache of transformers: the inputs are shared, keys and values are computed when the copy is used."""
        copied = memo[id(self)] = TrunkCache()
        copied._pieces, copied._rows = list(self._pieces), self._rows
        return copied

    def forward(
        self,
        client: TrunkClient,
        new: Piece,
        attention_mask: torch.Tensor | None,  # [rows, tokens with those in the cache]
        edit: tuple[int, Sequence[int]],
        reveal: Sequence[Reveal],
    ) -> tuple[torch.Tensor, Answer]:
        """Run new tokens behind those of the cache, which has had this edit. Return their output, and the last answer.

        Lost keys and values are computed again in the request of the new tokens, so that they cannot be lost again
        before it. If one request does not hold them all, they may be, as several texts take each other's memory in
        turn: then this connection's other texts wait. Raises `ZslError`; they are computed again then, if they are
        needed.
        """
        length, rows = edit
        edited = self._edited(length, rows)
        kept = None if list(rows) == list(range(self._rows.shape[1])) else list(rows)
        held, self._held = self._held, None
        most = max(1, min(client.welcome.limits.max_request_tokens, PIECE_TOKENS) // new.activations.shape[0])
        lock = _locks.setdefault(client, SharedLock())
        losses = 0
        while True:
            if held is None or not length or not client.has(held):
                held, kept = client.new_cache(), None
            if held.length >= length:
                first, last = [], new
            elif reveal:
                first, last = edited._joined(), new
            else:
                *first, last = edited._followed_by(new)._joined()
            try:
                with lock.exclusive() if losses >= ALONE_AFTER_LOSSES else lock.shared():
                    for piece in first:
                        _send(client, held, piece, attention_mask, most=most)
                    held.length = min(held.length, length)
                    whole = max(most, new.tokens) if reveal else most  # what is revealed comes in one answer
                    steps = _send(client, held, last, attention_mask, kept, reveal, most=whole)
                break
            except Exception as error:
                # They are in a cycle with the error, and have `held`, which the daemon would keep for as long.
                clear_frames(error.__traceback__)
                held = None
                if not isinstance(error, UnknownCacheError):
                    raise
                losses += 1
                if losses > MAX_LOSSES:
                    raise OverloadedError(
                        f"{client.endpoint} lost the keys and values of a text {losses} times while they were computed "
                        "again: others need its memory; try later, or start the daemon with more --cache-memory"
                    ) from None
            if losses > ALONE_AFTER_LOSSES:  # to those of other connections
                time.sleep(min(0.01 * 2**losses, LONGEST_PAUSE_SECONDS))
        whole_text = edited._followed_by(new)
        self._pieces, self._rows, self._held = whole_text._pieces, whole_text._rows, held
        output = steps[0].output if len(steps) == 1 else torch.cat([step.output for step in steps], 1)
        answer = steps[-1].answer
        assert answer is not None
        return output[:, -new.tokens :], answer

    def _edited(self, length: int, rows: Sequence[int]) -> TrunkCache:
        """Return the first `length` tokens of these rows, which may be repeated."""
        edited, excess = TrunkCache(), sum(piece.tokens for piece in self._pieces) - length
        if not length:
            return edited
        edited._pieces = list(self._pieces)
        while excess > 0:
            last = edited._pieces.pop()
            if last.tokens > excess:
                every = torch.arange(last.activations.shape[0])
                edited._pieces.append(last.of(every, last.tokens - excess))
            excess -= last.tokens
        edited._rows = self._rows[: len(edited._pieces), torch.tensor(rows)]
        return edited

    def _followed_by(self, new: Piece) -> TrunkCache:
        """Return the inputs of these tokens and of new ones."""
        every = torch.arange(new.activations.shape[0]).unsqueeze(0)
        longer = TrunkCache()
        longer._pieces = [*self._pieces, new]
        longer._rows = torch.cat([self._rows, every]) if self._pieces else every
        return longer

    def _joined(self) -> list[Piece]:
        """Return the pieces with the rows of the cache, those side by side with one adapter joined."""
        joined: list[Piece] = []
        run: list[Piece] = []
        for piece, rows in zip(self._pieces, self._rows, strict=True):
            if run and (piece.adapter, piece.position_ids is None) != (run[0].adapter, run[0].position_ids is None):
                joined.append(_join(run))
                run = []
            run.append(piece.of(rows, piece.tokens))
        return [*joined, _join(run)] if run else joined


def _join(run: Sequence[Piece]) -> Piece:
    positions = [piece.position_ids for piece in run if piece.position_ids is not None]
    rows = max((each.shape[0] for each in positions), default=1)
    joined = torch.cat([each.expand(rows, -1) for each in positions], 1) if positions else None
    return Piece(torch.cat([piece.activations for piece in run], 1), joined, run[0].adapter)


def _send(
    client: TrunkClient,
    held: HeldCache,
    piece: Piece,
    attention_mask: torch.Tensor | None,
    rows: list[int] | None = None,
    reveal: Sequence[Reveal] = (),
    *,
    most: int,
) -> list[Step]:
    """Run a piece behind what is held, in requests of up to `most` tokens a row. Return the forwards."""
    steps = []
    for start in range(0, piece.tokens, most):
        part = slice(start, start + most)
        activations = piece.activations[:, part].contiguous()
        step = client.forward(
            activations,
            attention_mask=None if attention_mask is None else attention_mask[:, : held.length + activations.shape[1]],
            position_ids=None if piece.position_ids is None else piece.position_ids[:, part],
            adapter=piece.adapter,
            reveal=reveal,
            cache=held,
            rows=rows,
        )
        rows = None
        steps.append(step)
    return steps


# --- the cache's own layers ------------------------------------------------------------------------------------------


def cache_among(args: Iterable[Any], kwargs: dict[str, Any], *, expected: bool) -> Cache | None:
    """Return the cache among the arguments of a decoder layer. Raises `ModelError` for one that cannot be followed, and
    without the one that is expected."""
    found = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
    if found is None and expected:
        raise ModelError("the model does not pass past_key_values to its layers; pass use_cache=False")
    if found is not None and (type(found) not in (Cache, DynamicCache, StaticCache) or found.offloading):
        which = "an offloaded cache" if found.offloading else f"a {type(found).__name__}"
        raise ModelError(
            f"{which} is not supported by a split model, whose trunk keeps keys and values: leave out "
            "cache_implementation, or pass past_key_values=DynamicCache(config=model.config)"
        )
    return found


def trunk_cache_of(cache: Cache, cut: Cut) -> TrunkCache:
    """Return the trunk's part of a cache, made at its first use. Raises `ModelError` if it cannot be followed."""
    layers = cache.layers
    while len(layers) <= cut.start and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    first: Any = layers[cut.start]
    found: TrunkCache | None = getattr(first, TRUNK_CACHE, None)
    if found is not None:
        return found
    kinds = {type(layer) for layer in layers[cut.start : cut.stop]}
    if type(first) is DummyLayer or not (kinds <= _DYNAMIC or kinds <= _STATIC):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ModelError(f"a cache with {names} for the trunk's layers cannot be split: pass use_cache=False")
    if first.get_seq_length():
        raise ModelError(
            f"past_key_values holds {first.get_seq_length()} tokens that no cached forward of this split model has put "
            "there: keys and values of prefix tuning, of another model, or of a forward with gradients. Pass a new "
            "cache, or use_cache=False"
        )
    if kinds <= _STATIC:  # without the room that `generate` may have made; masks are made by their lengths
        static: list[Any] = layers[cut.start : cut.stop]
        layers[cut.start : cut.stop] = [
            type(layer)(max_cache_len=layer.max_cache_len, sliding_window=layer.max_cache_len) for layer in static
        ]
    else:
        for index in range(cut.start + 1, cut.stop):
            layers[index : index + 1] = [DummyLayer()]
    made = TrunkCache()
    setattr(layers[cut.start], TRUNK_CACHE, made)
    return made


def edit_of(cache: Cache, cut: Cut) -> tuple[int, list[int]]:
    """Return the tokens in a cache, and which row of the last forward each of its rows was."""
    layer: Any = cache.layers[cut.start]
    length = int(layer.get_seq_length())
    if not length:
        return 0, []
    if not layer.keys.shape[-2]:
        raise ModelError("past_key_values was cropped further than its sliding window reaches back")
    return length, layer.keys[:, 0, 0, 0].tolist()


def note_forward(cache: Cache, cut: Cut, batch: torch.Tensor) -> None:
    """Note in a cache's layers that a batch `[rows, tokens, hidden]` has been added."""
    rows, tokens = batch.shape[:2]
    numbers = torch.arange(rows, device=batch.device).view(rows, 1, 1, 1)
    layers: list[Any] = cache.layers[cut.start : cut.stop]
    static = type(layers[0]) in _STATIC
    # transformers makes the masks of a static cache by the tokens in its first layer of each type.
    for layer in {type(layer): layer for layer in reversed(layers)}.values() if static else layers[:1]:
        layer.update(numbers.expand(-1, -1, tokens, -1), numbers.expand(-1, -1, tokens, -1))
        if static:
            layer.keys.copy_(numbers)
        else:
            layer.keys = layer.values = numbers.expand(-1, -1, layer.keys.shape[-2], -1)


def note_untracked(cache: Cache, cut: Cut, batch: torch.Tensor) -> None:
    """Note that a batch went through the trunk with gradients, which keeps no keys and values then: no later forward
    may use this cache. Raises `ModelError` for a cache with tokens."""
    trunk_cache_of(cache, cut)
    length, _ = edit_of(cache, cut)
    if length:
        raise ModelError(
            f"gradients do not pass the keys and values of {length} tokens that the trunk keeps: use torch.no_grad(), "
            "or a forward of all tokens with use_cache=False"
        )
    setattr(cache.layers[cut.start], TRUNK_CACHE, None)
    note_forward(cache, cut, batch)
