"""Puts a kernel and all that it is told into guest memory. Everything is checked before the first byte is written."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from freezeframe.errors import Refused
from freezeframe.startup import acpi, bzimage, elf, layout, smbios
from freezeframe.startup.entry import Entry, write_tables
from freezeframe.startup.files import BootFile

if TYPE_CHECKING:
    from freezeframe._core import Memory
    from freezeframe.startup.acpi import Platform
    from freezeframe.startup.unpack import Place, Vmlinux

PathLike = str | os.PathLike[str]
UNPACK_VARIABLE = "FREEZEFRAME_UNPACK"


def _check_cmdline(cmdline: str, limit: int) -> bytes:
    try:
        encoded = cmdline.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused("the kernel command line is not valid text") from error
    if b"\0" in encoded:
        raise Refused("the kernel command line contains a NUL character")
    if len(encoded) > limit:
        raise Refused(f"the kernel command line has {len(encoded)} bytes, this kernel takes at most {limit}")
    return encoded + b"\0"


def _place_initramfs(file: BootFile, ram_end: int, top: int, kernel_end: int) -> tuple[int, int]:
    """As high as the kernel allows in the first region, page aligned: (address, size)."""
    address = (min(ram_end, top) - file.size) & -layout.PAGE
    if address < kernel_end:
        raise Refused(
            f"initramfs {file.path} ({file.size} bytes) and the kernel (up to {kernel_end:#x}) do not fit "
            f"into the machine's memory together",
            hint="give the machine more memory",
        )
    return address, file.size


def _unpack(file: BootFile, image: bzimage.BzImage) -> Vmlinux | str:
    """The kernel inside a bzImage, or why the guest unpacks it itself."""
    asked = os.environ.get(UNPACK_VARIABLE) or "host"
    if asked == "guest":
        return f"the variable {UNPACK_VARIABLE} says so"
    if asked != "host":
        raise Refused(f"{UNPACK_VARIABLE} is {asked!r}: host or guest")
    from freezeframe.startup import unpack

    return unpack.unpack(file, image)


def _place(
    image: bzimage.BzImage, kernel: Vmlinux, initrd: tuple[int, int] | None, ram_end: int, cmdline: str
) -> Place:
    from freezeframe.startup import unpack

    first, size = initrd or (ram_end, 0)
    return unpack.choose(image, kernel, ((layout.HIGH_RAM, first), (first + size, ram_end)), cmdline)


def _load_unpacked(kernel: Vmlinux, image: bzimage.BzImage, place: Place, memory: Memory) -> Entry:
    from freezeframe.startup import unpack

    rip = unpack.load(kernel, image, place, memory)
    random = "to a random place" if place.random else "to where it was linked"
    return Entry("long", rip, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK, note=f"the kernel was unpacked {random}")


def load(memory: Memory, kernel: PathLike, initramfs: PathLike | None, cmdline: str, platform: Platform) -> Entry:
    """Loads kernel, ramdisk, command line, boot parameters and ACPI tables into zeroed memory.

    Raises `NotFound`, `IoFailed` or `Refused` naming the file and the reason; then memory is untouched, except for a
    file that could be opened but not be read to its end, or a kernel whose relocations lead out of it.
    """
    with ExitStack() as stack:
        file = stack.enter_context(BootFile("kernel", kernel))
        linux = bzimage.parse(file) if bzimage.is_bzimage(file) else None
        pvh = elf.parse(file) if linux is None and elf.is_elf(file) else None
        if linux is not None:
            text = _check_cmdline(cmdline, min(linux.cmdline_max or 255, layout.CMDLINE_MAX - 1))
            end, top = linux.end, linux.initrd_max + 1
        elif pvh is not None:
            text = _check_cmdline(cmdline, layout.CMDLINE_MAX - 1)
            end, top = pvh.end, layout.RAM_32_END
        else:
            raise Refused(f"kernel {file.path} is not a bzImage or an ELF kernel with a PVH note: it has neither magic")
        ram_end = platform.map.regions[0][1]
        if end > ram_end:
            raise Refused(
                f"kernel {file.path} needs memory up to {end:#x}, the machine has {ram_end:#x}",
                hint="give the machine more memory",
            )
        initrd: tuple[int, int] | None = None
        disk: BootFile | None = None
        if initramfs is not None:
            disk = stack.enter_context(BootFile("initramfs", initramfs))
            if disk.size == 0:
                raise Refused(f"initramfs {disk.path} is empty")
            initrd = _place_initramfs(disk, ram_end, top, end)
        tables = acpi.build(platform)
        if layout.RSDP + len(tables) > layout.SMBIOS:
            raise Refused("the ACPI tables do not fit: too many vCPUs")
        e820 = platform.map.e820()
        unpacked = _unpack(file, linux) if linux else "it is an ELF file"

        moved = False
        if linux is not None and not isinstance(unpacked, str):
            place = _place(linux, unpacked, initrd, ram_end, cmdline)
            entry = _load_unpacked(unpacked, linux, place, memory)
            moved = place.random
        elif linux is not None:
            note = f"the kernel unpacks itself in the guest: {unpacked}"
            entry = replace(bzimage.load(file, linux, memory), note=note)
        elif pvh is not None:
            entry = elf.load(file, pvh, memory)
        else:
            raise AssertionError
        if disk is not None and initrd is not None:
            disk.copy(memory, initrd[0], 0, disk.size)
        memory.write(layout.CMDLINE, text)
        if linux is not None:
            memory.write(layout.ZERO_PAGE, bzimage.zero_page(linux, e820, initrd, layout.RSDP, moved=moved))
        else:
            elf.write_start_info(memory, e820, initrd, layout.RSDP)
        memory.write(layout.RSDP, tables)
        memory.write(layout.SMBIOS, smbios.build())
        memory.write(layout.EBDA_POINTER, struct.pack("<H", layout.RSDP >> 4))
        write_tables(memory, entry)
        return entry
