"""The guest's ACPI tables (ACPI 6.5): hardware-reduced, devices and addresses as Cloud Hypervisor has them.

Two deliberate differences: the MADT lists processors with ids below 255 as plain local APICs (kernels without x2APIC
support see only those), and hotplug controllers are absent because nothing can be plugged yet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from freezeframe.startup import aml, layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from freezeframe.startup.layout import AddressMap

OEM_ID = b"CLOUDH"
# HW_REDUCED_ACPI, RESET_REG_SUP, TMR_VAL_EXT (table 5.10)
FADT_FLAGS = 1 << 20 | 1 << 10 | 1 << 8
S5_SLEEP_TYPE = 5
GED_POWER_BUTTON = 8
SLOTS = 32


@dataclass(frozen=True, slots=True)
class Platform:
    """What the tables describe."""

    map: AddressMap
    apic_ids: tuple[int, ...]
    serial: bool


def _sum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, name: bytes, body: bytes) -> bytes:
    """A system description table: 36 byte header (table 5.5) with its checksum, then `body`."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, name.ljust(8), 1, b"FRZF", 1)
    whole = bytearray(header + body)
    whole[9] = _sum(whole)
    return bytes(whole)


def _gas(space: int, bits: int, access: int, address: int) -> bytes:
    """Generic address structure (5.2.3.2)."""
    return struct.pack("<BBBBQ", space, bits, 0, access, address)


def _device_selection_method() -> bytes:
    """_DSM function 5 "keep the boot configuration" (PCI firmware 3.3, 4.6.5) says no: BARs may be moved."""
    uuid = bytes.fromhex("d037c9e553357a4d9117ea4d19c3434d")
    arg0, arg2 = b"\x68", b"\x6a"
    return aml.method(
        "_DSM",
        4,
        aml.if_(
            aml.equal(arg0, aml.buffer(uuid)),
            aml.if_(aml.equal(arg2, aml.ZERO), aml.return_(aml.buffer(b"\x21"))),
            aml.if_(aml.equal(arg2, aml.integer(5)), aml.return_(aml.ZERO)),
        ),
        aml.return_(aml.buffer(b"\x00")),
    )


def _pci_root(map_: AddressMap) -> bytes:
    routing = [
        aml.package(
            (
                aml.integer(slot << 16 | 0xFFFF),
                aml.ZERO,
                aml.ZERO,
                aml.integer(layout.pci_irq(slot)),
            )
        )
        for slot in range(SLOTS)
    ]
    slots = [
        aml.device(f"S{n:03}", aml.name("_SUN", aml.integer(n)), aml.name("_ADR", aml.integer(n << 16)))
        for n in range(SLOTS)
    ]
    windows = aml.resources(
        aml.bus_numbers(0, 0),
        aml.io_ports(0xCF8, 8),
        aml.memory32_fixed(layout.ECAM, layout.ECAM_BUS_SIZE),
        aml.memory_window(map_.mem32[0], map_.mem32[1] - 1),
        aml.memory_window(map_.mem64[0], map_.mem64[1] - 1),
        aml.io_window(0, 0xCF7),
        aml.io_window(0xD00, 0xFFFF),
    )
    return aml.device(
        "\\_SB.PC00",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_ADR", aml.ZERO),
        aml.name("_SEG", aml.ZERO),
        aml.name("_UID", aml.ZERO),
        aml.name("_CCA", aml.ONE),
        aml.name("SUPP", aml.ZERO),
        aml.method("_PXM", 0, aml.return_(aml.ZERO)),
        _device_selection_method(),
        aml.name("_CRS", windows),
        *slots,
        aml.name("_PRT", aml.package(routing)),
    )


def _event_device(address: int) -> bytes:
    """GED (5.6.9): its interrupt runs ESCN, which reads why and presses the power button."""
    controller = aml.device(
        "\\_SB.GEC_",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_UID", aml.string("Generic Event Controller")),
        aml.name("_CRS", aml.resources(aml.memory_window(address, address))),
        aml.region("GDST", 0, address, 1),
        aml.field("GDST", 1 | 2 << 5, [("GDAT", 8)]),
        aml.method(
            "ESCN",
            0,
            aml.store(aml.path("GDAT"), aml.LOCAL0),
            aml.bit_and(aml.LOCAL0, aml.integer(GED_POWER_BUTTON), aml.LOCAL1),
            aml.if_(aml.equal(aml.LOCAL1, aml.integer(GED_POWER_BUTTON)), aml.notify("\\_SB.PWRB", 0x80)),
            serialized=True,
        ),
    )
    ged = aml.device(
        "\\_SB.GED_",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.interrupt(layout.GED_IRQ, edge=True))),
        aml.method("_EVT", 1, aml.call("\\_SB.GEC_.ESCN"), serialized=True),
    )
    return controller + ged


