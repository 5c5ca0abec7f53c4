"""The kernel inside a bzImage, unpacked on the host instead of by the guest's own decompressor.

What a decompressor of Linux does (arch/x86/boot/compressed): unpack an ELF file, put its segments to their places, and
with KASLR choose a random place and add the distance to all words that a table behind the ELF file lists. All of it is
bytes, which the host moves many times faster than a guest on the software engine.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from freezeframe.errors import Refused
from freezeframe.startup.elf import ELF_MAGIC, HEADERS_MAX, PT_LOAD, Load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from freezeframe._core import Memory
    from freezeframe.startup.bzimage import BzImage
    from freezeframe.startup.files import BootFile

KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: virtual address of physical 0 in the kernel's own mapping
KERNEL_IMAGE_SIZE = 1 << 30  # of that mapping, in kernels with KASLR; modules follow
LARGE_PAGE = 2 << 20
XZ_MEMORY_MAX = 256 << 20
PIECE = 4 << 20
# Options that tell the kernel of other memory than the map has: then it must stay where it would be without KASLR.
_OTHER_MEMORY = ("mem=", "memmap=", "efi_fake_mem=", "kho", "crashkernel=", "hugepagesz=", "movable_node")


@dataclass(frozen=True, slots=True)
class Vmlinux:
    """An unpacked kernel: ELF file and relocations. Addresses are those that it was linked for."""

    data: bytes
    loads: tuple[Load, ...]
    entry: int
    moves: tuple[tuple[slice, int, int], ...]
    """Relocations: (where in `data`, width of the words, +1 or -1); none when it was built without KASLR."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a kernel goes: physical address, distance of the virtual addresses from those it was linked for."""

    physical: int
    shift: int
    random: bool


class _LeftToGuest(Exception):
    """Why this kernel is better unpacked by its own code."""


def _gzip(data: bytes, size: int) -> bytes:
    import zlib

    return zlib.decompressobj(wbits=31).decompress(data, size + 1)


