"""Cost model of a pass: its seconds and memory by tokens, and the batch sizes that follow. Pure.

A pass over frozen weights takes about `fixed + per_token x tokens` seconds. The fixed part, reading the weights and
launching the operations, is paid once for all requests of a merged pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# A batch is large enough when the fixed part is at most this share of it.
SATURATED_SHARE = 0.1
# Merging this many requests is worthwhile if it saves at least this share of their time.
MERGED_REQUESTS = 4
WORTHWHILE_SHARE = 0.1
# Bounds on batch sizes, because measurements on a busy machine can be far off. A batch larger than needed costs
# nothing, and requests of a few tokens gain from merging on every device.
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 256, 4096
MIN_MERGE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds of a pass: `fixed_seconds + seconds_per_token * tokens`."""

    fixed_seconds: float
    seconds_per_token: float

    def seconds(self, tokens: int) -> float:
        return self.fixed_seconds + self.seconds_per_token * tokens

    def __add__(self, other: PassCost) -> PassCost:
        return PassCost(self.fixed_seconds + other.fixed_seconds, self.seconds_per_token + other.seconds_per_token)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a trunk: forward, backward from the kept graph, and backward from the kept outputs of the linear layers
    (`zsl.trunk.compute.linear_outputs`), as in a merged backward.

    `saved_by_shared_decode_seconds`: by each decode step of one token that shares a pass.
    """

    forward: PassCost
    backward: PassCost
    backward_from_linear_outputs: PassCost
    saved_by_shared_decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """Bytes of a graph: `fixed + per_token * tokens + per_pair * sum of squared lengths`."""

    fixed_bytes: float
    bytes_per_token: float
    bytes_per_pair: float  # pairs of tokens of one sequence: attention that keeps its scores

    def nbytes(self, lengths: Sequence[int]) -> int:
        """Return the bytes that the graph of a pass of sequences of these lengths keeps."""
        pairs = sum(length * length for length in lengths)
        return round(self.fixed_bytes + self.bytes_per_token * sum(lengths) + self.bytes_per_pair * pairs)

    def plus(self, bytes_per_token: float) -> GraphMemory:
        """Return this memory with more bytes for each token."""
        return replace(self, bytes_per_token=self.bytes_per_token + bytes_per_token)


def fit_graph_memory(samples: Sequence[tuple[int, int]]) -> GraphMemory:
    """Fit the memory to three `(tokens, bytes)` samples of single sequences, with no negative coefficient."""
    (x0, y0), (x1, y1), (x2, y2) = samples
    slopes = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    per_pair = max((slopes[1] - slopes[0]) / (x2 - x0), 0.0)
    per_token = max((y2 - y0) / (x2 - x0) - per_pair * (x2 + x0), 0.0)
    return GraphMemory(max(y2 - per_token * x2 - per_pair * x2 * x2, 0.0), per_token, per_pair)


def with_room(tokens: int) -> int:
    """Return for how many tokens a cache of `tokens` has memory: from 4 tokens up, at most a quarter more.

    As a text grows, its keys and values are copied each time that this grows: four times while its length doubles.
    """
    step = 1 << max(tokens.bit_length() - 3, 0)
    return (tokens // step + 1) * step


@dataclass(frozen=True, slots=True)
class CacheMemory:
    """Bytes of the keys and values of one token and row, and the window that they are kept for (None: all tokens), by
    layer. `has_room`: layers have memory for more tokens (`with_room`), in which the next ones are appended."""

    layers: tuple[tuple[int, int | None], ...]
    has_room: bool = False

    def nbytes(self, rows: int, tokens: int, new_tokens: int) -> int:
        """Return the bytes of a cache of `tokens`, of which a request has just added `new_tokens`."""
        return rows * sum(self._of_layers(tokens, new_tokens))

    def added_nbytes(self, rows: int, tokens: int, new_tokens: int) -> int:
        """Return the bytes that a request allocates which adds tokens behind all others of a cache, to have `tokens`.

        A layer with a window is counted whole, as it is copied at times.
        """
        in_place = self.has_room and with_room(tokens - new_tokens) == with_room(tokens)
        of_layers = self._of_layers(tokens, new_tokens)
        return rows * sum(
            nbytes
            for nbytes, (_, window) in zip(of_layers, self.layers, strict=True)
            if window is not None or not in_place
        )

    def _of_layers(self, tokens: int, new_tokens: int) -> list[int]:
        kept = [tokens if window is None else min(tokens, window + new_tokens) for _, window in self.layers]
        rooms = [with_room(each) if self.has_room else each for each in kept]
        return [size * room for (size, _), room in zip(self.layers, rooms, strict=True)]


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Peak bytes of a backward computed layer by layer, the least that a request can run in: the memory of one layer,
    and the kept tensors of the input's size, without or with the inputs of all layers."""

    layer: GraphMemory
    kept_bytes_per_token: int
    all_inputs_bytes_per_token: int = 0

    def nbytes(self, lengths: Sequence[int], *, all_inputs: bool = False) -> int:
        """Return the peak bytes of a pass of sequences of these lengths."""
        kept = self.all_inputs_bytes_per_token if all_inputs else self.kept_bytes_per_token
        return self.layer.nbytes(lengths) + kept * sum(lengths)

    def nbytes_of_rows(self, tokens: int, row_tokens: int) -> int:
        """Return the peak bytes of a pass of `tokens` in rows of `row_tokens`, the worst case."""
        rows, rest = divmod(tokens, row_tokens)
        return self.nbytes([*[row_tokens] * rows, *[rest] * bool(rest)])

    def most_tokens(self, nbytes: int, row_tokens: int, *, least: int, most: int) -> int:
        """Return the tokens of the largest request with a peak of at most `nbytes`, between `least` and `most`."""
        while least < most:
            middle = (least + most + 1) // 2
            if self.nbytes_of_rows(middle, row_tokens) <= nbytes:
                least = middle
            else:
                most = middle - 1
        return least


