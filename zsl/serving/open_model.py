"""Open a split model to use it: connect to its trunk, or start a daemon of its own, and attach adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zsl.adapters.attach import load_adapter
from zsl.client.model import load_client
from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError, ModelError
from zsl.models.reference import ModelReference
from zsl.split.cut import parse_cut
from zsl.training.config.config import TrunkTable
from zsl.training.directory.trained import Trained
from zsl.training.run.limits import context_tokens
from zsl.training.run.open_trunk import check_keys_are_for_a_daemon, open_trunk
from zsl.trunk.daemon.embedded import EmbeddedTrunk
from zsl.wire.messages import Quantization


@dataclass(frozen=True)
class OpenModel:
    """A split model without adapters, and its trunk."""

    reference: ModelReference
    base: PreTrainedModel
    trunk: RemoteTrunk

    @property
    def context_tokens(self) -> int:
        """Largest number of tokens of a text."""
        return context_tokens(self.reference, self.trunk.client.welcome)

    def with_adapter(self, trained: Trained | None) -> Any:
        """Attach an adapter to the model in place, and return the PEFT model; the base if None. Raises `ZslError`."""
        return self.base if trained is None else load_adapter(self.base, self._checked(trained))

    def copies(self, adapters: Mapping[str, Trained]) -> dict[str, Any]:
        """Return a model for each adapter, which share the base weights and the connection. Raises `ZslError`.

        PEFT's `set_adapter` changes the model for all threads; models of their own may generate at once.
        """
        shared = [*self.base.parameters(), *self.base.buffers()]
        models = {}
        for name, trained in adapters.items():
            place = self._checked(trained)
            versions = [tensor._version for tensor in shared]
            adapted = load_adapter(copy.deepcopy(self.base, {id(tensor): tensor for tensor in shared}), place)
            if adapted.active_peft_config.is_prompt_learning or adapted.active_peft_config.is_adaption_prompt:
                raise ModelError(f"{place}: adapters of virtual tokens cannot be served; LoRA, IA³ and their like can")
            if versions != [tensor._version for tensor in shared]:
                raise ModelError(
                    f"{place} has weights of the base model too, which the other models share: merge it with "
                    "`zsl merge`, and serve the result"
                )
            models[name] = adapted.get_base_model()
        return models

    def _checked(self, trained: Trained) -> Path:
        if len(trained.adapters) > 1:
            raise ConfigError(
                f"{', '.join(map(str, trained.adapters))} are several sides of an adapter: join them with `zsl export`"
            )
        (place,) = trained.adapters
        if trained.weights_digest not in (None, self.trunk.client.welcome.model.weights_digest):
            raise ModelError(f"{place} was trained on other weights than those of {self.reference.text}")
        return place


@contextmanager
def open_model(
    reference: ModelReference,
    table: TrunkTable,
    *,
    dtype: str,
    quantize: Quantization | None = None,
    embedded: EmbeddedTrunk | None = None,
) -> Iterator[OpenModel]:
    """Load the client's part of a model, and open its trunk for as long as the context lasts. Raises `ZslError`.

    `embedded`: the trunk of a table without `endpoint`, if it was started already.
    """
    check_keys_are_for_a_daemon(table)
    cut = parse_cut(table.cut) if table.cut else None
    with ExitStack() as stack:
        trunk, _ = open_trunk(table, reference.text, dtype, stack, embedded)
        base = load_client(reference, trunk, cut=cut, dtype=getattr(torch, dtype), quantize=quantize).eval()
        yield OpenModel(reference, base, trunk)
