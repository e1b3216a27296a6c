"""Hostile forms with adapters in the trunk's layers: layouts, pieces and versions that do not fit, or of others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zsl.wire.adapter_layout import AdaptedModule, AdapterLayout, Ia3Module, LoraModule, PrefixLayer, version_of
from zsl.wire.messages import MessageType, Welcome

from .hostile_scene import Act, Acts, Scene, Victim, backward, forward, packed, tensor
from .hostile_sessions import ROW, answered
from .raw_zmtp import RawPeer

PATH = "2.self_attn.q_proj"  # hidden x hidden, in the trunk of the long battery; a daemon without a model has none
REFUSED = {"BAD_ADAPTER"}
MANY = 300


def adapters() -> Acts:
    """In sessions of one's own, unless a name says otherwise."""

    def layout_of(text: bytes) -> Act:
        return lambda scene: _upload(scene, *scene.opened(), layout=text, codes={"MALFORMED", *REFUSED})

    def module(codes: set[str] = REFUSED, **changes: object) -> Act:
        return lambda scene: _upload(scene, *scene.opened(), codes={*codes, *REFUSED}, module=changes)

    def message(codes: set[str], **changes: object) -> Act:
        return lambda scene: _upload(scene, *scene.opened(), codes={*codes, *REFUSED}, message=changes)

    def norms(codes: set[str], **changes: object) -> Act:
        def act(scene: Scene) -> None:
            peer, welcome = scene.opened()
            _norms(scene, peer, welcome, welcome, codes, **changes)

        return act

    return {
        "a layout of no JSON": layout_of(b"\xff" * 100),
        "a layout of brackets, 3 MB deep": layout_of(b"[" * (3 << 20)),
        "a layout of 3 MB of blanks": layout_of(b" " * (3 << 20)),
        "a layout of 20,000 modules": layout_of(_layout([_module(scene_hidden=32)] * 20_000)),
        "an adapter of an unknown module": module(path="2.self_attn.nothing"),
        "an adapter of a layer outside the cut": module(path="0.self_attn.q_proj"),
        "an adapter of a dunder path": module(path="2.__class__"),
        "an adapter of other features": module(inputs=7),
        "an adapter of rank 2^20": module(rank=2**20),
        "an adapter of rank 0": module({"MALFORMED"}, rank=0),
        "an adapter with a scaling of infinity": layout_of(_layout([_module(32)]).replace(b"2.0", b"1e999")),
        "an adapter with a dropout of 1": module({"MALFORMED"}, dropout=1.0),
        "a magnitude that never comes": module({"BAD_SHAPE"}, has_magnitude=True),
        "a magnitude of 7": layout_of(_layout([_module(32)]).replace(b'magnitude":false', b'magnitude":7')),
        "a magnitude beside a bias": module({"MALFORMED"}, has_magnitude=True, has_bias=True),
        "a magnitude of NaN": lambda scene: _upload(
            scene, *scene.opened(), codes={"NONFINITE", *REFUSED}, module={"has_magnitude": True}, magnitude=np.nan
        ),
        "a magnitude of infinity": lambda scene: _upload(
            scene, *scene.opened(), codes={"NONFINITE", *REFUSED}, module={"has_magnitude": True}, magnitude=np.inf
        ),
        "IA³ of other features": layout_of(_layout([_ia3(inputs=7)])),
        "a prefix of one layer of two": layout_of(_layout([_prefix()])),
        "a prefix of a layer outside the cut": layout_of(_layout([_prefix(), _prefix(path="4")])),
        "a prefix of other heads": layout_of(_layout([_prefix(), _prefix(path="3", heads=5)])),
        "a prefix of unequal lengths": layout_of(_layout([_prefix(), _prefix(path="3", tokens=5)])),
        "a prefix of no tokens": layout_of(_layout([_prefix(tokens=0), _prefix(path="3", tokens=0)])),
        "a prefix of 2^80 numbers": layout_of(_layout([_prefix(rows=2**20, tokens=2**20, heads=2**20, dim=2**20)])),
        "a prefix of no layer": layout_of(_layout([_prefix(path="-1"), _prefix(path="2.self_attn")])),
        "an adapter of an unknown method": layout_of(_layout([_ia3()]).replace(b"ia3", b"oft")),
        "an adapter of 4 GiB that never comes": message({"BAD_SHAPE"}, nbytes=(4 << 30) - 1),
        "an adapter under another digest": message({"MALFORMED"}, version=bytes(16)),
        "a piece from behind": message({"UNKNOWN_ADAPTER", "MALFORMED"}, offset=8),
        "a piece without an offset": message({"MALFORMED"}, offset=-1),
        "an adapter of integers": message({"MALFORMED"}, dtype="i8"),
        "an adapter of NaN": lambda scene: _upload(scene, *scene.opened(), codes={"NONFINITE", *REFUSED}, value=np.nan),
        "first pieces of 300 adapters": _first_pieces,
        "300 versions, one after the other": _versions,
        "a FORWARD with an unknown adapter": _unknown,
        "a BACKWARD with another adapter than its FORWARD": _another,
        "the gradients of no adapter": _gradients_of_none,
        "an adapter in another's session": _of_others,
        "norms of an unknown module": norms(REFUSED, path="2.self_attn.nothing"),
        "norms of a layer outside the cut": norms(REFUSED, path="0.self_attn.q_proj"),
        "norms of a path of 4,000 characters": norms({"MALFORMED"}, path="2." * 2000),
        "norms of a list of paths": norms({"MALFORMED"}, path=[PATH] * 16),
        "norms in another's session": lambda scene: _norms(scene, *scene.opened(), scene.victim, {"UNKNOWN_SESSION"}),
        "norms that nobody reads, 3,000 times": _norms_unread,
    }


