from __future__ import annotations

import struct

import pytest

from freezeframe import _core
from freezeframe.errors import Refused
from freezeframe.startup import acpi, layout, multiboot

pytestmark = pytest.mark.unit

MIB = 1 << 20
MAP = layout.address_map(64 * MIB, 46)
PLATFORM = acpi.Platform(MAP, (0,), serial=True)
HEADER = 0x1BADB002


def header(flags=3, *addresses):
    return struct.pack("<III", HEADER, flags, -(HEADER + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def elf(body, *, address=0x10_0000, entry=None, memory=None):
    """A 32-bit ELF file with one segment."""
    head = struct.pack(
        "<4sBBB9xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 2, 3, 1, entry or address, 52, 0, 0, 52, 32, 1, 0, 0, 0
    )
    return head + struct.pack("<IIIIIIII", 1, 84, 0, address, len(body), memory or len(body), 7, 4) + body


@pytest.fixture
def load(tmp_path):
    def run(image, *, module=None, cmdline="a b", pc=False):
        path, disk = tmp_path / "image", tmp_path / "module"
        path.write_bytes(image)
        if module is not None:
            disk.write_bytes(module)
        memory = _core.Memory(MAP.regions)
        start = multiboot.load(memory, path, None if module is None else disk, cmdline, PLATFORM, pc=pc)
        return start, memory

    return run


def words(memory, at, count):
    return struct.unpack(f"<{count}I", memory.read(at, 4 * count))


def text(memory, at):
    return memory.read(at, 256).split(b"\0")[0].decode()


def test_an_elf_image_with_a_module(load, tmp_path):
    body = header() + b"\x90" * 100
    start, memory = load(elf(body, entry=0x10_000C, memory=0x3000), module=b"KEY=1\n")
    assert (start.mode, start.rip, start.rax) == ("protected", 0x10_000C, 0x2BADB002)
    assert memory.read(0x10_0000, len(body)) == body
    info = words(memory, start.rbx, 22)
    assert info[0] == 0x24D
    assert info[1:3] == (640, 63 << 10)
    assert text(memory, info[4]) == f"{tmp_path}/image a b"
    assert info[5] == 1
    first, last, name, _ = words(memory, info[6], 4)
    assert (memory.read(first, last - first), first % 4096) == (b"KEY=1\n", 0)
    assert first >= 0x10_3000
    assert text(memory, name) == f"{tmp_path}/module"
    entries = memory.read(info[12], info[11])
    found = [struct.unpack_from("<IQQI", entries, at) for at in range(0, len(entries), 24)]
    assert found[:2] == [(20, 0, 0xA0000, 1), (20, MIB, 63 * MIB, 1)]
    assert text(memory, info[16]) == "freezeframe"
    assert memory.read(0xE0000, 8) == b"RSD PTR "


def test_an_image_with_addresses_in_its_header(load):
    flat = b"\xcc" * 16 + header(0x10003, 0x20_0010, 0x20_0000, 0x20_0040, 0x20_1000, 0x20_0030) + b"\x90" * 64
    start, memory = load(flat)
    assert start.rip == 0x20_0030
    assert memory.read(0x20_0000, 0x40) == flat[:0x40]
    assert memory.read(0x20_0040, 16) == bytes(16)
    assert words(memory, start.rbx, 7)[5:] == (0, 0)


def test_a_low_image_moves_the_information(load):
    body = header() + bytes(0x8_0000)
    start, _ = load(elf(body, address=0x1_0000, memory=0x9_0000))
    assert start.rbx >= MIB
    start, _ = load(elf(header() + bytes(64), address=0x8000))
    assert start.rbx < 0xA0000


def test_vectors_for_a_pc(load):
    _, memory = load(elf(header() + bytes(16)), pc=True)
    offset, segment = struct.unpack("<HH", memory.read(8 * 4, 4))
    assert memory.read((segment << 4) + offset, 2) == bytes.fromhex("1e50")
    offset, segment = struct.unpack("<HH", memory.read(0x21 * 4, 4))
    assert memory.read((segment << 4) + offset, 1) == b"\xcf"
    _, memory = load(elf(header() + bytes(16)))
    assert memory.read(0, 1024) == bytes(1024)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (elf(bytes(64)), "no multiboot 1 header"),
        (b"", "no multiboot 1 header"),
        (bytes(8192) + header(), "no multiboot 1 header"),
        (elf(header(7) + bytes(64)), "flags 0x4"),
        (header() + bytes(64), "not an ELF file"),
        (header(0x10003), "cut short"),
        (header(0x10003, 0x10_0010, 0x20_0000, 0, 0, 0), "are to be loaded"),
        (header(0x10003, 0x20_0000, 0x20_0000, 0x30_0000, 0, 0x20_0000) + bytes(64), "are to be loaded"),
        (elf(header() + bytes(64), address=0x100), "outside of 4 KiB"),
        (elf(header() + bytes(64), address=0x9_FFF0), "outside of 4 KiB"),
        (elf(header() + bytes(64), entry=0x50_0000), "its entry"),
        (elf(header() + bytes(64), memory=100 * MIB), "needs memory up to"),
    ],
)
def test_what_is_wrong_is_said(load, image, why):
    with pytest.raises(Refused, match=why):
        load(image)


def test_a_command_line_that_is_too_long(load):
    with pytest.raises(Refused, match="command line"):
        load(elf(header() + bytes(64)), cmdline="x" * 0x1_0000)
