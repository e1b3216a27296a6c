"""All hostile forms, by name, for a daemon without keys and for one with them."""

from __future__ import annotations

from collections.abc import Iterator

from .hostile_bytes import before_ready
from .hostile_frames import frames
from .hostile_messages import messages, others_with_keys
from .hostile_scene import Form


def forms() -> Iterator[Form]:
    for keyed in (False, True):
        acts = {**dict(before_ready(keyed=keyed)), **frames(), **messages()}
        if keyed:
            acts.update(others_with_keys())
        for name, act in acts.items():
            yield Form(name, keyed, act)