def dsdt(platform: Platform) -> bytes:
    board = aml.device(
        "\\_SB.MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.memory32_fixed(layout.ECAM, layout.ECAM_BUS_SIZE))),
    )
    serial = aml.device(
        "\\_SB.COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ZERO),
        aml.name("_DDN", aml.string("COM1")),
        aml.name(
            "_CRS",
            aml.resources(aml.interrupt(layout.SERIAL_IRQ, edge=True), aml.io_ports(layout.SERIAL_PORT, 8)),
        ),
    )
    # Not among Cloud Hypervisor's: without it Linux guesses that there is an RTC with interrupt 8, and has no PIC.
    clock = aml.device(
        "\\_SB.RTC_",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resources(aml.io_ports(layout.RTC_PORT, 2))),
    )
    off = aml.name("\\_S5_", aml.package((aml.integer(S5_SLEEP_TYPE),)))
    button = aml.device("\\_SB.PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.ZERO))
    body = _pci_root(platform.map) + board + clock + (serial if platform.serial else b"") + off + button
    return table(b"DSDT", 6, b"FFDSDT", body + _event_device(platform.map.ged))


def fadt(dsdt_address: int) -> bytes:
    """Revision 6.3, 276 bytes (table 5.9); offsets are those of the whole table."""
    body = bytearray(276)
    sleep = _gas(1, 8, 1, layout.ACPI_SLEEP_PORT)
    struct.pack_into("<I", body, 112, FADT_FLAGS)
    body[116:128] = sleep  # RESET_REG
    body[128] = 1  # RESET_VALUE
    body[131] = 3  # minor version
    struct.pack_into("<Q", body, 140, dsdt_address)
    body[208:220] = _gas(1, 32, 3, layout.PM_TIMER_PORT)
    body[244:256] = sleep  # SLEEP_CONTROL_REG
    body[256:268] = sleep  # SLEEP_STATUS_REG
    body[268:276] = b"CLOUDHYP"
    return table(b"FACP", 6, b"FFFACP", bytes(body[36:]))


def madt(apic_ids: tuple[int, ...]) -> bytes:
    """Processors, the IOAPIC, and the serial line's identity override (5.2.12)."""
    body = bytearray(struct.pack("<II", layout.LAPIC, 0))
    for uid, apic_id in enumerate(apic_ids):
        if apic_id < 255:
            body += struct.pack("<BBBBI", 0, 8, uid, apic_id, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, layout.SERIAL_IRQ, layout.SERIAL_IRQ, 0)
    return table(b"APIC", 5, b"FFMADT", bytes(body))


def mcfg() -> bytes:
    """One segment, one bus (PCI firmware 3.3, table 4-3)."""
    return table(b"MCFG", 1, b"FFMCFG", bytes(8) + struct.pack("<QHBBI", layout.ECAM, 0, 0, 0, 0))


def build(platform: Platform, base: int = layout.RSDP) -> bytes:
    """All tables as one block for guest address `base`, the RSDP first (5.2.5)."""
    blob = bytearray(64)

    def place(data: bytes) -> int:
        blob.extend(bytes(-len(blob) % 16))
        blob.extend(data)
        return base + len(blob) - len(data)

    dsdt_address = place(dsdt(platform))
    made: list[Callable[[], bytes]] = [lambda: fadt(dsdt_address), lambda: madt(platform.apic_ids), mcfg]
    entries = [place(make()) for make in made]
    xsdt = place(table(b"XSDT", 1, b"FFXSDT", struct.pack(f"<{len(entries)}Q", *entries)))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _sum(rsdp[:20])
    rsdp[32] = _sum(rsdp)
    blob[: len(rsdp)] = rsdp
    return bytes(blob)
