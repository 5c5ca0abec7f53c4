"""Multiboot 1 images (GNU's Multiboot specification 0.6.96): ELF files, or flat ones with addresses in their header.

The image is entered in 32-bit protected mode without paging, EAX = the loader's magic, EBX = the information structure.
An initramfs becomes its one module.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from freezeframe.errors import Refused
from freezeframe.startup import acpi, elf, firmware, layout
from freezeframe.startup.entry import Entry, write_tables
from freezeframe.startup.files import BootFile

if TYPE_CHECKING:
    from freezeframe._core import Memory
    from freezeframe.startup.acpi import Platform
    from freezeframe.startup.elf import Load
    from freezeframe.startup.layout import AddressMap

PathLike = str | os.PathLike[str]

HEADER_MAGIC = 0x1BAD_B002
LOADER_MAGIC = 0x2BAD_B002
HEADER_WITHIN = 8192
# What an image may require: modules on page boundaries, the memory map; addresses in the header. No video modes.
PAGE_ALIGN, MEMORY_INFO, ADDRESSES = 1 << 0, 1 << 1, 1 << 16
REQUIRED_MASK = 0xFFFF

# Fields of the information structure that are there (3.3).
HAS_MEMORY, HAS_CMDLINE, HAS_MODULES, HAS_MMAP, HAS_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_SIZE = 88
LOW_RAM_END = layout.RSDP  # ACPI tables begin where a PC's video memory does
# Such programs look for the root pointer where a PC's firmware has it.
RSDP_COPY, RSDP_SIZE = 0xE_0000, 36
FIRST_FREE = layout.PAGE  # page 0 has the interrupt vectors, and becomes a trampoline


@dataclass(frozen=True, slots=True)
class MultibootImage:
    loads: tuple[Load, ...]
    entry: int

    @property
    def end(self) -> int:
        return max(load.address + load.memory for load in self.loads)


def find_header(file: BootFile) -> tuple[int, bytes] | None:
    """Offset and 32 bytes of the header: the first one whose checksum is right."""
    head = file.read(0, min(file.size, HEADER_WITHIN))
    for at in range(0, len(head) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return at, head[at : at + 32]
    return None


def parse(file: BootFile) -> MultibootImage:
    """Reads the headers; raises `Refused` with what is wrong."""

    def bad(why: str) -> Refused:
        return Refused(f"kernel {file.path} cannot be loaded as a multiboot image: {why}")

    found = find_header(file)
    if found is None:
        raise bad("there is no multiboot 1 header in its first 8192 bytes")
    at, header = found
    flags = struct.unpack_from("<I", header, 4)[0]
    unknown = flags & REQUIRED_MASK & ~(PAGE_ALIGN | MEMORY_INFO)
    if unknown:
        raise bad(f"its header requires what this loader does not give (flags {unknown:#x}; 0x4 is a video mode)")
    if flags & ADDRESSES:
        image = _flat(file, at, header, bad)
    elif elf.is_elf(file):
        loads, _, entry = elf.read_headers(file, bad)
        image = MultibootImage(loads, entry)
    else:
        raise bad("it is not an ELF file, and its header has no addresses")
    _check(image, bad)
    return image


def _flat(file: BootFile, at: int, header: bytes, bad: elf.Complaint) -> MultibootImage:
    """The address fields (3.1.3)."""
    if len(header) < 32:
        raise bad("its header is cut short")
    own, start, load_end, bss_end, entry = struct.unpack_from("<5I", header, 12)
    offset = at - (own - start)
    size = (load_end - start) if load_end else file.size - offset
    if own < start or offset < 0 or size <= 0 or offset + size > file.size:
        raise bad(f"its header says that bytes {offset} to {offset + size} of {file.size} are to be loaded")
    memory = max(size, bss_end - start)
    return MultibootImage((elf.Load(offset, start, size, memory),), entry)


def _check(image: MultibootImage, bad: elf.Complaint) -> None:
    for load in image.loads:
        first, last = load.address, load.address + load.memory
        if first < FIRST_FREE or last > layout.RAM_32_END or (first < layout.HIGH_RAM and last > LOW_RAM_END):
            raise bad(f"it loads to {first:#x}..{last:#x}, outside of 4 KiB..640 KiB and 1 MiB..3 GiB")
    if not any(load.address <= image.entry < load.address + load.memory for load in image.loads):
        raise bad(f"its entry {image.entry:#x} is outside of what it loads")


def load(
    memory: Memory, kernel: PathLike, initramfs: PathLike | None, cmdline: str, platform: Platform, *, pc: bool
) -> Entry:
    """Loads image, module and information structure into zeroed memory.

    The command lines are as GRUB gives them: the file's name first. `pc`: whether there are a PIC and a PIT, and so
    interrupt vectors for them. Raises `NotFound`, `IoFailed` or `Refused` naming the file and the reason; then memory
    is untouched, except for a file that could be opened but not be read to its end.
    """
    map_ = platform.map
    with ExitStack() as stack:
        file = stack.enter_context(BootFile("kernel", kernel))
        image = parse(file)
        command = _text(file.path, cmdline)
        disk = None if initramfs is None else stack.enter_context(BootFile("initramfs", initramfs))
        end = max(image.end, layout.HIGH_RAM)
        module: tuple[int, int, bytes] | None = None
        if disk is not None:
            start = end + layout.PAGE - 1 & -layout.PAGE
            end = start + disk.size
            module = (start, end, _text(disk.path, ""))
        info_at, end = _place(image, len(_information(0, command, module, map_)), end)
        ram_end = map_.regions[0][1]
        if end > ram_end:
            raise Refused(
                f"kernel {file.path} needs memory up to {end:#x}, the machine has {ram_end:#x}",
                hint="give the machine more memory",
            )
        tables = acpi.build(platform)
        if layout.RSDP + len(tables) > RSDP_COPY:
            raise Refused("the ACPI tables do not fit: too many vCPUs")
        for part in image.loads:
            file.copy(memory, part.address, part.offset, part.size)
        if disk is not None and module is not None:
            disk.copy(memory, module[0], 0, disk.size)
        memory.write(info_at, _information(info_at, command, module, map_))
        entry = Entry("protected", image.entry, rax=LOADER_MAGIC, rbx=info_at)
        write_tables(memory, entry)
        memory.write(layout.RSDP, tables)
        memory.write(RSDP_COPY, tables[:RSDP_SIZE])
        if pc:
            firmware.write_vectors(memory)
        return entry


def _place(image: MultibootImage, size: int, end: int) -> tuple[int, int]:
    """Where the information goes, and the new end of what is loaded: below 640 KiB if the image leaves room there."""
    low = LOW_RAM_END - size & -layout.PAGE
    free = all(part.address + part.memory <= low or part.address >= LOW_RAM_END for part in image.loads)
    if low >= FIRST_FREE and free:
        return low, end
    high = end + layout.PAGE - 1 & -layout.PAGE
    return high, high + size


def _information(at: int, command: bytes, module: tuple[int, int, bytes] | None, map_: AddressMap) -> bytes:
    """The information structure and all that it points to, for guest address `at`.

    `module`: start, end, command line.
    """
    blob = bytearray(INFO_SIZE)

    def place(data: bytes) -> int:
        blob.extend(bytes(-len(blob) % 4))
        blob.extend(data)
        return at + len(blob) - len(data)

    flags = HAS_MEMORY | HAS_CMDLINE | HAS_MODULES | HAS_MMAP | HAS_NAME
    command_at = place(command)
    name = place(b"freezeframe\0")
    entries = b"".join(struct.pack("<IQQI", 20, base, size, kind) for base, size, kind in map_.e820())
    mmap = place(entries)
    modules = 0
    if module is not None:
        text = place(module[2])
        modules = place(struct.pack("<4I", module[0], module[1], text, 0))
    upper = map_.regions[0][1] - layout.HIGH_RAM >> 10
    struct.pack_into("<III", blob, 0, flags, LOW_RAM_END >> 10, upper)
    struct.pack_into("<III", blob, 16, command_at, int(module is not None), modules)
    struct.pack_into("<II", blob, 44, len(entries), mmap)
    struct.pack_into("<I", blob, 64, name)
    return bytes(blob)


def _text(path: str, arguments: str) -> bytes:
    """A command line: the file's name, then the rest."""
    encoded = os.fsencode(path) + (b" " + os.fsencode(arguments) if arguments else b"")
    if b"\0" in encoded:
        raise Refused("the kernel command line contains a NUL character")
    if len(encoded) >= layout.CMDLINE_MAX:
        limit = layout.CMDLINE_MAX - 1
        raise Refused(f"the kernel command line has {len(encoded)} bytes with the file's name, at most {limit} fit")
    return encoded + b"\0"
