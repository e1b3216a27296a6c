"""Check rows and batches against what a daemon takes, before the first step. Knows no socket."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from zsl.errors import ConfigError
from zsl.wire.messages import Limits


def check_limits(
    rows: Any, batch_size: int, limits: Limits, *, key: str, row_tokens: int, virtual_tokens: int, packs: bool
) -> None:
    """Raise `ConfigError` if the longest rows of a data set make a request that the daemon refuses.

    Which rows meet in a batch is drawn, so the longest count; those of a stream have `row_tokens`. `virtual_tokens` are
    in front of each row. A trunk that `packs` gets no padding. `key` is that of `batch_size`. The limit on bytes is the
    limit on tokens in float32, so what keeps to the one keeps to the other.
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
