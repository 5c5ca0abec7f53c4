"""What is left of a PC's firmware for programs that return to real mode: interrupt vectors that end what they are for.

The timer's handler counts ticks where a BIOS does (0x46c); nothing else is a BIOS service.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from freezeframe._core import Memory

SEGMENT = 0xF000
BASE = 0xFF000
VECTORS = 256
TIMER, FIRST_PIC, SECOND_PIC, INPUTS = 0x08, 0x08, 0x70, 8

IRET = b"\xcf"
END_FIRST = bytes.fromhex("50 b020 e620 58 cf")  # push ax; mov al, 0x20; out 0x20, al; pop ax; iret
END_BOTH = bytes.fromhex("50 b020 e6a0 e620 58 cf")
# push ds; push ax; xor ax, ax; mov ds, ax; inc dword [0x46c]; mov al, 0x20; out 0x20, al; pop ax; pop ds; iret
COUNT = bytes.fromhex("1e 50 31c0 8ed8 66ff066c04 b020 e620 58 1f cf")


def write_vectors(memory: Memory) -> None:
    """The interrupt vector table at 0 and its handlers at 0xff000; `devices.pic.Pic.cold` has the same vectors."""
    code = bytearray()
    at: dict[bytes, int] = {}
    for handler in (IRET, END_FIRST, END_BOTH, COUNT):
        at[handler] = BASE - (SEGMENT << 4) + len(code)
        code += handler
    vectors = [IRET] * VECTORS
    vectors[FIRST_PIC : FIRST_PIC + INPUTS] = [END_FIRST] * INPUTS
    vectors[SECOND_PIC : SECOND_PIC + INPUTS] = [END_BOTH] * INPUTS
    vectors[TIMER] = COUNT
    memory.write(BASE, bytes(code))
    memory.write(0, b"".join(struct.pack("<HH", at[handler], SEGMENT) for handler in vectors))
