"""Linux's boot protocol (Documentation/arch/x86/boot.rst): a bzImage, its zero page, and the two ways in."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from freezeframe.errors import Refused
from freezeframe.startup import layout
from freezeframe.startup.entry import Entry

if TYPE_CHECKING:
    from freezeframe._core import Memory
    from freezeframe.startup.files import BootFile

HEADER = 0x1F1
HEADER_MAGIC = b"HdrS"
PROTOCOL_MIN = 0x020A  # init_size and pref_address: Linux 2.6.31
LOADED_HIGH = 1
KASLR_FLAG = 2  # of loadflags: set by who moves the kernel, for the kernel
XLF_KERNEL_64 = 1
LOADER_UNDEFINED = 0xFF
SECTOR = 512


@dataclass(frozen=True, slots=True)
class BzImage:
    """What the set-up header says, checked. `setup_header` is copied to the zero page as it is."""

    setup_header: bytes
    payload_offset: int
    payload_size: int
    entry_64: bool
    cmdline_max: int  # without NUL
    initrd_max: int  # highest address that a ramdisk may use
    end: int  # first address behind what the kernel needs to unpack itself
    preferred: int  # where it was linked to run
    init_size: int  # memory that it needs from there on, its unpacking included
    alignment: int
    relocatable: bool
    packed: tuple[int, int]  # (offset from the payload, size) of the compressed kernel


def is_bzimage(file: BootFile) -> bool:
    return file.size > 0x206 and file.read(0x202, 4) == HEADER_MAGIC and file.read(0x1FE, 2) == b"\x55\xaa"


def parse(file: BootFile) -> BzImage:
    """Reads the header of a file that `is_bzimage`; raises `Refused` with what is wrong with it."""

    def bad(why: str) -> Refused:
        return Refused(f"kernel {file.path} is not a bzImage that can be booted: {why}")

    if file.size < 2 * SECTOR:
        raise bad("it is cut short")
    head = file.read(0, 2 * SECTOR)
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    if protocol < PROTOCOL_MIN:
        raise bad(f"boot protocol {protocol >> 8}.{protocol & 255:02}, 2.10 (Linux 2.6.31) or newer is needed")
    if not head[0x211] & LOADED_HIGH:
        raise bad("a zImage that loads below 1 MiB")
    header_end = 0x202 + head[0x201]
    if header_end < 0x264 or header_end > 0x290:
        raise bad(f"a set-up header that ends at {header_end:#x}")
    payload = ((head[HEADER] or 4) + 1) * SECTOR
    if file.size <= payload:
        raise bad("it is cut short: nothing behind the set-up code")
    (alignment,) = struct.unpack_from("<I", head, 0x230)
    (cmdline_max,) = struct.unpack_from("<I", head, 0x238)
    (initrd_max,) = struct.unpack_from("<I", head, 0x22C)
    preferred, init_size = struct.unpack_from("<QI", head, 0x258)
    (syssize,) = struct.unpack_from("<I", head, 0x1F4)
    size = file.size - payload
    if syssize and syssize * 16 > size + 15:
        raise bad(f"it is cut short: {size} bytes of {syssize * 16}")
    relocatable = head[0x234]
    if relocatable and (alignment == 0 or alignment & (alignment - 1)):
        raise bad(f"kernel alignment {alignment:#x}")
    # It moves itself to its preferred address, or up to its alignment, and unpacks within init_size from there.
    runtime = max(preferred, layout.HIGH_RAM)
    end = max(runtime + init_size, layout.HIGH_RAM + size)
    if end > layout.RAM_32_END:
        raise bad(f"it wants memory up to {end:#x}")
    (xloadflags,) = struct.unpack_from("<H", head, 0x236)
    entry_64 = protocol >= 0x020C and bool(xloadflags & XLF_KERNEL_64)
    if entry_64 and size < 0x200 + 16:
        raise bad("it is cut short: no 64-bit entry")
    packed_offset, packed_size = struct.unpack_from("<II", head, 0x248)
    return BzImage(
        setup_header=head[HEADER:header_end],
        payload_offset=payload,
        payload_size=size,
        entry_64=entry_64,
        cmdline_max=cmdline_max,
        initrd_max=initrd_max,
        end=end,
        preferred=preferred,
        init_size=init_size,
        alignment=alignment,
        relocatable=bool(relocatable),
        packed=(packed_offset, packed_size),
    )


def load(file: BootFile, image: BzImage, memory: Memory) -> Entry:
    """Copies the protected-mode kernel to 1 MiB."""
    file.copy(memory, layout.HIGH_RAM, image.payload_offset, image.payload_size)
    # 64-bit kernels are entered in long mode, 0x200 behind the 32-bit entry.
    if image.entry_64:
        return Entry("long", layout.HIGH_RAM + 0x200, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK)
    return Entry("protected", layout.HIGH_RAM, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK)


def zero_page(
    image: BzImage, e820: list[tuple[int, int, int]], initrd: tuple[int, int] | None, rsdp: int, *, moved: bool
) -> bytes:
    """`struct boot_params`. `initrd`: (address, size). `moved`: the kernel was unpacked to a random place."""
    page = bytearray(layout.PAGE)
    page[HEADER : HEADER + len(image.setup_header)] = image.setup_header
    page[0x210] = LOADER_UNDEFINED
    page[0x211] = page[0x211] & ~KASLR_FLAG | (KASLR_FLAG if moved else 0)
    struct.pack_into("<I", page, 0x228, layout.CMDLINE)
    if initrd:
        address, size = initrd
        struct.pack_into("<II", page, 0x218, address & 0xFFFF_FFFF, size & 0xFFFF_FFFF)
        struct.pack_into("<II", page, 0x0C0, address >> 32, size >> 32)
    struct.pack_into("<Q", page, 0x070, rsdp)
    page[0x1E8] = len(e820)
    for n, (address, size, kind) in enumerate(e820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * n, address, size, kind)
    return bytes(page)
