from __future__ import annotations

import struct

import pytest

from freezeframe import _core
from freezeframe.errors import NotFound, Refused
from freezeframe.startup import acpi, layout, loader

MIB = 1 << 20
MAP = layout.address_map(64 * MIB, 46)
PLATFORM = acpi.Platform(MAP, (0, 1), serial=True)


def bzimage(*, protocol=0x20F, xloadflags=1, payload=b"\x90" * 0x400, init_size=4 * MIB, cmdline=2047, flags=1):
    head = bytearray(0x400)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, (len(payload) + 15) // 16)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x202] = b"\xeb\x66"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    head[0x211] = flags
    struct.pack_into("<I", head, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBH", head, 0x230, 2 * MIB, 1, 21, xloadflags)
    struct.pack_into("<I", head, 0x238, cmdline)
    struct.pack_into("<QI", head, 0x258, 16 * MIB, init_size)
    return bytes(head) + payload


def elf(*, wide=True, entry=0x100010, address=0x100000, code=b"\xf4" * 64, memory=4096, note=True, kind=18):
    body = struct.pack("<III4sI", 4, 4, kind, b"Xen\0", entry)
    headers = 2 if note else 1
    if wide:
        start = 64 + 56 * headers
        out = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, 0, 64, 0, 0, 64, 56, headers, 0, 0, 0)
        out += struct.pack("<IIQQQQQQ", 1, 5, start, 0, address, len(code), memory, 4096)
        if note:
            out += struct.pack("<IIQQQQQQ", 4, 4, start + len(code), 0, 0, len(body), len(body), 4)
    else:
        start = 52 + 32 * headers
        out = struct.pack("<4sBBB9xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 2, 3, 1, 0, 52, 0, 0, 52, 32, headers, 0, 0, 0)
        out += struct.pack("<IIIIIIII", 1, start, 0, address, len(code), memory, 5, 4096)
        if note:
            out += struct.pack("<IIIIIIII", 4, start + len(code), 0, 0, len(body), len(body), 4, 4)
    return out + code + (body if note else b"")


@pytest.fixture
def boot(tmp_path):
    def run(kernel, *, initramfs=None, cmdline="console=ttyS0", memory=None):
        path = tmp_path / "kernel"
        path.write_bytes(kernel)
        disk = None
        if initramfs is not None:
            disk = tmp_path / "initramfs"
            disk.write_bytes(initramfs)
        ram = memory or _core.Memory(MAP.regions)
        return loader.load(ram, path, disk, cmdline, PLATFORM), ram

    return run


def test_bzimage_is_entered_in_long_mode(boot):
    entry, ram = boot(bzimage(), initramfs=b"abc" * 2000)
    assert (entry.mode, entry.rip, entry.rsi) == ("long", 0x100200, 0x7000)
    page = ram.read(0x7000, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert struct.unpack_from("<I", page, 0x228) == (0x20000,)
    address, size = struct.unpack_from("<II", page, 0x218)
    assert size == 6000
    assert address % 4096 == 0
    assert ram.read(address, 6) == b"abcabc"
    assert address + size <= 64 * MIB
    assert struct.unpack_from("<Q", page, 0x70) == (0xA0000,)
    assert page[0x1E8] == 3
    assert struct.unpack_from("<QQI", page, 0x2D0) == (0, 0xA0000, 1)
    assert struct.unpack_from("<QQI", page, 0x2E4) == (MIB, 63 * MIB, 1)
    assert ram.read(0x20000, 14) == b"console=ttyS0\0"
    assert ram.read(0x100000, 4) == b"\x90" * 4
    # PML4 → PDPT → 2 MiB pages
    assert struct.unpack("<Q", ram.read(0xA000, 8)) == (0xB003,)
    assert struct.unpack("<Q", ram.read(0xC008, 8)) == (0x200083,)


def test_bzimage_without_64_bit_entry_is_entered_in_protected_mode(boot):
    entry, _ = boot(bzimage(xloadflags=0))
    assert (entry.mode, entry.rip) == ("protected", 0x100000)


@pytest.mark.parametrize("wide", [True, False])
def test_elf_with_pvh_note(boot, wide):
    entry, ram = boot(elf(wide=wide), initramfs=b"x" * 5000)
    assert (entry.mode, entry.rip, entry.rbx) == ("protected", 0x100010, 0x6000)
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, count, _ = struct.unpack(
        "<IIIIQQQQII", ram.read(0x6000, 56)
    )
    assert (magic, version, modules, modlist) == (0x336EC578, 1, 1, 0x6040)
    assert (cmdline, rsdp, memmap, count) == (0x20000, 0xA0000, 0x7000, 3)
    address, size = struct.unpack("<QQ", ram.read(0x6040, 16))
    assert ram.read(address, size) == b"x" * 5000


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (b"", "neither magic"),
        (b"hello" * 300, "neither magic"),
        (b"\x7fELF", "neither magic"),
        (elf(note=False), "XEN_ELFNOTE_PHYS32_ENTRY"),
        (elf(kind=17), "XEN_ELFNOTE_PHYS32_ENTRY"),
        (elf(address=0x1000, entry=0x1000), "outside of 1 MiB"),
        (elf(address=0xBFFFFFFF), "outside of 1 MiB"),
        (elf(entry=0x9000000), "entry"),
        (elf(memory=8), "has room for"),
        (elf(address=0x5000000, entry=0x5000000), "more memory"),
        (elf()[:100], "beyond its end"),
        (elf()[:190], "cut short"),
        (b"\x7fELF\x02\x02" + bytes(100), "little-endian"),
        (b"\x7fELF\x02\x01\x01" + bytes(100), "machine 0"),
        (bzimage(protocol=0x209), "2.10"),
        (bzimage(flags=0), "zImage"),
        (bzimage()[:0x400], "cut short"),
        (bzimage(payload=b"\0" * 0x300)[:-0x200], "cut short"),
        (bzimage(payload=b"\0" * 64), "64-bit entry"),
        (bzimage(init_size=0xF0000000), "wants memory"),
        (bzimage(init_size=128 * MIB), "more memory"),
    ],
)
def test_malformed_kernels_are_refused_and_change_nothing(boot, kernel, words):
    ram = _core.Memory(MAP.regions)
    with pytest.raises(Refused) as error:
        boot(kernel, memory=ram)
    assert words in str(error.value) or words in (error.value.hint or "")
    assert ram.read(0, 2 * MIB) == bytes(2 * MIB)


