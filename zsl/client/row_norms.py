"""Ask the trunk for the norms of its weights' rows, with which PEFT initializes the magnitudes of DoRA."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from zsl.client.trunk_client import TrunkClient
from zsl.split.ghosts import GhostWeight
from zsl.split.trunk_lora import Slots


class RowNorms:
    """Norms of the rows of the trunk's linear weights, by path within the trunk (`7.mlp.up_proj`).

    PEFT asks module by module, so those of a layer are asked together. They are kept until another layer is asked.
    """

    def __init__(self, client: TrunkClient) -> None:
        self._client = client
        self._of_layer: dict[str, torch.Tensor] = {}

    def of(self, path: str, in_layer: list[str]) -> torch.Tensor:
        """Return the norms `[out]` of a weight, in single precision. `in_layer`: all paths of its layer.

        Raises `ZslError`.
        """
        found = self._of_layer.get(path)
        if found is None:
            self._of_layer = of_layer = dict(zip(in_layer, self._client.weight_norms(in_layer), strict=True))
            found = of_layer[path]
        return found

    def give_to(self, slots: Slots) -> None:
        """Let the ghosts of linear weights in these slots ask for their norms."""
        for index, slot in slots.items():
            in_layer: list[str] = []
            for name, module in slot.named_modules():
                if type(module) in (nn.Linear, Conv1D) and isinstance(module.weight, GhostWeight):
                    path = f"{index}.{name}"
                    in_layer.append(path)
                    module.weight.ask_norms = partial(self.of, path, in_layer)
