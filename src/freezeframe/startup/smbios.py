"""SMBIOS 3.2 tables (DMTF DSP0134): what machine a guest believes to be on. Names as Cloud Hypervisor gives them."""

from __future__ import annotations

import struct

from freezeframe.startup import layout

MANUFACTURER = "Cloud Hypervisor"
PRODUCT = "cloud-hypervisor"
BIOS_CHARACTERISTICS_NONE = 1 << 3
VIRTUAL_MACHINE = 1 << 4  # characteristics extension byte 2


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    """A structure: header, formatted part, strings, and the double NUL that ends it."""
    texts = b"".join(text.encode("ascii") + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


def build(address: int = layout.SMBIOS) -> bytes:
    """Entry point and structures (type 0 firmware, 1 system, 127 end) as one block for guest address `address`."""
    firmware = struct.pack(
        "<BBHBBQBBBBBBH", 1, 2, 0, 0, 0, BIOS_CHARACTERISTICS_NONE, 0, VIRTUAL_MACHINE, 0xFF, 0xFF, 0xFF, 0xFF, 0
    )
    system = struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), 6, 0, 0)
    structures = (
        _structure(0, 0, firmware, PRODUCT, "0")
        + _structure(1, 1, system, MANUFACTURER, PRODUCT)
        + _structure(127, 2, b"")
    )
    start = address + 32
    entry = bytearray(struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, 24, 3, 2, 0, 1, 0, len(structures), start))
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry).ljust(32, b"\0") + structures
