"""Tiny guests, assembled when asked for: ELF images with a PVH entry note (type 18) that any VMM can boot as a kernel.

They need GNU `as` and `ld` for x86-64 (Debian: `binutils`; every machine that can link Rust there has them).
All of them talk on the first serial port (I/O 0x3f8), a line at a time. What begins with `BAD` is a failure, after
which the guest stands. Those that test something from beginning to end print `READY`, a line for each part, `DONE`, and
switch the machine off.

They keep to instructions that KVM runs on every host that we know, also where it interprets the kernel's code: there
protected mode has neither paging nor IRET, while 64-bit mode has both.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile

__all__ = [
    "beat",
    "board",
    "entropy",
    "paging",
    "serial",
    "smp",
    "tick",
    "timers",
    "virtio",
    "work",
    "work_checksum",
]

_SOURCES = os.path.join(os.path.dirname(__file__), "asm")


@functools.cache
def _assemble(name: str, symbols: tuple[tuple[str, int], ...] = ()) -> bytes:
    """The image of `asm/<name>.s` with `symbols` defined. RuntimeError says what the assembler or linker said."""
    with tempfile.TemporaryDirectory(prefix="freezeframe-guest-") as directory:
        obj = os.path.join(directory, "guest.o")
        elf = os.path.join(directory, "guest.elf")
        defined = [part for key, value in symbols for part in ("--defsym", f"{key}={value:#x}")]
        source = os.path.join(_SOURCES, f"{name}.s")
        _run(["as", "--64", "-I", _SOURCES, *defined, "-o", obj, source])
        script = os.path.join(_SOURCES, "guest.ld")
        _run(
            [
                "ld",
                "-m",
                "elf_x86_64",
                "-n",
                "-z",
                "noexecstack",
                "--no-warn-rwx-segments",
                "-T",
                script,
                "-o",
                elf,
                obj,
            ]
        )
        with open(elf, "rb") as file:
            return file.read()


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"`{command[0]}` is needed to assemble the tiny guests: apt install binutils") from None
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def tick(*, base: int = 0x40_0000, size: int = 0x10_0000, spin: int = 0) -> bytes:
    """A guest that never stops counting: `READY`, then `T 1`, `T 2`, …, one line each.

    Before each line it checks and rewrites every doubleword of `size` bytes of RAM at physical address `base`
    (above the image at 1 MiB; both multiples of 4) with a pattern of address and round, and compares its counters in
    registers with those in RAM. On the first difference it prints `BAD <address> is <value> wants <value>`
    or `BAD register` and halts. `spin`: loop turns between lines.
    """
    return _assemble("tick", (("BASE", base), ("SIZE", size), ("SPIN", spin)))


def smp(
    cpus: int = 2, *, x2apic: bool = False, deadline: bool = False, period: int = 1_000_000, iret: bool = True
) -> bytes:
    """A guest that keeps `cpus` (1–64) CPUs and their LAPICs busy: `READY`, `CPUS <n>`, then `T 1`, `T 2`, … for ever.

    The first CPU starts the others by INIT and SIPI. Each CPU has a timer interrupt (periodic, or TSC `deadline`) every
    `period` bus clocks or TSC ticks and halts in between; before each line every other CPU must have answered
    an IPI and a timer interrupt must have come. `BAD …` and a halt on memory that changed, a stopped timer or an
    exception.
    A lost interrupt shows as lines that no longer come. CPU i must have APIC id i. All in 32-bit mode; `iret=False`:
    interrupts are left by POPF, STI and RET.
    """
    symbols = (
        ("CPUS", cpus),
        ("X2APIC", int(x2apic)),
        ("DEADLINE", int(deadline)),
        ("PERIOD", period),
        ("IRET", int(iret)),
    )
    return _assemble("smp", symbols)


def serial(*, received: int = 3000, x2apic: bool = False) -> bytes:
    """Registers of the serial port, and input by its level-triggered interrupt.

    After each of two lines `TYPE` it takes `received` bytes and prints `INPUT <checksum>` (FNV-1a, 8 hex digits); after
    `MASKED` it wants one more.
    """
    return _assemble("serial", (("X2APIC", int(x2apic)), ("INPUT", received)))


def timers(*, x2apic: bool = False) -> bytes:
    """The LAPIC's timer: one-shot, divided, periodic, masked, and by TSC deadline."""
    return _assemble("timers", (("X2APIC", int(x2apic)),))


