"""The machine's address map, as Cloud Hypervisor lays it out (arch/src/x86_64/layout.rs). All in bytes."""

from __future__ import annotations

from freezeframe.errors import Refused

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096

EBDA_POINTER = 0x40E
BOOT_GDT = 0x500
PVH_START_INFO = 0x6000
PVH_MODLIST = 0x6040
PVH_MEMMAP = 0x7000
ZERO_PAGE = 0x7000
BOOT_STACK = 0x8FF0
PML4 = 0xA000
PDPT = 0xB000
PAGE_DIRECTORIES = 0xC000  # four of them: 4 GiB in 2 MiB pages
CMDLINE = 0x20000
CMDLINE_MAX = 0x10000  # with its NUL
RSDP = 0xA0000  # EBDA_START; the ACPI tables follow
SMBIOS = 0xF0000
HIGH_RAM = 0x100000

RAM_32_END = 0xC000_0000
MEM32_START = 0xC000_0000
ECAM = 0xE800_0000
ECAM_AREA_END = 0xF800_0000
ECAM_BUS_SIZE = MIB
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
RAM_64_START = 0x1_0000_0000

PCI_IRQ_BASE = 5
PCI_IRQS = 8
SERIAL_IRQ = 4
GED_IRQ = 13

RTC_PORT = 0x70
SERIAL_PORT = 0x3F8
ACPI_SLEEP_PORT = 0x600
PM_TIMER_PORT = 0x608

E820_RAM = 1
E820_RESERVED = 2


def pci_irq(slot: int) -> int:
    """The IOAPIC pin of a PCI slot's INTA."""
    return PCI_IRQ_BASE + slot % PCI_IRQS


class AddressMap:
    """Where everything is in one machine. Ranges are (first, last + 1)."""

    __slots__ = ("ged", "mem32", "mem64", "regions")

    def __init__(self, regions: tuple[tuple[int, int], ...], mem64: tuple[int, int], ged: int) -> None:
        """`regions`: RAM as (address, size)."""
        self.regions = regions
        self.mem32 = (MEM32_START, ECAM)
        self.mem64 = mem64
        self.ged = ged

    def e820(self) -> list[tuple[int, int, int]]:
        """(address, size, type) as the kernel is told: no RAM between 640 KiB and 1 MiB."""
        entries = [(0, RSDP, E820_RAM)]
        for base, size in self.regions:
            start = max(base, HIGH_RAM)
            entries.append((start, base + size - start, E820_RAM))
        entries.append((ECAM, ECAM_BUS_SIZE, E820_RESERVED))
        return entries


def address_map(ram: int, phys_bits: int) -> AddressMap:
    """The map of a machine with `ram` bytes; raises `Refused` for a size that cannot be laid out."""
    if ram % PAGE:
        raise Refused(f"memory size {ram} is not a multiple of {PAGE} bytes")
    if ram < 16 * MIB:
        raise Refused(f"memory size {ram} is too small: at least {16 * MIB} bytes (16M)")
    regions = [(0, min(ram, RAM_32_END))]
    if ram > RAM_32_END:
        regions.append((RAM_64_START, ram - RAM_32_END))
    top = (1 << phys_bits) - 64 * KIB - MIB
    end = regions[-1][0] + regions[-1][1]
    mem64 = max(end, RAM_64_START)
    if mem64 + GIB > top:
        raise Refused(f"memory size {ram} does not fit into {phys_bits} physical address bits")
    # The platform area is handed out from its top: PCI hotplug, CPU hotplug (both not built, addresses kept), GED.
    ged = top + MIB - 3 * PAGE
    return AddressMap(tuple(regions), (mem64, top), ged)
