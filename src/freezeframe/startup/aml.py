"""A small writer of AML, ACPI's byte code (ACPI 6.5, chapter 20). Every function gives one encoded object."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

ZERO = b"\x00"
ONE = b"\x01"
LOCAL0 = b"\x60"
LOCAL1 = b"\x61"


def path(name: str) -> bytes:
    r"""A NameString: `\` or `^` prefixes, segments of up to four letters joined by dots."""
    prefix = name[: len(name) - len(name.lstrip("\\^"))]
    segments = [s.ljust(4, "_").encode("ascii") for s in name[len(prefix) :].split(".")]
    if len(segments) == 1:
        head = b""
    elif len(segments) == 2:
        head = b"\x2e"
    else:
        head = b"\x2f" + bytes([len(segments)])
    return prefix.encode("ascii") + head + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest encoding of a 64-bit constant."""
    if value < 2:
        return bytes([value])
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([opcode]) + value.to_bytes(size, "little")
    raise ValueError(value)


def string(value: str) -> bytes:
    return b"\x0d" + value.encode("ascii") + b"\x00"


def _package(opcode: bytes, body: bytes) -> bytes:
    """`opcode`, PkgLength (which counts itself) and `body`."""
    length = len(body)
    if length + 1 < 0x40:
        return opcode + bytes([length + 1]) + body
    for size in (1, 2, 3):
        total = length + 1 + size
        if total < 1 << (4 + 8 * size):
            lead = bytes([size << 6 | total & 15])
            return opcode + lead + (total >> 4).to_bytes(size, "little") + body
    raise ValueError(length)


def buffer(data: bytes) -> bytes:
    return _package(b"\x11", integer(len(data)) + data)


def package(elements: Iterable[bytes]) -> bytes:
    items = list(elements)
    return _package(b"\x12", bytes([len(items)]) + b"".join(items))


def eisa_id(name: str) -> bytes:
    """`PNP0A08` as the compressed 32-bit integer of a _HID."""
    letters = [ord(c) - 0x40 for c in name[:3]]
    code = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(name[3:], 16)
    return b"\x0c" + code.to_bytes(4, "big")


def name(target: str, value: bytes) -> bytes:
    return b"\x08" + path(target) + value


def device(target: str, *body: bytes) -> bytes:
    return _package(b"\x5b\x82", path(target) + b"".join(body))


def scope(target: str, *body: bytes) -> bytes:
    return _package(b"\x10", path(target) + b"".join(body))


def method(target: str, arguments: int, *body: bytes, serialized: bool = False) -> bytes:
    return _package(b"\x14", path(target) + bytes([arguments | serialized << 3]) + b"".join(body))


def region(target: str, space: int, address: int, size: int) -> bytes:
    """OperationRegion; `space`: 0 system memory, 1 system I/O."""
    return b"\x5b\x80" + path(target) + bytes([space]) + integer(address) + integer(size)


def field(target: str, flags: int, entries: Iterable[tuple[str, int]]) -> bytes:
    """Field; `entries`: (name, bits below 64). `flags`: access type (1 byte) | lock << 4 | update rule << 5."""
    body = b"".join(n.encode("ascii") + bytes([bits]) for n, bits in entries)
    return _package(b"\x5b\x81", path(target) + bytes([flags]) + body)


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def bit_and(left: bytes, right: bytes, target: bytes) -> bytes:
    return b"\x7b" + left + right + target


def equal(left: bytes, right: bytes) -> bytes:
    return b"\x93" + left + right


def if_(condition: bytes, *body: bytes) -> bytes:
    return _package(b"\xa0", condition + b"".join(body))


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def notify(target: str, value: int) -> bytes:
    return b"\x86" + path(target) + integer(value)


def call(target: str, *arguments: bytes) -> bytes:
    return path(target) + b"".join(arguments)


# Resource descriptors (ACPI 6.5, 6.4)


def resources(*descriptors: bytes) -> bytes:
    """A ResourceTemplate: the descriptors and an end tag without checksum."""
    return buffer(b"".join(chain(descriptors, (b"\x79\x00",))))


def io_ports(base: int, length: int, align: int = 1) -> bytes:
    return b"\x47\x01" + base.to_bytes(2, "little") * 2 + bytes([align, length])


def interrupt(number: int, *, edge: bool) -> bytes:
    """Extended interrupt, consumer, active high, exclusive."""
    return b"\x89\x06\x00" + bytes([1 | edge << 1, 1]) + number.to_bytes(4, "little")


def memory32_fixed(base: int, length: int) -> bytes:
    return b"\x86\x09\x00\x01" + base.to_bytes(4, "little") + length.to_bytes(4, "little")


def _space(kind: int, type_flags: int, first: int, last: int, width: int) -> bytes:
    """An address space descriptor: producer, min and max fixed."""
    tag = {2: 0x88, 4: 0x87, 8: 0x8A}[width]
    numbers = (0, first, last, 0, last - first + 1)
    body = bytes([kind, 0x0C, type_flags]) + b"".join(n.to_bytes(width, "little") for n in numbers)
    return bytes([tag]) + len(body).to_bytes(2, "little") + body


def bus_numbers(first: int, last: int) -> bytes:
    return _space(2, 0, first, last, 2)


def io_window(first: int, last: int) -> bytes:
    return _space(1, 3, first, last, 2)


def memory_window(first: int, last: int) -> bytes:
    """Read/write memory that is not cached, 32 or 64 bits by its end."""
    return _space(0, 1, first, last, 4 if last < 1 << 32 else 8)