def _module(scene_hidden: int, **changes: object) -> LoraModule:
    fields: dict[str, object] = {"path": PATH, "inputs": scene_hidden, "outputs": scene_hidden, "rank": 2}
    fields |= {"scaling": 2.0, "dropout": 0.0, "has_bias": False, "has_magnitude": False}
    return LoraModule.model_construct(**{**fields, **changes})  # type: ignore[arg-type]


def _ia3(**changes: object) -> Ia3Module:
    fields: dict[str, object] = {"path": PATH, "inputs": 32, "outputs": 32, "at_input": True}
    return Ia3Module.model_construct(None, **{**fields, **changes})  # type: ignore[arg-type]


def _prefix(**changes: object) -> PrefixLayer:
    return PrefixLayer.model_construct(None, **{"path": "2", "rows": 1, "tokens": 4, "heads": 2, "dim": 8, **changes})  # type: ignore[arg-type]


def _layout(modules: Sequence[AdaptedModule]) -> bytes:
    return AdapterLayout.model_construct(dtype="f32", modules=tuple(modules)).encoded()


def _pieces(
    welcome: Welcome, layout: bytes, weights: bytes, *, request: int = 1, **changes: object
) -> tuple[bytes, list[bytes]]:
    """The version, and its one ADAPTER message."""
    version = version_of(layout, "f32", weights)
    described = [tensor((len(part),), role, "u8", 1) for role, part in (("layout", layout), ("weights", weights))]
    fields = {
        "session": welcome.session,
        "epoch": welcome.epoch,
        "request": request,
        "version": version,
        "dtype": "f32",
        "offset": 0,
        "nbytes": len(weights),
        "tensors": described,
    }
    return version, packed(MessageType.ADAPTER, {**fields, **changes}, [layout, weights])


def _forward(scene: Scene, welcome: Welcome, version: bytes, request: int, **changes: object) -> list[bytes]:
    adapter = {"version": version, "dropout_seed": None}
    return forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=request, adapter=adapter, **changes)


def _weights(scene: Scene, value: float = 0.0) -> bytes:
    return np.full(4 * scene.place.hidden, value, np.float32).tobytes()