# For a trunk that was not measured: no bound.
UNKNOWN_GRAPH_MEMORY = GraphMemory(0.0, 0.0, 0.0)
UNKNOWN_PASS_MEMORY = PassMemory(UNKNOWN_GRAPH_MEMORY, 0)
# For a trunk that was not measured: fairness needs only the proportions, and no pass is delayed for merging.
UNKNOWN_COSTS = Costs(PassCost(0.0, 1e-3), PassCost(0.0, 1e-3), PassCost(0.0, 1.2e-3))


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """`max_batch_tokens` bounds a merged pass; larger requests than `merge_below_tokens` run alone (0: all)."""

    max_batch_tokens: int = 512
    merge_below_tokens: int = 64


def fit_cost(samples: Sequence[tuple[int, float]]) -> PassCost:
    """Fit a least-squares line to `(tokens, seconds)` samples, with no negative coefficient."""
    mean_x = sum(tokens for tokens, _ in samples) / len(samples)
    mean_y = sum(seconds for _, seconds in samples) / len(samples)
    spread = sum((tokens - mean_x) ** 2 for tokens, _ in samples)
    slope = sum((tokens - mean_x) * (seconds - mean_y) for tokens, seconds in samples) / spread if spread else 0.0
    slope = max(slope, 1e-9)
    return PassCost(max(mean_y - slope * mean_x, 0.0), slope)


def batch_limits(costs: Costs) -> BatchLimits:
    """Choose the batch sizes for a trunk of these costs.

    The budget is the size at which the fixed part is `SATURATED_SHARE` of a forward. The knee is the size up to which
    `MERGED_REQUESTS` equal requests save `WORTHWHILE_SHARE` of the time of their steps by sharing both passes: alone a
    step costs forward + backward; merged, all but one fixed part is saved, but the backward recomputes from the linear
    outputs what a graph would hold. A request over a quarter of the budget always runs alone.
    """
    saturated = costs.forward.fixed_seconds * (1 - SATURATED_SHARE) / SATURATED_SHARE
    budget = min(max(round(saturated / costs.forward.seconds_per_token), MIN_BATCH_TOKENS), MAX_BATCH_TOKENS)
    alone = costs.forward + costs.backward
    merged = costs.forward + costs.backward_from_linear_outputs
    # n alone(t) - merged(n t) = WORTHWHILE_SHARE * n alone(t), solved for t
    keep = MERGED_REQUESTS * (1 - WORTHWHILE_SHARE)
    gain = keep * alone.fixed_seconds - merged.fixed_seconds
    loss_per_token = MERGED_REQUESTS * merged.seconds_per_token - keep * alone.seconds_per_token
    knee = budget if loss_per_token <= 0 else max(int(gain / loss_per_token), 0)
    return BatchLimits(budget, max(min(knee, budget // MERGED_REQUESTS), MIN_MERGE_TOKENS))
