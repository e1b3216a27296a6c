"""Adapter versions at the daemon: received in pieces, checked, kept within quotas, and never reached by another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import (
    AdapterError,
    BadShapeError,
    MalformedError,
    NonFiniteError,
    OverloadedError,
    TooLargeError,
    UnknownAdapterError,
    WireError,
)
from zsl.transport.zmtp import aligned_memory
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.adapter import AdapterVersion
from zsl.trunk.requests.adapter_intake import AdapterIntake
from zsl.trunk.sessions.adapter_store import MAX_VERSIONS_PER_SESSION, QUIET_SECONDS, AdapterStore
from zsl.trunk.sessions.sessions import Session, Sessions
from zsl.wire.adapter_layout import AdaptedModule, AdapterLayout, Ia3Module, LoraModule, PrefixLayer, version_of
from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import TO_DAEMON, Adapter, AdapterLimits, FloatDtypeName, Forward, TensorDescriptor, UsedAdapter

ADAPTABLE = {"2.up": (6, 8), "3.down": (8, 6)}
KEY_SIZES = {"2": (2, 4), "3": (2, 4)}
LIMITS = AdapterLimits(max_rank=4, max_bytes=4000)


def module(path: str = "2.up", **changes: object) -> LoraModule:
    inputs, outputs = ADAPTABLE.get(path, (6, 8))
    fields = {"path": path, "inputs": inputs, "outputs": outputs, "rank": 2, "scaling": 2 / 3, "dropout": 0.0}
    return LoraModule(**{**fields, "has_bias": False, "has_magnitude": False, **changes})  # type: ignore[arg-type]


def vector(path: str = "2.up", **changes: object) -> Ia3Module:
    inputs, outputs = ADAPTABLE.get(path, (6, 8))
    return Ia3Module(**{"path": path, "inputs": inputs, "outputs": outputs, "at_input": False, **changes})  # type: ignore[arg-type]


def prefix(path: str, **changes: object) -> PrefixLayer:
    heads, dim = KEY_SIZES.get(path, (2, 4))
    return PrefixLayer(**{"path": path, "rows": 2, "tokens": 3, "heads": heads, "dim": dim, **changes})  # type: ignore[arg-type]


def sessions() -> Sessions:
    ids = count(1)
    return Sessions(
        lease_seconds=60, max_sessions=999, stash_memory_bytes=0, new_id=lambda: next(ids).to_bytes(16, "big")
    )


def tenant(name: str, max_adapter_bytes: int | None = None) -> Tenant:
    return Tenant(name, name.ljust(40, "0"), 1.0, 999, 100, None, max_adapter_bytes)


def version(number: int) -> bytes:
    return number.to_bytes(16, "big")


def adapter(number: int) -> AdapterVersion:
    return AdapterVersion(version(number), AdapterLayout(dtype="f32", modules=(module(),)), "f32", bytearray())


def put(store: AdapterStore, session: Session, number: int, nbytes: int, now: float = 0.0) -> None:
    assert store.reserve(session, version(number), nbytes, now)
    store.complete(session, adapter(number))


def held(store: AdapterStore, session: Session, numbers: Sequence[int]) -> list[int]:
    """Those of these versions that the store has, found without a use of them."""
    return [number for number in numbers if (session.id, version(number)) in store._entries]


class Place:
    """An intake, and messages to it as they come from the wire."""

    def __init__(self, memory_bytes: int = 4000, limits: AdapterLimits | None = LIMITS) -> None:
        self.store = AdapterStore(memory_bytes)
        self.intake = AdapterIntake(self.store, ADAPTABLE, KEY_SIZES, {}, limits)
        self.sessions = sessions()
        self.session = self.sessions.open(b"peer", 0.0)

    def send(self, session: Session, layout: Frame, offset: int, piece: Frame, **changes: object) -> None:
        tensors, frames = [_bytes("weights", len(piece))], [piece]
        if offset == 0:
            tensors, frames = [_bytes("layout", len(layout)), *tensors], [bytes(layout), *frames]
        fields: dict[str, object] = {"session": session.id, "epoch": bytes(16), "request": 1, "dtype": "f32"}
        header = Adapter(**{**fields, "offset": offset, "tensors": tensors, **changes})  # type: ignore[arg-type]
        message = decode(encode(header, frames), TO_DAEMON)
        assert isinstance(message.header, Adapter)
        self.intake.receive(session, message.header, message.buffers, 0.0)

    def upload(
        self,
        modules: Sequence[AdaptedModule] = (module(),),
        *,
        piece_bytes: int = 100,
        weights: np.ndarray | None = None,  # type: ignore[type-arg]
        session: Session | None = None,
        **changes: object,
    ) -> bytes:
        """Send a version in pieces, and return its name."""
        layout = AdapterLayout(dtype="f32", modules=tuple(modules))
        if weights is None:
            weights = np.arange(layout.elements, dtype=np.float32)
        raw, encoded, dtype = weights.tobytes(), layout.encoded(), changes.get("dtype", "f32")
        name = version_of(encoded, dtype, raw)  # type: ignore[arg-type]
        for offset in range(0, len(raw), piece_bytes):
            piece = raw[offset : offset + piece_bytes]
            fields = {"version": name, "nbytes": len(raw), **changes}
            self.send(session or self.session, encoded, offset, piece, **fields)
        return name

    def get(self, name: bytes, session: Session | None = None) -> AdapterVersion:
        header = Forward(
            session=bytes(16),
            epoch=bytes(16),
            request=1,
            attempt=0,
            budget_ms=1,
            keep=False,
            reveal=[],
            cache=None,
            adapter=UsedAdapter(version=name, dropout_seed=None),
            tensors=[_bytes("weights", 1)],
        )
        use = self.intake.use(session or self.session, header, 0.0)
        assert use is not None
        return use.version


def _bytes(role: str, nbytes: int) -> TensorDescriptor:
    return TensorDescriptor(role=role, dtype="u8", shape=(nbytes,), nbytes=nbytes)  # type: ignore[arg-type]


@given(st.integers(1, 300), st.sampled_from([("f32", np.float32), ("f16", np.float16)]))
def test_a_version_in_pieces_is_the_one_that_was_sent(piece_bytes: int, dtype: tuple[FloatDtypeName, type]) -> None:
    place = Place()
    modules: list[AdaptedModule] = [module(), module("3.down", rank=4, has_bias=True), vector(), vector(at_input=True)]
    modules += [prefix("2"), prefix("3")]
    weights = np.arange(sum(one.elements for one in modules), dtype=dtype[1])
    found = place.get(place.upload(modules, piece_bytes=piece_bytes, weights=weights, dtype=dtype[0]))
    assert np.array_equal(np.frombuffer(found.weights, dtype[1]), weights)
    assert found.layout.modules == tuple(modules) and module().scaling == 2 / 3
    assert place.store.nbytes == weights.nbytes + 2 * weights.size * 4
    assert np.frombuffer(found.weights, np.uint8).ctypes.data % 64 == 0


def test_a_version_that_comes_whole_is_not_copied_and_its_layout_is_parsed_once_a_session() -> None:
    place, layout = Place(), AdapterLayout(dtype="f32", modules=(module(),)).encoded()
    of_sessions = []
    for session in (place.session, place.sessions.open(b"another", 0.0)):
        layouts = set()
        for value in (1.0, 2.0):
            piece = aligned_memory(4 * module().elements)
            np.frombuffer(piece, np.float32)[:] = value
            name = version_of(layout, "f32", piece)
            place.send(session, layout, 0, piece, version=name, nbytes=len(piece))
            found = place.get(name, session)
            assert found.weights is piece
            layouts.add(id(found.layout))
        of_sessions.append(layouts)
    mine, others = of_sessions
    assert len(mine) == len(others) == 1 and mine != others


@pytest.mark.parametrize(
    ("modules", "changes", "error"),
    [
        ([module("9.up")], {}, AdapterError),
        ([module(), module("2.up ", rank=1)], {}, AdapterError),
        ([module(inputs=5)], {}, AdapterError),
        ([module(outputs=9)], {}, AdapterError),
        ([module(rank=5)], {}, AdapterError),
        ([vector(), vector("9.up")], {}, AdapterError),
        ([vector(inputs=8)], {}, AdapterError),
        ([prefix("2")], {}, AdapterError),
        ([prefix("2"), prefix("3"), prefix("3")], {}, AdapterError),
        ([prefix("2"), prefix("3"), prefix("4")], {}, AdapterError),
        ([prefix("2"), prefix("3", tokens=4)], {}, AdapterError),
        ([prefix("2"), prefix("3", rows=1)], {}, AdapterError),
        ([prefix("2"), prefix("3", heads=1)], {}, AdapterError),
        ([prefix("2"), prefix("3", dim=5)], {}, AdapterError),
        ([prefix("2"), prefix("03")], {}, AdapterError),
        ([prefix("2", tokens=999), prefix("3", tokens=999)], {}, TooLargeError),
        ([module()], {"nbytes": 100}, BadShapeError),
        ([module()], {"dtype": "f16"}, BadShapeError),
        ([module()] * 40, {}, TooLargeError),
        ([module()], {"version": bytes(16)}, MalformedError),
        ([module()], {"tensors": [_bytes("layout", 3)]}, MalformedError),
    ],
)
def test_a_version_that_does_not_fit_the_trunk_is_refused_by_a_typed_error(
    modules: list[AdaptedModule], changes: dict[str, object], error: type[WireError]
) -> None:
    place = Place(memory_bytes=40_000)
    kept = place.upload()
    with pytest.raises(error):
        place.upload([*modules], piece_bytes=5000, **changes)
    assert len(place.store) == 1 and place.get(kept), "only the new one is refused"


SIZES = b'"path":"2.up","inputs":6,"outputs":8'


@pytest.mark.parametrize(
    "layout",
    [
        *(b"", b"{", b"[]", b'{"dtype":"i8","modules":[]}', b"x" * (5 << 20)),
        *(
            b'{"dtype":"f32","modules":[{%b,%b}]}' % (SIZES, more)
            for more in (
                *(b'"at_input":true', b'"method":"oft","at_input":true', b'"method":"ia3","at_input":1'),
                *(b'"method":"ia3","at_input":true,"rank":2', b'"method":"ia3"', b'"method":"lora","at_input":true'),
            )
        ),
    ],
)
def test_a_layout_that_is_none_is_malformed(layout: bytes) -> None:
    place = Place()
    with pytest.raises(MalformedError):
        place.send(place.session, layout, 0, bytes(112), version=bytes(16), nbytes=112)
    assert len(place.store) == 0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("piece_bytes", [7, 5000])
def test_weights_that_are_not_finite_are_refused(value: float, piece_bytes: int) -> None:
    place, weights = Place(), np.zeros(28, np.float32)
    weights[17] = value
    with pytest.raises(NonFiniteError):
        place.upload(weights=weights, piece_bytes=piece_bytes)
    assert (len(place.store), place.store.nbytes) == (0, 0)


def test_a_daemon_without_adapters_refuses_one() -> None:
    with pytest.raises(AdapterError):
        Place(limits=None).upload()


def test_pieces_out_of_order_or_of_a_displaced_version_make_no_version() -> None:
    place = Place()
    layout = AdapterLayout(dtype="f32", modules=(module(),)).encoded()
    raw = np.zeros(28, np.float32).tobytes()
    name = version_of(layout, "f32", raw)
    fields = {"version": name, "nbytes": len(raw)}
    for offsets in ([16], [0, 32], [0, 16, 16]):
        for offset in offsets:
            place.send(place.session, layout, offset, raw[offset : offset + 16], **fields)
        with pytest.raises(UnknownAdapterError):
            place.get(name)
    place.send(place.session, layout, 0, raw[:16], **fields)
    place.store.drop(place.session, name)
    place.send(place.session, layout, 16, raw[16:], **fields)
    with pytest.raises(UnknownAdapterError):
        place.get(name)
    with pytest.raises(BadShapeError):
        place.send(place.session, layout, 0, raw + raw, **fields)
    place.send(place.session, layout, 0, raw[:16], **fields)
    place.send(place.session, layout, 16, raw[16:], **fields)
    assert place.get(name).version == name, "and then it is sent again, whole"


def test_a_session_uses_no_version_of_another_even_of_the_same_tenant() -> None:
    place = Place()
    alice = tenant("alice")
    one, two = (place.sessions.open(peer, 0.0, tenant=alice) for peer in (b"1", b"2"))
    name = place.upload(session=one)
    for other in (two, place.session):
        with pytest.raises(UnknownAdapterError):
            place.get(name, other)
    place.intake.close(one)
    with pytest.raises(UnknownAdapterError):
        place.get(name, one)
    assert (len(place.store), place.store.nbytes) == (0, 0)


def test_a_session_keeps_a_few_versions_and_the_oldest_leave() -> None:
    store, session = AdapterStore(10_000), sessions().open(b"peer", 0.0)
    numbers = range(MAX_VERSIONS_PER_SESSION + 3)
    for number in numbers:
        put(store, session, number, 10)
    assert held(store, session, numbers) == list(numbers)[3:]


def test_a_version_in_use_stays_and_the_newcomer_is_told_to_wait() -> None:
    store, everyone = AdapterStore(100), sessions()
    one, two = (everyone.open(peer, 0.0) for peer in (b"1", b"2"))
    put(store, one, 1, 60)
    store.begin_request(one, version(1))
    with pytest.raises(OverloadedError) as refused:
        store.reserve(two, version(2), 60, now=2 * QUIET_SECONDS)
    assert refused.value.retry_after_ms > 0
    store.end_request(one, version(1))
    put(store, two, 2, 60, now=2 * QUIET_SECONDS)
    assert held(store, one, [1]) == []


def test_nobody_is_displaced_by_an_owner_that_takes_more() -> None:
    store, everyone = AdapterStore(100), sessions()
    small, large, greedy = (everyone.open(peer, 0.0) for peer in (b"1", b"2", b"3"))
    put(store, small, 1, 20)
    put(store, large, 2, 60)
    with pytest.raises(OverloadedError):
        store.reserve(greedy, version(3), 70, now=1.0)
    put(store, greedy, 3, 50, now=1.0)
    assert (held(store, small, [1]), held(store, large, [2])) == ([1], [])
    put(store, greedy, 4, 90 - 20, now=1.0)
    assert held(store, greedy, [3, 4]) == [4], "its own leaves first"


def test_a_tenant_has_its_quota_over_all_its_sessions() -> None:
    store, everyone = AdapterStore(1000), sessions()
    alice = tenant("alice", max_adapter_bytes=100)
    one, two = (everyone.open(peer, 0.0, tenant=alice) for peer in (b"1", b"2"))
    with pytest.raises(AdapterError):
        store.reserve(one, version(1), 101, 0.0)
    put(store, one, 1, 60)
    put(store, two, 2, 60)
    assert (held(store, one, [1]), held(store, two, [2]), store.nbytes) == ([], [2], 60)


Steps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(1, 60), st.booleans()), max_size=60)


@given(Steps)
def test_the_memory_is_never_exceeded_and_counts_exactly_what_is_kept(
    steps: list[tuple[int, int, int, bool]],
) -> None:
    store, everyone = AdapterStore(100), sessions()
    owners = [None, tenant("a"), tenant("a"), tenant("b", max_adapter_bytes=50), None]
    opened = [everyone.open(bytes([place]), 0.0, tenant=owner) for place, owner in enumerate(owners)]
    for now, (who, number, nbytes, closes) in enumerate(steps):
        session = opened[who]
        if closes and number == 0:
            store.close(session)
            continue
        try:
            if store.reserve(session, version(number), nbytes, float(now)) and closes:
                store.complete(session, adapter(number))
        except (AdapterError, OverloadedError):
            pass
        entries = store._entries
        assert store.nbytes == sum(entry.nbytes for entry in entries.values()) <= 100
        of_b = sum(entry.nbytes for key, entry in entries.items() if key[0] == opened[3].id)
        assert of_b <= 50
        assert sum(entry.adapter is None and key[0] == session.id for key, entry in entries.items()) <= 1
    for session in opened:
        store.close(session)
    assert (store.nbytes, len(store), dict(store._of_owner), store._of_session) == (0, 0, {}, {})
