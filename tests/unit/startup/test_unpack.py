from __future__ import annotations

import bz2
import lzma
import struct
import zlib

import pytest

from freezeframe import _core
from freezeframe.errors import Refused
from freezeframe.startup import acpi, bzimage, layout, loader, unpack
from freezeframe.startup.files import BootFile

MIB = 1 << 20
MAP = layout.address_map(256 * MIB, 46)
PLATFORM = acpi.Platform(MAP, (0,), serial=True)
LINKED = 16 * MIB
INIT_SIZE = 4 * MIB
TEXT = struct.pack("<QII", 0xFFFF_FFFF_8100_0008, 0x8100_0000, 0x1000) + b"\xf4" * 5000
KERNEL_MAP = 0xFFFF_FFFF_8000_0000


def words(*addresses):
    return struct.pack(f"<{len(addresses)}I", *(a & 0xFFFF_FFFF for a in addresses))


NEW_TABLE = words(0, 0x81000000, 0, 0x81000008)
OLD_TABLE = words(0, 0x81000000, 0, 0x8100000C, 0, 0x81000008)


def vmlinux(*, text=TEXT, entry=LINKED + 16, address=LINKED, table=NEW_TABLE, memory=2 * MIB, offset=4096, shoff=None):
    end = offset + len(text)
    end += -end % 4
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        b"\x7fELF",
        2,
        1,
        1,
        2,
        62,
        1,
        entry,
        64,
        end if shoff is None else shoff,
        0,
        64,
        56,
        2,
        64,
        1,
        0,
    )
    head += struct.pack("<IIQQQQQQ", 1, 5, offset, KERNEL_MAP + address, address, len(text), memory, 2 * MIB)
    head += struct.pack("<IIQQQQQQ", 1, 5, offset, 0, address + memory, 16, 4096, 2 * MIB)
    return head.ljust(offset, b"\0") + text.ljust(end - offset, b"\0") + b"S" * 64 + table


def lz4_block(data):
    size = len(data) - 15
    return b"\xf0" + b"\xff" * (size // 255) + bytes([size % 255]) + data


def lz4(data):
    blocks = [lz4_block(data[at : at + 4000]) for at in range(0, len(data) - 100, 4000)]
    blocks[-1] = lz4_block(data[4000 * (len(blocks) - 1) :])
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def zstd(data):
    """One frame of one raw block, with its size (RFC 8878)."""
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(data)) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def gzip(data):
    packer = zlib.compressobj(wbits=31)
    return (packer.compress(data) + packer.flush())[:-4]  # its last word is the size already


PACKERS = {
    "gzip": gzip,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4,
    "zstd": zstd,
}


