"""What is kept of a forward for its backward.

Requests that shared a forward keep its graph and the products of its linear layers in common. If they all come
back for one backward, the graph serves them together. If some come without the others, the graph is of no use to
anyone; they take their products along, and the others get theirs in memory of their own. So nobody who stays away
can hold more memory than is counted for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from zsl.trunk.joining import Joined
from zsl.trunk.middle import Graph, Pass
from zsl.trunk.products import Products
from zsl.trunk.work import Keep


@dataclass(slots=True, eq=False)
class Shared:
    """What the requests of one forward keep in common. Members are the requests' places in that pass."""

    joined: Joined
    graph: Graph | None
    _products: Products | None  # of the whole pass
    _own: dict[int, Products] = field(default_factory=dict)  # of members that were left behind

    @property
    def members(self) -> int:
        return len(self.joined.order)

    def products_of(self, member: int) -> Products | None:
        """A member's products, if they are still kept."""
        if member in self._own:
            return self._own[member]
        products = self._products
        return None if products is None else self.joined.split_products(products)[member]

    def part_with(self, leaving: Collection[int]) -> None:
        """Some members have had their backward without the others."""
        self.graph = None
        products, self._products = self._products, None
        if products is not None:
            parts = self.joined.split_products(products)
            self._own = {member: parts[member].copied() for member in range(self.members) if member not in leaving}
        for member in leaving:
            self._own.pop(member, None)

    def drop(self) -> None:
        """Keep nothing: the backwards compute their forward again."""
        self.graph = self._products = None
        self._own = {}


@dataclass(frozen=True, slots=True)
class TorchStash:
    """The inputs of a step, and its part in what its forward keeps."""

    inputs: Pass
    reply_dtype: torch.dtype
    nbytes: int
    keep: Keep = Keep.INPUT
    shared: Shared | None = None
    member: int = 0

    def demoted(self) -> TorchStash | None:
        if self.shared is None:
            return None
        if self.keep is Keep.GRAPH_AND_PRODUCTS:
            self.shared.graph = None
            products = self.shared.products_of(self.member)
            if products is not None:
                return replace(self, keep=Keep.PRODUCTS, nbytes=self.inputs.nbytes + products.nbytes)
        self.drop()
        return replace(self, keep=Keep.INPUT, nbytes=self.inputs.nbytes, shared=None)

    def drop(self) -> None:
        if self.shared is not None:
            self.shared.drop()


def stashes_of(
    joined: Joined,
    parts: list[Pass],
    reply_dtypes: list[torch.dtype],
    keeps: list[Keep],
    graph: Graph | None,
    products: Products | None,
) -> list[TorchStash | None]:
    """What the requests of a forward keep, each as much as it asked for."""
    shared = None if graph is None and products is None else Shared(joined, graph, products)
    all_tokens = sum(joined.sizes)
    stashes: list[TorchStash | None] = []
    for member, (part, dtype, asked) in enumerate(zip(parts, reply_dtypes, keeps, strict=True)):
        share = part.rows * part.tokens / all_tokens
        nbytes, keep = part.nbytes, Keep.INPUT
        if shared is not None and asked.value >= Keep.PRODUCTS.value:
            keep = Keep.PRODUCTS if graph is None else Keep.GRAPH if products is None else Keep.GRAPH_AND_PRODUCTS
            nbytes += round(share * sum(kept.nbytes for kept in (graph, products) if kept is not None))
        own = shared if keep is not Keep.INPUT else None
        stash = TorchStash(part, dtype, nbytes, keep, own, member)
        stashes.append(None if asked is Keep.NOTHING else stash)
    if shared is not None and any(stash is None or stash.shared is None for stash in stashes):
        # Who keeps less takes no part in a common backward.
        shared.part_with([member for member, stash in enumerate(stashes) if stash is None or stash.shared is None])
    return stashes
