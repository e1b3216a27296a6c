"""`tenants.toml`: what it may say, what is said of a mistake in it, and that a broken one changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq

from zsl.errors import ConfigError
from zsl.text.byte_size import parse_size
from zsl.trunk.access.tenants import Allowlist, Tenant, read_tenants

ALICE_KEY, BOB_KEY = (zmq.curve_keypair()[0].decode() for _ in range(2))
ALICE = f'[tenants.alice]\npublic_key = "{ALICE_KEY}"\n'
BOB = f'[tenants.bob]\npublic_key = "{BOB_KEY}"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.toml"


def test_a_key_is_enough_and_the_rest_has_defaults(file: Path) -> None:
    file.write_text(ALICE + BOB)
    tenants = read_tenants(file)
    assert len(tenants) == 2
    assert tenants[ALICE_KEY] == Tenant("alice", ALICE_KEY, 1.0, 64, 2 << 30, None)
    assert tenants[BOB_KEY] == Tenant("bob", BOB_KEY, 1.0, 64, 2 << 30, None)


def test_a_file_that_begins_with_a_byte_order_mark_is_read(file: Path) -> None:
    file.write_text(ALICE, encoding="utf-8-sig")
    assert ALICE_KEY in read_tenants(file)


def test_quotas_are_numbers_or_sizes(file: Path) -> None:
    file.write_text(
        ALICE
        + 'weight = 2\nmax_sessions = 1\nmax_inflight_bytes = "1.5GiB"\nmax_stash_bytes = 0\n'
        + BOB
        + 'weight = 0.5\nmax_inflight_bytes = 1000\nmax_stash_bytes = "500 MB"\n'
    )
    tenants = read_tenants(file)
    assert tenants[ALICE_KEY] == Tenant("alice", ALICE_KEY, 2.0, 1, 3 << 29, 0)
    assert tenants[BOB_KEY] == Tenant("bob", BOB_KEY, 0.5, 64, 1000, 500_000_000)


MISTAKES = {
    "": "no tenants",
    "# nothing yet\n": "no tenants",
    "[tenants]\n": "no tenants",
    "[tenant.alice]\n": "unknown key tenant; did you mean tenants?",
    "tenants = 3\n": "tenants is a table: write [tenants.NAME]",
    "[tenants]\nalice = 3\n": "tenants.alice is a table: write [tenants.NAME]",
    "[tenants.alice]\nweight = 1\n": "tenants.alice.public_key is missing",
    "[tenants.alice]\npublic_key = 3\n": "tenants.alice.public_key: ",
    '[tenants.alice]\npublic_key = "alice.key"\n': "tenants.alice.public_key: ",
    ALICE.replace("alice", '"a b"'): "64 letters",
    ALICE + BOB.replace(BOB_KEY, ALICE_KEY): "tenants.bob.public_key is that of tenants.alice",
    ALICE + ALICE: "TOML",
    ALICE[:-10]: "TOML",
    ALICE + "weigth = 1\n": "tenants.alice.weigth; did you mean tenants.alice.weight?",
    ALICE + "zzz = 1\n": "tenants.alice.zzz",
    ALICE + "weight = 0\n": "tenants.alice.weight: ",
    ALICE + "weight = -1\n": "tenants.alice.weight: ",
    ALICE + "weight = nan\n": "tenants.alice.weight: ",
    ALICE + "weight = inf\n": "tenants.alice.weight: ",
    ALICE + "weight = true\n": "tenants.alice.weight: ",
    ALICE + 'weight = "2"\n': "tenants.alice.weight: ",
    ALICE + "max_sessions = 0\n": "tenants.alice.max_sessions: ",
    ALICE + "max_sessions = true\n": "tenants.alice.max_sessions: ",
    ALICE + "max_inflight_bytes = 0\n": "tenants.alice.max_inflight_bytes: ",
    ALICE + "max_inflight_bytes = 1.5\n": "tenants.alice.max_inflight_bytes: ",
    ALICE + 'max_inflight_bytes = "2 pounds"\n': "tenants.alice.max_inflight_bytes: '2 pounds'",
    ALICE + "max_stash_bytes = -1\n": "tenants.alice.max_stash_bytes: ",
    ALICE + "max_stash_bytes = [1]\n": "tenants.alice.max_stash_bytes: ",
}


@pytest.mark.parametrize(("text", "words"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_a_mistake_is_told_with_file_table_and_key(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_tenants(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*\[tenants\.NAME\]"):
        Allowlist(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="TOML"):
        Allowlist(file)


DEEP = {
    "lists": "x = " + "[" * 5000 + "]" * 5000,
    "tables": "[" + ".".join(["a"] * 5000) + "]",
    "number": "x = " + "9" * 5000,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_a_file_that_only_a_machine_would_write_is_told_as_one_that_is_not_valid(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match="TOML") as caught:
        read_tenants(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < 500


def test_only_a_regular_file_of_a_bounded_size_is_read(file: Path) -> None:
    os.mkfifo(file)  # which nobody writes to: reading it would never end
    with pytest.raises(ConfigError, match="regular file"):
        read_tenants(file)
    for place in (Path("/dev/zero"), file.parent):
        with pytest.raises(ConfigError, match=f"{place}.*(regular file|directory)"):
            read_tenants(place)
    file.unlink()
    with file.open("wb") as large:
        large.truncate(1 << 40)
    with pytest.raises(ConfigError, match="1,048,576 bytes"):
        read_tenants(file)


def test_a_file_that_is_written_to_while_it_is_read_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(ALICE + BOB)
    looked = os.fstat

    def write_more(descriptor: int) -> os.stat_result:
        status = looked(descriptor)
        with file.open("a") as more:
            more.write(BOB)
        return status

    monkeypatch.setattr("zsl.files.small_files.os.fstat", write_more)
    with pytest.raises(ConfigError, match=f"{file} .*rename"):
        read_tenants(file)


def test_the_list_changes_only_when_the_new_file_is_whole(file: Path) -> None:
    file.write_text(ALICE)
    allowlist = Allowlist(file)
    assert allowlist.allows(ALICE_KEY) and not allowlist.allows(BOB_KEY)
    for broken in ("", ALICE + BOB[:-10], ALICE + BOB + "weigth = 1\n", "[tenants]\n"):
        file.write_text(broken)
        with pytest.raises(ConfigError):
            allowlist.reload()
        assert allowlist.allows(ALICE_KEY) and not allowlist.allows(BOB_KEY)
    file.unlink()
    with pytest.raises(ConfigError):
        allowlist.reload()
    assert allowlist.allows(ALICE_KEY)
    file.write_text(BOB + "weight = 2\n")
    allowlist.reload()
    assert not allowlist.allows(ALICE_KEY) and allowlist.allows(BOB_KEY)
    bob = allowlist.by_key(BOB_KEY)
    assert bob is not None and bob.weight == 2.0
    assert allowlist.by_key(ALICE_KEY) is None


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("1024", 1024), ("4GiB", 4 << 30), (" 500 mb ", 500_000_000), ("1.5KiB", 1536), ("64MiB", 64 << 20)],
)
def test_sizes_have_units(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "4 parsecs", "1.2.3", "4GiB x", "٤", "inf", "9" * 30, "9" * 19 + "GiB", "1\n2"]
)
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)
