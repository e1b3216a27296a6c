"""Module without weights, which refuses the other side's weights instead of dropping them."""

from __future__ import annotations

from typing import Any

from torch import nn

from zsl.errors import ModelError

MERGE_FIRST = "merge the adapter into the whole model with `zsl merge`, and split that"


class NoWeights(nn.Module):
    """Module that raises `ModelError` for any weight given to `load_state_dict`, even with PEFT's `strict=False`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = next((name for name in state_dict if name.startswith(prefix)), None)
        if name is not None:
            raise ModelError(
                f"{name} is of a layer that is not in this process, and would be dropped; for an adapter "
                f"of all layers: {MERGE_FIRST}"
            )
