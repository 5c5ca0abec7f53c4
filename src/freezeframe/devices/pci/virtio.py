"""Configuration space of a virtio function (virtio 1.2, section 4.1): where its structures lie in BAR 0.

The structures themselves, the MSI-X table and the queues are Rust (`freezeframe._core`); BAR 0's layout is Cloud
Hypervisor's (`virtio-devices/src/transport/pci_device.rs`).
"""

from __future__ import annotations

import struct

from freezeframe.devices.pci.config import (
    COMMAND_INTX_OFF,
    COMMAND_MEMORY,
    Bar,
    ConfigSpace,
    Field,
    Identity,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from freezeframe._core import CoreDevice

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040
REVISION = 1
BAR_SIZE = 0x80000
BAR_ALIGN_64 = 0x800000
COMMON = (0x0, 56)
ISR = (0x2000, 1)
DEVICE = 0x4000
NOTIFY = (0x6000, 0x1000)
NOTIFY_MULTIPLIER = 4
MSIX_TABLE = 0x8000
MSIX_PBA = 0x48000

CAP_VENDOR = 0x09
CAP_MSIX = 0x11
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = 1, 2, 3, 4, 5
MSIX_ENABLE = 1 << 15
MSIX_MASK_ALL = 1 << 14
INTA = 1
STATUS = 6
STATUS_INTERRUPT = 1 << 3


class Kind:
    """A virtio device type as PCI shows it. `config_size`: bytes of the device specific structure, 0 for none."""

    __slots__ = ("class_code", "config_size", "queues", "type")

    def __init__(self, type_: int, class_code: int, queues: int, config_size: int) -> None:
        self.type = type_
        self.class_code = class_code
        self.queues = queues
        self.config_size = config_size


def _cap(kind: int, offset: int, length: int, extra: bytes = b"") -> bytes:
    """`struct virtio_pci_cap` without its first two bytes; everything lies in BAR 0."""
    return struct.pack("<BBBBHII", 16 + len(extra), kind, 0, 0, 0, offset, length) + extra


class VirtioFunction:
    """One virtio-pci function; forwards what its Rust side has to know (MSI-X and INTx control)."""

    def __init__(
        self,
        component: str,
        kind: Kind,
        registers: CoreDevice,
        state: Mapping[str, Any] | None,
        *,
        wide: bool,
        bar: int,
        irq: int = 0,
    ) -> None:
        """`bar` and `irq`: what a boot finds in BAR 0 and the interrupt line register. `wide`: 64 bits.

        `state`: None for a cold function.
        """
        identity = Identity(
            VENDOR,
            DEVICE_BASE + kind.type,
            kind.class_code,
            revision=REVISION,
            subsystem=(VENDOR, DEVICE_BASE + kind.type),
            pin=INTA,
        )
        self._config = config = ConfigSpace(component, identity)
        self._registers: Any = registers
        self._bar = Bar(0, BAR_SIZE, wide=wide)
        config.add_bar(self._bar)
        config.add_capability(CAP_VENDOR, _cap(CFG_COMMON, *COMMON))
        config.add_capability(CAP_VENDOR, _cap(CFG_ISR, *ISR))
        if kind.config_size:
            config.add_capability(CAP_VENDOR, _cap(CFG_DEVICE, DEVICE, kind.config_size))
        config.add_capability(CAP_VENDOR, _cap(CFG_NOTIFY, *NOTIFY, struct.pack("<I", NOTIFY_MULTIPLIER)))
        window = config.add_capability(CAP_VENDOR, _cap(CFG_PCI, 0, 0, bytes(4)))
        self._window_data = window + 16
        config.add_field("window_bar", Field(window + 4, 1, 0xFF))
        config.add_field("window_offset", Field(window + 8, 4, 0xFFFF_FFFF))
        config.add_field("window_length", Field(window + 12, 4, 0xFFFF_FFFF))
        config.add_field("window_data", Field(window + 16, 4, 0xFFFF_FFFF))
        msix = config.add_capability(CAP_MSIX, struct.pack("<HII", kind.queues, MSIX_TABLE, MSIX_PBA))
        config.add_field("msix_control", Field(msix + 2, 2, MSIX_ENABLE | MSIX_MASK_ALL))
        if state is None:
            config.set(self._bar.name, bar)
            config.set("interrupt_line", irq)
            # As firmware leaves it: Linux turns decoding on itself, smaller guests rely on it being on.
            config.set("command", COMMAND_MEMORY)
        else:
            config.restore(state)
        self._told: tuple[int, int] | None = None
        self._tell()

    def _tell(self) -> None:
        """Passes MSI-X control and INTx disable on, when they have changed."""
        msix = self._config.get("msix_control")
        intx_off = self._config.get("command") & COMMAND_INTX_OFF
        if self._told != (msix, intx_off):
            self._told = (msix, intx_off)
            self._registers.set_msix_control(bool(msix & MSIX_ENABLE), bool(msix & MSIX_MASK_ALL))
            self._registers.set_intx_disabled(bool(intx_off))

    def bars(self) -> list[tuple[int, int, CoreDevice]]:
        if not self._config.get("command") & COMMAND_MEMORY:
            return []
        return [(self._config.get(self._bar.name), BAR_SIZE, self._registers)]

    @property
    def bar_address(self) -> int:
        return self._config.get(self._bar.name)

    @property
    def wide(self) -> bool:
        return self._bar.wide

    def state(self) -> dict[str, Any]:
        return dict(self._config.state())

    def _window(self) -> tuple[int, int] | None:
        """(offset, size) of what the PCI configuration access capability asks for (4.1.4.9), if that is valid."""
        offset, length = self._config.get("window_offset"), self._config.get("window_length")
        valid = self._config.get("window_bar") == 0 and length in (1, 2, 4) and offset + length <= BAR_SIZE
        return (offset, length) if valid and offset % length == 0 else None

    def read(self, offset: int, size: int) -> int:
        if self._window_data <= offset < self._window_data + 4:
            window = self._window()
            if window:
                self._config.set("window_data", self._registers.read(*window))
        value = self._config.read(offset, size)
        # Bit 3 of the status register: INTx would be pulled but for the command register's disable bit.
        if offset <= STATUS < offset + size and self._registers.intx_pending():
            value |= STATUS_INTERRUPT << 8 * (STATUS - offset)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self._config.write(offset, size, value)
        if self._window_data <= offset < self._window_data + 4:
            window = self._window()
            if window:
                data = self._config.get("window_data") & (1 << 8 * window[1]) - 1
                self._registers.write(*window, data)
        self._tell()
