"""Split learning of Hugging Face models over ZeroMQ: public names, imported when first used.

The large frozen middle of a language model runs on another machine; unmodified PEFT and Trainer on yours get exact
gradients. Lazy imports keep `import zsl` cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsl.adapters.attach import load_adapter as load_adapter
    from zsl.adapters.save import save_adapter as save_adapter
    from zsl.client.aio import AsyncTrunkClient as AsyncTrunkClient
    from zsl.client.model import load_client as load_client
    from zsl.client.remote import RemoteTrunk as RemoteTrunk
    from zsl.client.trunk_client import TrunkClient as TrunkClient
    from zsl.errors import ZslError as ZslError
    from zsl.training.trainer.overlap_mixin import OverlapMixin as OverlapMixin
    from zsl.wire.messages import Cut as Cut

__version__ = "0.1.0"

_HOMES = {
    "AsyncTrunkClient": "zsl.client.aio",
    "Cut": "zsl.wire.messages",
    "OverlapMixin": "zsl.training.trainer.overlap_mixin",
    "RemoteTrunk": "zsl.client.remote",
    "TrunkClient": "zsl.client.trunk_client",
    "ZslError": "zsl.errors",
    "load_adapter": "zsl.adapters.attach",
    "load_client": "zsl.client.model",
    "save_adapter": "zsl.adapters.save",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'zsl' has no attribute {name!r}") from None
    return getattr(import_module(home), name)
