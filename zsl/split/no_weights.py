"""A module whose weights are on the other side, so that none are loaded into it and dropped."""

from __future__ import annotations

from typing import Any

from torch import nn

from zsl.errors import ModelError

MERGE_FIRST = "merge the adapter into the whole model with `zsl merge`, and split that"


class NoWeights(nn.Module):
    """Refuses every weight that `load_state_dict` has for it, also where PEFT calls that with `strict=False`."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = next((name for name in state_dict if name.startswith(prefix)), None)
        if name is not None:
            raise ModelError(
                f"{name} is of a layer that is not in this process, and would be dropped; of an adapter of all layers: "
                f"{MERGE_FIRST}"
            )
