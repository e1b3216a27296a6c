"""Check rows, batches and adapters against the daemon's limits, before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel

from zsl.client.remote import RemoteTrunk
from zsl.client.trunk_adapters import TrunkAdapters
from zsl.errors import ConfigError, ZslError
from zsl.models.reference import ModelReference
from zsl.split.trunk_lora import slots_of
from zsl.wire.messages import Limits, Welcome


def context_tokens(reference: ModelReference, welcome: Welcome) -> int:
    """Return the largest number of tokens of a text: that of the model, or of the daemon's requests."""
    granted = welcome.limits.max_row_tokens
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    return granted if positions is None else min(granted, int(positions))


def check_limits(
    rows: Any, batch_size: int, limits: Limits, *, key: str, row_tokens: int, virtual_tokens: int, packs: bool
) -> None:
    """Raise `ConfigError` if the longest rows of a data set could form a request that the daemon refuses.

    Batches are drawn at random, so the longest rows are assumed to share one; rows of a stream have `row_tokens`.
    `virtual_tokens` precede each row. A trunk that `packs` is sent no padding. `key` is the name of `batch_size` in
    `[train]`. The byte limit is the token limit in float32, so it needs no check of its own.
    """
    if isinstance(rows, Dataset):
        lengths = np.sort(
            rows.with_format("arrow").data.column("input_ids").combine_chunks().value_lengths().to_numpy()
        )
        longest = lengths[-batch_size:] + virtual_tokens
    else:
        longest = np.full(batch_size, row_tokens + virtual_tokens)
    if longest[-1] > limits.max_row_tokens:
        raise ConfigError(
            f"a row has {longest[-1]:,} tokens, and the daemon takes {limits.max_row_tokens:,} at most: "
            "lower data.max_length"
        )
    tokens = int(longest.sum() if packs else longest[-1] * len(longest))
    if tokens > limits.max_request_tokens:
        raise ConfigError(
            f"a batch of {len(longest):,} rows can have {tokens:,} tokens, and the daemon takes "
            f"{limits.max_request_tokens:,} at once: lower train.{key}"
            + (", and raise train.gradient_accumulation_steps for steps of the same size" if "train" in key else "")
        )


def check_adapters(where: str, model: PeftModel, trunk: RemoteTrunk) -> None:
    """Raise `ConfigError` if the daemon would refuse the adapters on the trunk's layers, or not train them."""
    base: Any = model.get_base_model()
    adapters = TrunkAdapters().find(slots_of(base))
    if adapters is None:
        return
    try:
        adapters.check_limits(trunk.client.welcome.adapters, trunk.adapter_wire_dtype)
    except ZslError as error:
        raise ConfigError(f'{where}: peft.layers = "all" (--adapt): {error}') from error
    if trunk.effective_mode != "exact":
        raise ConfigError(
            f'{where}: peft.layers = "all" (--adapt): in mode {trunk.effective_mode} adapters on the trunk\'s layers '
            'learn nothing: set layers = "client", or train in mode exact, through a daemon that serves backward'
        )
