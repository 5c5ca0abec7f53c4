"""The boot CPU's registers at a kernel's entry, and what they need in memory (GDT, page tables)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from freezeframe.startup import layout

if TYPE_CHECKING:
    from freezeframe._core import Memory

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20
CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
SVR_ENABLED = 1 << 8
LVT_EXTINT = 0x700
LVT_NMI = 0x400
PRESENT_WRITE = 0b11
PRESENT_WRITE_LARGE = 0b1000_0011


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the boot CPU starts: `protected` (32-bit, no paging) or `long` (64-bit, 4 GiB mapped one to one)."""

    mode: Literal["protected", "long"]
    rip: int
    rax: int = 0
    rbx: int = 0
    rsi: int = 0
    rsp: int = 0
    note: str = ""  # how the kernel got into memory, a sentence for the log


def _segment(selector: int, type_: int, *, db: int, l: int, s: int = 1, limit: int = 0xFFFF_FFFF) -> dict[str, int]:  # noqa: E741
    return {
        "base": 0,
        "limit": limit,
        "selector": selector,
        "type_": type_,
        "present": 1,
        "dpl": 0,
        "db": db,
        "s": s,
        "l": l,
        "g": int(limit == 0xFFFF_FFFF),
        "avl": 0,
        "unusable": 0,
    }


def _descriptor(segment: dict[str, int]) -> int:
    """A segment descriptor with base 0 (Intel SDM vol. 3, 3.4.5)."""
    limit = segment["limit"] >> 12 if segment["g"] else segment["limit"]
    access = segment["type_"] | segment["s"] << 4 | segment["dpl"] << 5 | segment["present"] << 7
    flags = segment["l"] << 1 | segment["db"] << 2 | segment["g"] << 3
    return limit & 0xFFFF | access << 40 | (limit >> 16) << 48 | flags << 52


def _segments(entry: Entry) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    long = entry.mode == "long"
    code = _segment(CODE_SELECTOR, 11, db=int(not long), l=int(long))
    data = _segment(DATA_SELECTOR, 3, db=1, l=0)
    task = _segment(TSS_SELECTOR, 11, db=0, l=0, s=0, limit=0x67)
    return code, data, task


def write_tables(memory: Memory, entry: Entry) -> None:
    """GDT, and for `long` the page tables."""
    gdt = [0, 0, *(_descriptor(s) for s in _segments(entry)), 0]
    memory.write(layout.BOOT_GDT, struct.pack(f"<{len(gdt)}Q", *gdt))
    if entry.mode == "long":
        memory.write(layout.PML4, struct.pack("<Q", layout.PDPT | PRESENT_WRITE))
        directories = [layout.PAGE_DIRECTORIES + n * layout.PAGE | PRESENT_WRITE for n in range(4)]
        memory.write(layout.PDPT, struct.pack("<4Q", *directories))
        pages = [n << 21 | PRESENT_WRITE_LARGE for n in range(2048)]
        memory.write(layout.PAGE_DIRECTORIES, struct.pack("<2048Q", *pages))


def wire_pic(state: dict[str, Any]) -> None:
    """The boot CPU takes the 8259s' interrupts: virtual wire mode, as firmware leaves it (MP specification 3.6.2.1)."""
    state["lapic"] |= {"svr": SVR_ENABLED | 0xFF, "lvt_lint0": LVT_EXTINT, "lvt_lint1": LVT_NMI}


def apply(state: dict[str, Any], entry: Entry) -> None:
    """Turns the reset state of the boot CPU (`VcpuState` as a dict) into the state at `entry`."""
    code, data, task = _segments(entry)
    registers = dict.fromkeys(state["regs"], 0)
    registers |= {"rip": entry.rip, "rax": entry.rax, "rbx": entry.rbx, "rsi": entry.rsi, "rsp": entry.rsp, "rflags": 2}
    state["regs"] = registers
    system = state["sregs"]
    system |= {"cs": code, "ds": data, "es": data, "fs": data, "gs": data, "ss": data, "tr": task}
    system["gdt"] = {"base": layout.BOOT_GDT, "limit": 6 * 8 - 1}
    system["idt"] = {"base": 0, "limit": 0}
    system["cr0"] = CR0_PE | CR0_ET
    system["cr4"] = 0
    system["efer"] = 0
    if entry.mode == "long":
        system["cr0"] |= CR0_PG
        system["cr3"] = layout.PML4
        system["cr4"] = CR4_PAE
        system["efer"] = EFER_LME | EFER_LMA
    state["mp_state"] = "runnable"