def bzimage_of(packed, size, *, xloadflags=1, init_size=INIT_SIZE, relocatable=1):
    head = bytearray(0x400)
    head[0x1F1] = 1
    payload = b"\x90" * 0x300 + packed + struct.pack("<I", size)
    struct.pack_into("<I", head, 0x1F4, (len(payload) + 15) // 16)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x200:0x202] = b"\xeb\x66"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    head[0x211] = 1
    struct.pack_into("<I", head, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<IBBH", head, 0x230, 2 * MIB, relocatable, 21, xloadflags)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<IIQI", head, 0x248, 0x300, len(packed) + 4, 0, 0)
    struct.pack_into("<QI", head, 0x258, LINKED, init_size)
    return bytes(head) + payload


@pytest.fixture
def boot(tmp_path):
    def run(kernel, *, cmdline="console=hvc0", initramfs=None):
        path = tmp_path / "kernel"
        path.write_bytes(kernel)
        disk = None
        if initramfs is not None:
            disk = tmp_path / "initramfs"
            disk.write_bytes(initramfs)
        ram = _core.Memory(MAP.regions)
        return loader.load(ram, path, disk, cmdline, PLATFORM), ram

    return run


@pytest.mark.parametrize("name", PACKERS)
def test_every_compression_gives_the_kernel_at_its_place(boot, name):
    data = vmlinux()
    entry, ram = boot(bzimage_of(PACKERS[name](data), len(data)), cmdline="nokaslr")
    assert (entry.mode, entry.rip, entry.rsi) == ("long", LINKED + 16, layout.ZERO_PAGE)
    assert ram.read(LINKED, len(TEXT)) == TEXT
    assert ram.read(LINKED + len(TEXT), 2 * MIB - len(TEXT)) == bytes(2 * MIB - len(TEXT))
    assert ram.read(LINKED + 2 * MIB, 16) == TEXT[:16]
    assert ram.read(layout.ZERO_PAGE + 0x211, 1) == b"\1"
    assert "unpacked" in entry.note


@pytest.mark.parametrize("table", [NEW_TABLE, OLD_TABLE])
def test_a_random_place(boot, table, monkeypatch):
    numbers = iter([3, 5])
    monkeypatch.setattr(unpack, "_below", lambda count: next(numbers) % count)
    data = vmlinux(table=table)
    entry, ram = boot(bzimage_of(lz4(data), len(data)))
    shift, physical = 3 * 2 * MIB, LINKED + 5 * 2 * MIB
    assert entry.rip == physical + 16
    wide, low, inverse = struct.unpack("<QII", ram.read(physical, 16))
    assert wide == 0xFFFF_FFFF_8100_0008 + shift
    assert low == 0x8100_0000 + shift
    assert inverse == (0x1000 - shift & 0xFFFF_FFFF if table is OLD_TABLE else 0x1000)
    assert ram.read(layout.ZERO_PAGE + 0x211, 1) == b"\3"
    assert ram.read(LINKED, 16) == bytes(16)


def image_of(tmp_path, **kwargs):
    data = vmlinux()
    path = tmp_path / "kernel"
    path.write_bytes(bzimage_of(lz4(data), len(data), **kwargs))
    with BootFile("kernel", path) as file:
        image = bzimage.parse(file)
        kernel = unpack.unpack(file, image)
    assert isinstance(kernel, unpack.Vmlinux)
    return image, kernel


def test_random_places_are_free_aligned_and_all_of_them(tmp_path):
    image, kernel = image_of(tmp_path)
    free = ((MIB, 24 * MIB), (25 * MIB, 32 * MIB))
    places = {unpack.choose(image, kernel, free, "quiet") for _ in range(2000)}
    assert {place.physical for place in places} == {n * MIB for n in (16, 18, 20, 26, 28)}
    assert all(place.shift % (2 * MIB) == 0 for place in places)
    assert all(LINKED + place.shift + INIT_SIZE <= 1 << 30 for place in places)
    assert len({place.shift for place in places}) > 400


@pytest.mark.parametrize("word", ["mem=100M", "memmap=1M$2M", "movable_node"])
def test_with_other_memory_than_the_map_has_it_stays_where_it_was_linked(tmp_path, word):
    image, kernel = image_of(tmp_path)
    places = {unpack.choose(image, kernel, ((MIB, 256 * MIB),), f"a {word} b") for _ in range(50)}
    assert {place.physical for place in places} == {LINKED}
    assert len({place.shift for place in places}) > 10


def test_a_kernel_that_must_not_move_does_not(tmp_path):
    image, kernel = image_of(tmp_path, relocatable=0)
    assert unpack.choose(image, kernel, ((MIB, 256 * MIB),), "") == unpack.Place(LINKED, 0, random=False)


def test_it_never_lies_in_the_ramdisk(boot):
    data = vmlinux()
    kernel = bzimage_of(lz4(data), len(data))
    for _ in range(3):
        entry, ram = boot(kernel, initramfs=b"r" * (220 * MIB))
        address, size = struct.unpack("<II", ram.read(layout.ZERO_PAGE + 0x218, 8))
        assert entry.rip - 16 + INIT_SIZE <= address or entry.rip >= address + size


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (bzimage_of(b"\x89LZO" + bytes(64), 4096), "compression is not known"),
        (bzimage_of(b"", 0), "where the packed kernel is"),
        (bzimage_of(lz4(b"x" * 5000), 5000), "not an ELF file"),
        (bzimage_of(lz4(vmlinux(entry=LINKED - 16)), len(vmlinux())), "its entry"),
        (bzimage_of(lz4(vmlinux(address=LINKED - 2 * MIB)), len(vmlinux())), "its segments"),
        (bzimage_of(lz4(vmlinux(memory=5 * MIB)), len(vmlinux())), "its segments"),
        (bzimage_of(lz4(vmlinux(shoff=0)), len(vmlinux())), "where it ends"),
        (bzimage_of(lz4(vmlinux(shoff=1 << 60)), len(vmlinux())), "where it ends"),
        (bzimage_of(lz4(vmlinux(table=words(1, 2, 0))), len(vmlinux(table=words(1, 2, 0)))), "relocations"),
        (bzimage_of(lz4(vmlinux()), len(vmlinux()), xloadflags=0), "no 64-bit entry"),
    ],
)
def test_what_is_not_understood_is_left_to_the_guest(boot, kernel, words):
    entry, ram = boot(kernel)
    assert words in entry.note
    assert entry.rip in (0x100000, 0x100200)
    assert ram.read(0x100000, 4) == b"\x90" * 4


@pytest.mark.parametrize("name", PACKERS)
def test_a_damaged_kernel_is_refused(boot, name):
    data = vmlinux()
    packed = PACKERS[name](data)
    wrong = {
        "size": (packed, len(data) + 1 if name != "gzip" else len(data) - 1),
        "cut": (packed[: len(packed) // 2], len(data)),
        "too large": (packed, INIT_SIZE + 1),
    }
    for packed_, size in wrong.values():
        with pytest.raises(Refused, match="is damaged"):
            boot(bzimage_of(packed_, size))


def test_a_relocation_outside_of_the_kernel_is_refused(boot, monkeypatch):
    monkeypatch.setattr(unpack, "_below", lambda count: 1 % count)
    data = vmlinux(table=words(0, 0x81400000, 0))
    with pytest.raises(Refused, match="relocation"):
        boot(bzimage_of(lz4(data), len(data)))


def test_the_variable(boot, monkeypatch):
    data = vmlinux()
    kernel = bzimage_of(lz4(data), len(data))
    monkeypatch.setenv(loader.UNPACK_VARIABLE, "guest")
    assert boot(kernel)[0].rip == 0x100200
    monkeypatch.setenv(loader.UNPACK_VARIABLE, "moon")
    with pytest.raises(Refused, match="host or guest"):
        boot(kernel)


def test_lz4_never_writes_or_reads_beyond():
    for data in (
        b"",
        b"\1",
        b"\4\0\0\0",
        b"\xff\xff\xff\xff" + bytes(20),
        b"\0\0\0\0" * 9,
        struct.pack("<I", 5) + b"\x10a\1\0\0",
    ):
        with pytest.raises(ValueError, match=r".+"):
            _core.unpack_lz4(data, 100)
    assert _core.unpack_lz4(struct.pack("<I", 4) + b"\x30abc", 3) == b"abc"
