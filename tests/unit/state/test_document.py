from __future__ import annotations

import json
from typing import Any

import pytest

from freezeframe import _core
from freezeframe.errors import Damaged, Incompatible, Refused
from freezeframe.state import document as d

pytestmark = pytest.mark.unit

MEMORY = d.MemoryImage(
    regions=(d.RegionImage(file="memory-region-0", address=0, size=65536, chunk_size=65536, stored="AA==", digests=""),)
)


def encode(config: Any = None, state: Any = None) -> bytes:
    return d.encode(
        producer="test", engine="software", config=config or {"a": 1}, state=state or {"b": [True]}, memory=MEMORY
    )


def seal(text: bytes) -> bytes:
    """Seals a document again, as somebody would who edits it on purpose."""
    sealed = text[: text.rindex(b' "seal": "')]
    return sealed + b' "seal": "' + _core.blake3(sealed).hex().encode() + b'"\n}\n'


def test_round_trip() -> None:
    state = {"x": [0, -1, 2**64 - 1, -(2**63), None, True, "ü\U0001f600\u2028\0\x7f"], "": {}, "deep": [[[]]]}
    data = encode(state=state)
    assert data.isascii()
    document = d.decode(data, "vm.json")
    assert document.state == state
    assert document.format.version == 1
    assert document.memory == MEMORY
    assert json.loads(data)["state"] == state


@pytest.mark.parametrize(
    "state",
    [
        {"x": 1.5},
        {"x": float("nan")},
        {"x": 2**64},
        {"x": -(2**63) - 1},
        {"x": (1, 2)},
        {1: 2},
        {"x": b"bytes"},
        {"x": object()},
        {"x": "\udc80"},
    ],
)
def test_what_cannot_be_read_back_is_not_written(state: Any) -> None:
    with pytest.raises(Refused):
        encode(state=state)


def test_deep_nesting_is_not_written() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(Refused):
        encode(state={"x": deep})


def test_every_flipped_bit_is_refused() -> None:
    data = encode()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises((Damaged, Incompatible)):
                d.decode(bytes(flipped), "vm.json")


def test_every_cut_is_refused() -> None:
    data = encode()
    for length in range(len(data)):
        with pytest.raises((Damaged, Incompatible)):
            d.decode(data[:length], "vm.json")
    for more in (b"\n", b"\0", data):
        with pytest.raises(Damaged):
            d.decode(data + more, "vm.json")


def test_a_version_from_the_future_is_named_before_its_seal() -> None:
    data = encode().replace(b'"version": 1,', b'"version": 2,\n  "compression": "none",')
    with pytest.raises(Incompatible, match="version 2, written by test"):
        d.decode(data, "vm.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b' "state": {', b' "extra": 1,\n "state": {'),
        (b' "state": {', b' "state": {},\n "state": {'),
        (b'  "engine": "software"', b'  "engine": "software",\n  "flags": 1'),
        (b'  "engine": "software"', b'  "engine": 1'),
        (b',\n  "engine": "software"', b""),
        (b'"address": 0', b'"address": 0,\n    "flags": 0'),
        (b'"address": 0', b'"address": -1'),
        (b'"address": 0', b'"address": 0.0'),
        (b'"address": 0', b'"address": 18446744073709551616'),
        (b'"address": 0', b'"address": 1e3'),
        (b'"address": 0', b'"address": NaN'),
        (b'"b": [', b'"b": 1, "b": ['),
        (b'"b": [', b'"c": {"x": 1, "x": 1}, "b": ['),
        (b'"b": [', b'"c": 1.0, "b": ['),
        (b'"b": [', b'"c": Infinity, "b": ['),
        (b'"b": [', b'"c": ' + b"[" * 2000 + b"]" * 2000 + b', "b": ['),
        (b'"b": [', b'"c": "\\ud800", "b": ['),
        (b'"b": [', b'"c": "\xff", "b": ['),
        (b' "config": {\n  "a": 1\n }', b' "config": []'),
        (b' "config": {\n  "a": 1\n }', b' "config": null'),
    ],
)
def test_a_sealed_document_is_validated_all_the_same(old: bytes, new: bytes) -> None:
    data = encode()
    assert old in data
    with pytest.raises(Damaged):
        d.decode(seal(data.replace(old, new, 1)), "vm.json")


def test_another_architecture_or_format_is_incompatible() -> None:
    with pytest.raises(Incompatible, match="aarch64"):
        d.decode(seal(encode().replace(b"x86_64", b"aarch64")), "vm.json")
    with pytest.raises(Incompatible, match="something"):
        d.decode(seal(encode().replace(b"freezeframe-snapshot", b"something")), "vm.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"\0" * 5000, b'{\n "format": {\n', b'{"snapshots": {}}', b"[" * 100000])
def test_what_is_no_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        d.decode(data, "vm.json")


def test_too_much_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "DOCUMENT_LIMIT", 100)
    with pytest.raises(Refused, match="can be restored"):
        encode()


@pytest.mark.parametrize("text", ["AAA", "A", "AAAA\n", "AB==", "AAAA====", "****"])
def test_base64_has_one_form(text: str) -> None:
    region = MEMORY.regions[0].replace(stored=text)
    with pytest.raises(ValueError, match="base64"):
        region.tables()
