"""The PCI root: both ways into configuration space, and the mapping of BARs wherever the guest puts them."""

from __future__ import annotations

from freezeframe.devices import saved
from freezeframe.devices.pci.config import ConfigSpace, Identity
from freezeframe.errors import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol

    from freezeframe._core import Bus, CoreDevice

    class Function(Protocol):
        """A function 0 of a slot. `bars` says what it decodes right now: (address, size, registers)."""

        def read(self, offset: int, size: int) -> int: ...
        def write(self, offset: int, size: int, value: int) -> None: ...
        def bars(self) -> list[tuple[int, int, CoreDevice]]: ...
        def state(self) -> dict[str, Any]: ...


ID = "__pci"
PORT = 0xCF8
PORTS = 8
ENABLE = 1 << 31
SLOTS = 32
HOST_BRIDGE = Identity(0x8086, 0x0D57, 0x060000)


class HostBridge:
    """00:00.0"""

    def __init__(self, state: Mapping[str, Any] | None) -> None:
        self._config = ConfigSpace("__host_bridge", HOST_BRIDGE)
        if state is not None:
            self._config.restore(state)
        self.read = self._config.read
        self.write = self._config.write

    def bars(self) -> list[tuple[int, int, CoreDevice]]:
        return []

    def state(self) -> dict[str, Any]:
        return dict(self._config.state())


class PciBus:
    """Segment 0, bus 0, one function a slot.

    Guarantees: a BAR answers exactly while its function's memory decoding is on, at the address last written; one that
    would lie on something else stays silent until it or the other moves. Moving costs nothing to others.
    """

    def __init__(self, state: Mapping[str, Any] | None, bus: Bus) -> None:
        self._bus = bus
        self._slots: dict[int, Function] = {}
        self._mapped: dict[int, CoreDevice] = {}
        self._sizes: dict[int, int] = {}
        self._address = 0
        bridge = None
        if state is not None:
            values = saved.keys(ID, state, {"address": 0, "host_bridge": 0})
            self._address = saved.integer(ID, "address", values["address"], 0xFFFF_FFFF)
            bridge = values["host_bridge"]
        self._bridge = HostBridge(bridge)
        self._slots[0] = self._bridge

    def state(self) -> dict[str, Any]:
        return {"address": self._address, "host_bridge": self._bridge.state()}

    def add(self, slot: int, function: Function) -> None:
        if slot in self._slots or not 0 < slot < SLOTS:
            raise Refused(f"PCI slot {slot} is taken or does not exist")
        self._slots[slot] = function
        self.remap()

    def remap(self) -> None:
        """Brings the bus to what the functions decode now."""
        wanted: dict[int, tuple[int, CoreDevice]] = {}
        for function in self._slots.values():
            for address, size, registers in function.bars():
                wanted.setdefault(address, (size, registers))
        for address, registers in list(self._mapped.items()):
            keep = wanted.get(address)
            if keep is None or keep[1] is not registers or keep[0] != self._sizes[address]:
                self._bus.remove_mmio(address)
                del self._mapped[address], self._sizes[address]
        for address, (size, registers) in wanted.items():
            if address not in self._mapped:
                try:
                    self._bus.add_mmio(address, size, registers)
                except Refused:
                    continue  # lies on another device: silent, as said above
                self._mapped[address] = registers
                self._sizes[address] = size

    def config_read(self, slot: int, function: int, offset: int, size: int) -> int:
        target = self._slots.get(slot) if function == 0 else None
        return (1 << 8 * size) - 1 if target is None else target.read(offset, size)

    def config_write(self, slot: int, function: int, offset: int, size: int, value: int) -> None:
        target = self._slots.get(slot) if function == 0 else None
        if target is not None:
            target.write(offset, size, value)
            if offset < 0x28:
                self.remap()


class ConfigPorts:
    """Ports 0xcf8 (address, dword only) and 0xcfc to 0xcff (data): configuration mechanism 1."""

    def __init__(self, bus: PciBus) -> None:
        self._pci = bus

    def read(self, offset: int, size: int) -> int:
        if offset < 4:
            address = self._pci._address  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            return address >> 8 * offset & (1 << 8 * size) - 1
        target = self._target(offset, size)
        return (1 << 8 * size) - 1 if target is None else self._pci.config_read(*target, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < 4:
            if offset == 0 and size == 4:
                self._pci._address = value & ~3  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            return
        target = self._target(offset, size)
        if target is not None:
            self._pci.config_write(*target, size, value)

    def _target(self, offset: int, size: int) -> tuple[int, int, int] | None:
        address = self._pci._address  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if not address & ENABLE or address >> 16 & 0xFF or offset + size > 8:
            return None
        return address >> 11 & 31, address >> 8 & 7, (address & 0xFC) + offset - 4


class ConfigWindow:
    """ECAM: 4 KiB a function, bus 0 (PCI Express 5.0, 7.2.2)."""

    def __init__(self, bus: PciBus) -> None:
        self._pci = bus

    def read(self, offset: int, size: int) -> int:
        return self._pci.config_read(offset >> 15 & 31, offset >> 12 & 7, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._pci.config_write(offset >> 15 & 31, offset >> 12 & 7, offset & 0xFFF, size, value)
