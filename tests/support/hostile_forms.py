"""All hostile forms, by name, for a daemon without keys and for one with them."""

from __future__ import annotations

from collections.abc import Iterator

from .hostile_adapters import adapters
from .hostile_bytes import before_ready
from .hostile_caches import caches
from .hostile_frames import frames
from .hostile_messages import messages
from .hostile_scene import Form
from .hostile_sessions import sessions


def forms() -> Iterator[Form]:
    for keyed in (False, True):
        acts = {**dict(before_ready(keyed=keyed)), **frames(), **messages(), **sessions(), **adapters(), **caches()}
        for name, act in acts.items():
            yield Form(name, keyed, act)
