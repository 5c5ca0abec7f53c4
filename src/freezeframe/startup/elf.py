"""ELF kernels with a PVH note (Xen's docs/misc/pvh.pandoc and hvm/start_info.h): 32-bit protected mode entry."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from freezeframe.errors import Refused
from freezeframe.startup import layout
from freezeframe.startup.entry import Entry

if TYPE_CHECKING:
    from freezeframe._core import Memory
    from freezeframe.startup.files import BootFile

ELF_MAGIC = b"\x7fELF"
PT_LOAD = 1
PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC = 0x336E_C578
NOTE_MAX = 1 << 20
HEADERS_MAX = 128


@dataclass(frozen=True, slots=True)
class Load:
    """A PT_LOAD segment: `size` bytes at `offset` go to `address`, zeros up to `memory`."""

    offset: int
    address: int
    size: int
    memory: int


@dataclass(frozen=True, slots=True)
class ElfImage:
    loads: tuple[Load, ...]
    entry: int
    end: int


def is_elf(file: BootFile) -> bool:
    return file.size >= 52 and file.read(0, 4) == ELF_MAGIC


def _phys32_entry(notes: bytes) -> int | None:
    """The entry address of the Xen note among `notes`."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = at + 12
        content = name + (name_size + 3 & ~3)
        if content + size > len(notes):
            return None
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[name : name + name_size] == b"Xen\0":
            value = notes[content : content + min(size, 8)]
            return int.from_bytes(value, "little") if size in (4, 8) else None
        at = content + (size + 3 & ~3)
    return None


class Complaint(Protocol):
    """Makes the error that says what is wrong with a file."""

    def __call__(self, why: str, /) -> Refused: ...


def parse(file: BootFile) -> ElfImage:
    """Reads an ELF file's headers and notes; raises `Refused` with what is wrong."""

    def bad(why: str) -> Refused:
        return Refused(f"kernel {file.path} is not a bzImage or an ELF kernel with a PVH note: {why}")

    loads, notes, _ = read_headers(file, bad)
    entry = next((found for found in map(_phys32_entry, notes) if found is not None), None)
    if entry is None:
        raise bad("an ELF file without the note XEN_ELFNOTE_PHYS32_ENTRY (a kernel needs CONFIG_PVH=y)")
    lowest = min(load.address for load in loads)
    end = max(load.address + load.memory for load in loads)
    if lowest < layout.HIGH_RAM or end > layout.RAM_32_END:
        raise bad(f"it loads to {lowest:#x}..{end:#x}, outside of 1 MiB..3 GiB")
    if not any(load.address <= entry < load.address + load.memory for load in loads):
        raise bad(f"its entry {entry:#x} is outside of what it loads")
    return ElfImage(loads, entry, end)


def read_headers(file: BootFile, bad: Complaint) -> tuple[tuple[Load, ...], list[bytes], int]:
    """Segments to load (at least one), contents of the notes, and the entry of an ELF file for x86."""
    ident = file.read(0, 16)
    wide = {1: False, 2: True}.get(ident[4])
    if wide is None or ident[5] != 1:
        raise bad("not a little-endian ELF file of 32 or 64 bits")
    if file.size < (64 if wide else 52):
        raise bad("an ELF header that is cut short")
    if wide:
        machine, entry, phoff, phentsize, phnum = struct.unpack("<18xH4xQQ14xHH", file.read(0, 58))
    else:
        machine, entry, phoff, phentsize, phnum = struct.unpack("<18xH4xII10xHH", file.read(0, 46))
    if machine not in (3, 62):
        raise bad(f"an ELF file for machine {machine}, not x86")
    if phnum == 0 or phnum > HEADERS_MAX or phentsize < (56 if wide else 32):
        raise bad(f"{phnum} program headers of {phentsize} bytes")
    if phoff + phnum * phentsize > file.size:
        raise bad("program headers beyond its end")
    table = file.read(phoff, phnum * phentsize)
    loads: list[Load] = []
    notes: list[bytes] = []
    for at in range(0, len(table), phentsize):
        if wide:
            kind, offset, address, size, memory = struct.unpack_from("<I4xQ8xQQQ", table, at)
        else:
            kind, offset, address, size, memory = struct.unpack_from("<II4xIII", table, at)
        if kind not in (PT_LOAD, PT_NOTE) or size == 0 == memory:
            continue
        if offset + size > file.size:
            raise bad(f"it is cut short: a segment ends at byte {offset + size} of {file.size}")
        if kind == PT_NOTE:
            if size <= NOTE_MAX:
                notes.append(file.read(offset, size))
        elif memory < size:
            raise bad(f"a segment of {size} bytes that has room for {memory}")
        else:
            loads.append(Load(offset, address, size, memory))
    if not loads:
        raise bad("an ELF file with nothing to load")
    return tuple(loads), notes, entry


def load(file: BootFile, image: ElfImage, memory: Memory) -> Entry:
    """Copies the segments. RAM is zero already, so what a file does not fill is."""
    for part in image.loads:
        file.copy(memory, part.address, part.offset, part.size)
    return Entry(
        "protected", image.entry, rbx=layout.PVH_START_INFO, note="the kernel is an ELF file, entered by its PVH note"
    )


def write_start_info(
    memory: Memory, e820: list[tuple[int, int, int]], initrd: tuple[int, int] | None, rsdp: int
) -> None:
    """`hvm_start_info` version 1 with module list and memory map."""
    modules = 1 if initrd else 0
    info = struct.pack(
        "<IIIIQQQQII",
        START_MAGIC,
        1,
        0,
        modules,
        layout.PVH_MODLIST if modules else 0,
        layout.CMDLINE,
        rsdp,
        layout.PVH_MEMMAP,
        len(e820),
        0,
    )
    memory.write(layout.PVH_START_INFO, info)
    if initrd:
        memory.write(layout.PVH_MODLIST, struct.pack("<QQQQ", *initrd, 0, 0))
    entries = b"".join(struct.pack("<QQII", address, size, kind, 0) for address, size, kind in e820)
    memory.write(layout.PVH_MEMMAP, entries)