def _upload(
    scene: Scene,
    peer: RawPeer,
    welcome: Welcome,
    *,
    codes: set[str],
    layout: bytes | None = None,
    module: dict[str, object] | None = None,
    message: dict[str, object] | None = None,
    value: float = 0.0,
    magnitude: float | None = None,
) -> None:
    """Send an adapter, and a FORWARD that runs with it; the first answer is an error with one of the codes."""
    encoded = layout or _layout([_module(scene.place.hidden, **(module or {}))])
    weights = _weights(scene, value)
    if magnitude is not None:
        weights += np.full(scene.place.hidden, magnitude, np.float32).tobytes()
    version, piece = _pieces(welcome, encoded, weights, **(message or {}))
    peer.send_message(piece)
    peer.send_message(_forward(scene, welcome, version, 1))
    answered(peer, 1, *codes)


def _first_pieces(scene: Scene) -> None:
    peer, welcome = scene.opened()
    layout, weights = _layout([_module(scene.place.hidden)]), _weights(scene)
    for number in range(MANY):
        version = number.to_bytes(16, "big")
        described = [tensor((len(layout),), "layout", "u8", 1), tensor((1,), "weights", "u8", 1)]
        _, piece = _pieces(welcome, layout, weights, version=version, tensors=described)
        peer.send_message([*piece[:-1], weights[:1]])
    peer.send_message(_forward(scene, welcome, bytes(16), MANY))
    answered(peer, MANY, "UNKNOWN_ADAPTER")


def _versions(scene: Scene) -> None:
    peer, welcome = scene.opened()
    layout = _layout([_module(scene.place.hidden)])
    for number in range(MANY):
        version, piece = _pieces(welcome, layout, _weights(scene, float(number)), request=number)
        peer.send_message(piece)
    peer.send_message(_forward(scene, welcome, version, MANY))
    answered(peer, MANY, None, "UNKNOWN_ADAPTER")


def _unknown(scene: Scene) -> None:
    peer, welcome = scene.opened()
    peer.send_message(_forward(scene, welcome, b"u" * 16, 1))
    answered(peer, 1, "UNKNOWN_ADAPTER")


def _another(scene: Scene) -> None:
    peer, welcome = scene.opened()
    layout, versions = _layout([_module(scene.place.hidden)]), []
    for value in (1.0, 2.0):
        version, piece = _pieces(welcome, layout, _weights(scene, value), request=9)
        versions.append(version)
        peer.send_message(piece)
    peer.send_message(_forward(scene, welcome, versions[0], 1, keep=True))
    answered(peer, 1, None, "UNKNOWN_ADAPTER")
    gradients = [tensor((1, ROW, scene.place.hidden), "gradients")]
    adapter = {"version": versions[1], "dropout_seed": None}
    peer.send_message(backward(welcome, 1, gradients, request=2, adapter=adapter, adapter_gradients=True))
    answered(peer, 2, "MALFORMED", "UNKNOWN_ADAPTER")


def _gradients_of_none(scene: Scene) -> None:
    peer, welcome = scene.opened()
    peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=1, keep=True))
    answered(peer, 1, None)
    gradients = [tensor((1, ROW, scene.place.hidden), "gradients")]
    peer.send_message(backward(welcome, 1, gradients, request=2, adapter_gradients=True))
    answered(peer, 2, "MALFORMED")


def _of_others(scene: Scene) -> None:
    peer, welcome = scene.opened()
    layout = _layout([_module(scene.place.hidden)])
    _, piece = _pieces(welcome, layout, _weights(scene), session=scene.victim.session, request=7)
    peer.send_message(piece)
    answered(peer, 7, "UNKNOWN_SESSION")


def _ask_norms(of: Welcome | Victim, request: int, path: object = PATH) -> list[bytes]:
    fields = {"session": of.session, "epoch": of.epoch, "request": request, "path": path}
    return packed(MessageType.WEIGHT_NORMS, fields)


def _norms(
    scene: Scene, peer: RawPeer, welcome: Welcome, of: Welcome | Victim, codes: set[str], **changes: object
) -> None:
    """Ask for norms in a session; the answer is an error with one of the codes, and the next request has its own."""
    peer.send_message(_ask_norms(of, 1, **changes))
    answered(peer, 1, *codes)
    peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=2))
    answered(peer, 2, None)


def _norms_unread(scene: Scene) -> None:
    peer, welcome = scene.opened()
    for request in range(3000):
        peer.send_message(_ask_norms(welcome, request))