def _lzma(data: bytes, size: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(memlimit=XZ_MEMORY_MAX).decompress(data, size + 1)


def _bzip2(data: bytes, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _lz4(data: bytes, size: int) -> bytes:
    from freezeframe._core import unpack_lz4

    return unpack_lz4(data[4:-4], size)


def _zstd(data: bytes, size: int) -> bytes:
    from freezeframe._core import unpack_zstd

    return unpack_zstd(data[:-4], size)


# scripts/Makefile.lib of Linux; LZO is left to the guest. All end with the unpacked size (gzip by itself).
_FORMATS = (
    (b"\x1f\x8b\x08", "gzip", _gzip),
    (b"\xfd7zXZ\0", "XZ", _lzma),
    (b"\x5d\0\0", "LZMA", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x02\x21\x4c\x18", "LZ4", _lz4),
    (b"\x28\xb5\x2f\xfd", "Zstandard", _zstd),
)


def unpack(file: BootFile, image: BzImage) -> Vmlinux | str:
    """The kernel inside `image`, or why it is left to the guest; raises `Refused` when it is damaged."""
    try:
        if not image.entry_64:
            raise _LeftToGuest("it has no 64-bit entry")
        offset, size = image.packed
        if size < 16 or offset + size > image.payload_size:
            raise _LeftToGuest("its header does not say where the packed kernel is")
        packed = file.read(image.payload_offset + offset, size)
        data = _unpacked(file, image, packed)
        loads, entry = _segments(data, image)
        return Vmlinux(data, loads, entry, _relocations(data))
    except _LeftToGuest as error:
        return str(error)


def _unpacked(file: BootFile, image: BzImage, packed: bytes) -> bytes:
    for magic, name, unpacker in _FORMATS:
        if not packed.startswith(magic):
            continue
        (size,) = struct.unpack_from("<I", packed, len(packed) - 4)
        if not 0 < size <= image.init_size:
            raise Refused(f"kernel {file.path} is damaged: {size} bytes unpacked, room for {image.init_size}")
        try:
            data = unpacker(packed, size)
        except Exception as error:  # each library has its own
            raise Refused(
                f"kernel {file.path} is damaged: what it holds packed by {name} cannot be unpacked"
            ) from error
        if len(data) != size:
            raise Refused(f"kernel {file.path} is damaged: it does not unpack to {size} bytes ({name})")
        return data
    raise _LeftToGuest("its compression is not known here")


def _segments(data: bytes, image: BzImage) -> tuple[tuple[Load, ...], int]:
    """PT_LOADs and physical entry of the ELF file at the start of `data`."""
    if len(data) < 64 or data[:4] != ELF_MAGIC or data[4:6] != b"\2\1":
        raise _LeftToGuest("what it unpacks to is not an ELF file of 64 bits")
    machine, entry, phoff, phentsize, phnum = struct.unpack_from("<18xH4xQQ14xHH", data)
    if machine != 62 or not 0 < phnum <= HEADERS_MAX or phentsize != 56 or phoff + phnum * 56 > len(data):
        raise _LeftToGuest("its ELF header is not that of an x86-64 kernel")
    loads: list[Load] = []
    low, high = image.preferred, image.preferred + image.init_size
    for at in range(phoff, phoff + phnum * 56, 56):
        kind, offset, virtual, address, size, memory = struct.unpack_from("<I4xQQQQQ", data, at)
        if kind != PT_LOAD:
            continue
        if offset + size > len(data) or memory < size or address < low or address + memory > high:
            raise _LeftToGuest("its segments are not where its header says")
        # Data of each CPU has virtual addresses from 0.
        if not loads and virtual != KERNEL_MAP + address:
            raise _LeftToGuest("it is not linked as Linux is")
        loads.append(Load(offset, address, size, memory))
    if not any(load.address <= entry < load.address + load.size for load in loads):
        raise _LeftToGuest("its entry is outside of what it loads")
    return tuple(loads), entry


def _relocations(data: bytes) -> tuple[tuple[slice, int, int], ...]:
    """The lists behind the ELF file, each after a zero: 64-bit words; before Linux 6.15 32-bit words that shrink when
    the kernel moves up; 32-bit words.
    """
    shoff, shentsize, shnum = struct.unpack_from("<40xQ10xHH", data)
    end = shoff + shentsize * shnum
    if shoff == 0 or end > len(data) or (len(data) - end) % 4:
        raise _LeftToGuest("its ELF file does not tell where it ends")
    if end == len(data):
        return ()
    starts: list[int] = []
    at = end
    while (at := _zero_word(data, at, end)) >= 0:
        at += 4
        starts.append(at)
    kinds = {3: ((8, 1), (4, -1), (4, 1)), 2: ((8, 1), (4, 1))}.get(len(starts))
    if kinds is None or starts[0] != end + 4:
        raise _LeftToGuest("its relocations are in a form that is not known here")
    ends = [*(start - 4 for start in starts[1:]), len(data)]
    return tuple((slice(a, b), *kind) for a, b, kind in zip(starts, ends, kinds, strict=True))


def _zero_word(data: bytes, at: int, base: int) -> int:
    """Where from `at` on the next word of zeros is, words counted from `base`; -1: nowhere."""
    while (at := data.find(b"\0\0\0\0", at)) >= 0:
        if (at - base) % 4 == 0:
            return at
        at += 1
    return -1


def choose(image: BzImage, kernel: Vmlinux, free: Sequence[tuple[int, int]], cmdline: str) -> Place:
    """A random place as KASLR takes one (arch/x86/boot/compressed/kaslr.c), the linked one without.

    `free`: RAM that nothing else lies in, as (first, last + 1).
    """
    words = cmdline.split()
    fixed = Place(image.preferred, 0, random=False)
    if not kernel.moves or not image.relocatable or image.alignment % LARGE_PAGE or "nokaslr" in words:
        return fixed
    slots = 1 + (KERNEL_IMAGE_SIZE - image.preferred - image.init_size) // image.alignment
    shift = _below(slots) * image.alignment if slots > 1 else 0
    if any(word.startswith(_OTHER_MEMORY) for word in words):
        return Place(image.preferred, shift, random=True)
    places = [
        address
        for first, end in free
        for address in range(
            -(-max(first, image.preferred) // image.alignment) * image.alignment,
            end - image.init_size + 1,
            image.alignment,
        )
    ]
    return Place(places[_below(len(places))] if places else image.preferred, shift, random=True)


def _below(count: int) -> int:
    """A random number below `count`; the bias of 64 bits is nobody's business."""
    return int.from_bytes(os.urandom(8), "little") % count


def load(kernel: Vmlinux, image: BzImage, place: Place, memory: Memory) -> int:
    """Puts the kernel to its place and gives its entry's physical address. RAM is zero already, so `.bss` is."""
    distance = place.physical - image.preferred
    view = memoryview(kernel.data)
    for part in kernel.loads:
        for done in range(0, part.size, PIECE):
            piece = view[part.offset + done : part.offset + min(part.size, done + PIECE)]
            memory.write(part.address + distance + done, piece)
    if place.shift:
        program = (place.physical, image.init_size, KERNEL_MAP + image.preferred)
        for where, width, sign in kernel.moves:
            memory.relocate(program, kernel.data[where], width, sign * place.shift)
    return kernel.entry + distance