def paging() -> bytes:
    """Page tables of its own, in 64-bit mode: faults of every cause, remapping, and user code."""
    return _assemble("paging", (("X2APIC", 0),))


def virtio(*, blocks: int = 64, typed: int = 3000, x2apic: bool = False) -> bytes:
    """A virtio block device of `blocks` × 4 KiB and a virtio console, each with MSI-X interrupts.

    Prints `SECTORS <n>` and `DISK <checksum of what was there>` (FNV-1a, 8 hex digits); writes all of it, doubleword i
    becoming i × 0x9e3779b1 ^ 0x5bd1e995, and prints `WRITTEN` and `REQUESTS <n>`. Then 16 lines of 511 equal letters,
    `a` first, on the console; after `TYPE` it takes `typed` bytes from the console and prints `INPUT <n> <checksum>`.
    """
    return _assemble("virtio", (("X2APIC", int(x2apic)), ("BLOCKS", blocks), ("INPUT", typed)))


def board(ticks: int = 5) -> bytes:
    """A multiboot 1 image for `freezeframe run --multiboot --test-devices`.

    It prints what it was given and what the test devices answer (`FLAGS`, `UPPER`, `CMDLINE`, `MODULE`, `CPUS`, `RAM`,
    `LATCH`, `WINDOW`, `LINE 11`), then `TICK 1`, `TICK 2`, … at 100 Hz of the PIT through the 8259s, and after `ticks`
    of them (0: never) writes the digit at the end of its command line to isa-debug-exit.
    """
    return _assemble("board", (("TICKS", ticks),))


def entropy(*, x2apic: bool = False) -> bytes:
    """Asks a virtio entropy device for 64 bytes again and again: `READY`, then `E <checksum>` each time, for ever."""
    return _assemble("entropy", (("X2APIC", int(x2apic)),))


def work(
    cpus: int = 1,
    *,
    blocks: int = 64,
    base: int = 0x100_0000,
    size: int = 0x1000,
    period: int = 2_000_000,
    x2apic: bool = False,
) -> bytes:
    """A guest that does everything at once, for ever: `READY`, then `T <round> <checksum>` (see `work_checksum`).

    Each round it checks and rewrites `size` bytes of memory at `base`, writes one block of 4 KiB to its disk (of
    `blocks`) and reads one that it wrote before, asks every other CPU by an interrupt, waits for its own timer, and
    compares its registers, x87 and SSE ones included. The other CPUs (`cpus` - 1 of them) work on a page each whenever
    an interrupt comes. CPU i's timer goes by TSC deadline, periodically or once each (i modulo 3 = 0, 1, 2), every
    `period` ns or TSC ticks; every request to the disk must bring exactly one interrupt.
    """
    symbols = (
        ("CPUS", cpus),
        ("X2APIC", int(x2apic)),
        ("BLOCKS", blocks),
        ("BASE", base),
        ("SIZE", size),
        ("PERIOD", period),
    )
    return _assemble("work", symbols)


def work_checksum(rounds: int, blocks: int = 64) -> str:
    """What `work` prints behind `T <rounds>`: a mix of which round's data each block that it read held."""
    written, value = [0] * blocks, 0x811C9DC5
    for number in range(1, rounds + 1):
        written[number * 7 % blocks] = number
        held = written[(number // 2 + 1) * 7 % blocks]
        value = (held ^ value ^ number) * 0x01000193 & 0xFFFFFFFF
    return f"{value:08x}"


def beat(cpus: int = 1, *, size: int = 64 << 20, period: int = 1_000_000) -> bytes:
    """A guest for timings: `UP`, then it touches each page of `size` bytes from 16 MiB on, `READY`, and a line `T` at
    each interrupt of a timer, every `period` ns. The other CPUs are started and stand.
    """
    symbols = (("CPUS", cpus), ("X2APIC", 0), ("BASE", 0x100_0000), ("SIZE", size), ("PERIOD", period))
    return _assemble("beat", symbols)