@pytest.mark.parametrize("cut", range(0, 0x700, 37))
def test_every_truncation_is_refused_or_loads(boot, cut):
    for kernel in (bzimage(), elf()):
        try:
            boot(kernel[:cut])
        except Refused:
            pass


def test_files(tmp_path, boot):
    ram = _core.Memory(MAP.regions)
    with pytest.raises(NotFound, match=r"kernel .*none does not exist"):
        loader.load(ram, tmp_path / "none", None, "", PLATFORM)
    with pytest.raises(Refused, match="is a directory"):
        loader.load(ram, tmp_path, None, "", PLATFORM)
    (tmp_path / "k").write_bytes(bzimage())
    with pytest.raises(NotFound, match=r"initramfs .*none does not exist"):
        loader.load(ram, tmp_path / "k", tmp_path / "none", "", PLATFORM)
    with pytest.raises(Refused, match=r"initramfs .* is empty"):
        boot(bzimage(), initramfs=b"")
    with pytest.raises(Refused, match="do not fit"):
        boot(bzimage(), initramfs=b"x" * (60 * MIB))


@pytest.mark.parametrize(
    ("cmdline", "words"), [("x" * 2048, "at most 2047"), ("a\0b", "NUL"), ("\udcff", "not valid text")]
)
def test_command_lines(boot, cmdline, words):
    with pytest.raises(Refused, match=words):
        boot(bzimage(), cmdline=cmdline)


def test_memory_sizes():
    assert layout.address_map(4 << 30, 46).regions == ((0, 3 << 30), (4 << 30, 1 << 30))
    assert layout.address_map(3 << 30, 46).regions == ((0, 3 << 30),)
    for size in (0, MIB, 16 * MIB + 1, 1 << 46, 1 << 60):
        with pytest.raises(Refused):
            layout.address_map(size, 46)
