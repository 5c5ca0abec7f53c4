"""What a machine is made of, and the table of devices: which there are for a configuration, in which order, built how.

The order is Cloud Hypervisor's, because PCI slots and BAR addresses follow from it.
"""

from __future__ import annotations

import os

from freezeframe import _core
from freezeframe.backends.entropy import open_entropy
from freezeframe.devices import cmos, legacy
from freezeframe.devices.pci import bus as pci_bus
from freezeframe.devices.pci import virtio as pci_virtio
from freezeframe.machine import board
from freezeframe.machine.backends import CONSOLE, SERIAL
from freezeframe.startup import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from freezeframe.config import DiskConfig, VmConfig
    from freezeframe.devices.pic import Pic
    from freezeframe.machine.backends import Backends
    from freezeframe.machine.engine import EngineReport

    class PortDevice(Protocol):
        """A device of one range of ports."""

        ID: str
        BASE: int
        SIZE: int

        def state(self) -> dict[str, Any]: ...
        def read(self, offset: int, size: int) -> int: ...
        def write(self, offset: int, size: int, value: int) -> None: ...


RNG = "__rng"
IOAPIC = "__ioapic"
PCI_PREFIX = "_virtio-pci-"
IOAPIC_SIZE = 0x1000

# Virtio types (virtio 1.2, section 5) with PCI class, MSI-X vectors − 1 and bytes of device configuration.
CONSOLE_KIND = pci_virtio.Kind(3, 0xFF_FF00, 2, 12)
RNG_KIND = pci_virtio.Kind(4, 0xFF_FF00, 1, 0)


def block_kind(queues: int) -> pci_virtio.Kind:
    return pci_virtio.Kind(2, 0x01_8000, queues, 60)


class Parts:
    """One machine's components while it is being built and afterwards. Nothing here runs by itself."""

    def __init__(
        self,
        config: VmConfig,
        report: EngineReport,
        memory: _core.Memory,
        clock: _core.Clock,
        backends: Backends,
        *,
        seed: int | None = None,
    ) -> None:
        """`seed`: where the guest's random numbers come from instead of the host's."""
        self.config = config
        self.seed = seed
        self.report = report
        self.memory = memory
        self.clock = clock
        self.backends = backends
        self.map = layout.address_map(config.memory.size, config.cpus.max_phys_bits)
        self.control = _core.Control()
        self.bus = _core.Bus(self.control)
        self.msi = _core.MsiRelay()
        # By component id, in the order in which they were built: what is saved.
        self.devices: dict[str, Any] = {}
        # Those with queues or host ends: resumed before the machine runs, counted.
        self.virtual: dict[str, Any] = {}
        self.ioapic: _core.Ioapic
        self.engine: _core.Engine
        self.pci: pci_bus.PciBus
        self.keyboard: legacy.I8042
        # With test devices: the 8259s, their output, and the status that the guest ended the machine with.
        self.pic: Pic | None = None
        self.intr: _core.IntrLine | None = None
        self.exit_status: int | None = None
        self._lines: dict[int, _core.IrqLine] = {}
        self._next_slot = 1
        self._low = self.map.mem32[1]
        self._high = self.map.mem64[1]
        self._tree: dict[str, dict[str, Any]] = {}
        self._ged: legacy.EventDevice

    def close(self) -> None:
        """Lets go of everything: disks stay locked, and RAM allocated, as long as a device is held by anything."""
        self.bus.clear()
        self.backends.use_blocks({})
        for name in ("engine", "ioapic", "pci", "keyboard", "_ged"):
            self.__dict__.pop(name, None)
        self.pic = self.intr = None
        for held in (self.devices, self.virtual, self._lines):
            held.clear()

    def reset(self) -> None:
        self.control.request_stop("reset")

    def power_off(self) -> None:
        self.control.request_stop("poweroff")

    def exit(self, status: int) -> None:
        """The guest ends the machine, and with it a process whose status this is to be."""
        if self.exit_status is None:
            self.exit_status = status
        self.power_off()

    def add_port_device(self, device: PortDevice) -> None:
        self.bus.add_pio(device.BASE, device.SIZE, device)
        self.devices[device.ID] = device

    def line(self, pin: int) -> _core.IrqLine:
        """The pin as devices share it."""
        if pin not in self._lines:
            self._lines[pin] = _core.IrqLine(self.ioapic, pin)
        return self._lines[pin]

    def press_power_button(self) -> None:
        self._ged.power_button()

    def node(self, name: str, resources: list[dict[str, Any]] | None = None, **more: Any) -> None:
        """An entry of the device tree, in the shape of Cloud Hypervisor's `vm.info`."""
        children = more.pop("children", [])
        parent = {"parent": more.pop("parent")} if "parent" in more else {}
        self._tree[name] = {"id": name, "resources": resources or [], **parent, "children": children, **more}

    def device_tree(self) -> dict[str, Any]:
        tree = dict(self._tree)
        for name, device in self.devices.items():
            if name.startswith(PCI_PREFIX):
                node = dict(tree[name])
                node["resources"] = [
                    {
                        "PciBar": {
                            "index": 0,
                            "base": device.bar_address,
                            "size": pci_virtio.BAR_SIZE,
                            "type_": "Mmio64" if device.wide else "Mmio32",
                            "prefetchable": False,
                        }
                    }
                ]
                tree[name] = node
        return tree

    def add_virtio(
        self, name: str, kind: pci_virtio.Kind, device: _core.VirtioFunction, states: States, *, wide: bool
    ) -> None:
        """Puts a function into the next slot, with BAR 0 where Cloud Hypervisor's allocator (top down) puts it."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        if wide:
            self._high = bar = self._high - pci_virtio.BAR_SIZE & -pci_virtio.BAR_ALIGN_64
        else:
            self._low = bar = self._low - pci_virtio.BAR_SIZE & -pci_virtio.BAR_SIZE
        irq = layout.pci_irq(slot)
        function = pci_virtio.VirtioFunction(
            PCI_PREFIX + name, kind, device, states.take(PCI_PREFIX + name), wide=wide, bar=bar, irq=irq
        )
        # After the function has passed on its INTx disable bit, or a level would show for a moment that is not there.
        device.set_intx(self.line(irq))
        self.pci.add(slot, function)
        self.devices[name] = self.virtual[name] = device
        self.devices[PCI_PREFIX + name] = function
        self.node(name, parent=PCI_PREFIX + name)
        self.node(PCI_PREFIX + name, children=[name], pci_bdf=f"0000:00:{slot:02x}.0")


class States:
    """Saved states by component id, or none at all: then everything is cold."""

    def __init__(self, states: Mapping[str, Any] | None) -> None:
        self._states = None if states is None else dict(states)

    def take(self, name: str) -> Any:
        """The state of one component, None when the machine is cold. What is missing was checked before."""
        return None if self._states is None else self._states[name]

    def get(self, name: str, cold: Any) -> Any:
        return cold if self._states is None else self._states[name]


def _ioapic(parts: Parts, states: States) -> None:
    state = states.take(IOAPIC)
    parts.ioapic = _core.Ioapic.cold() if state is None else _core.Ioapic.from_state(state)
    parts.bus.add_mmio(layout.IOAPIC, IOAPIC_SIZE, parts.ioapic)
    parts.devices[IOAPIC] = parts.ioapic
    parts.node(IOAPIC)


def _pci(parts: Parts, states: States) -> None:
    parts.pci = pci_bus.PciBus(states.take(pci_bus.ID), parts.bus)
    parts.bus.add_pio(pci_bus.PORT, pci_bus.PORTS, pci_bus.ConfigPorts(parts.pci))
    parts.bus.add_mmio(layout.ECAM, layout.ECAM_BUS_SIZE, pci_bus.ConfigWindow(parts.pci))
    parts.devices[pci_bus.ID] = parts.pci


def _legacy(parts: Parts, states: States) -> None:
    regions = parts.map.regions
    cold = cmos.cold(regions[0][1], sum(size for _, size in regions[1:]))
    clock = cmos.Cmos(states.get(cmos.ID, cold), parts.clock, parts.reset)
    keyboard = legacy.I8042(states.get(legacy.I8042.ID, {}), parts.reset)
    debug = legacy.DebugPort(states.get(legacy.DebugPort.ID, legacy.DebugPort.cold()))
    sleep = legacy.AcpiSleep(states.get(legacy.AcpiSleep.ID, {}), parts.reset, parts.power_off)
    timer = legacy.PmTimer(states.get(legacy.PmTimer.ID, {}), parts.clock)
    events = legacy.EventDevice(
        states.get(legacy.EventDevice.ID, legacy.EventDevice.cold()), lambda: parts.ioapic.pulse(layout.GED_IRQ)
    )
    parts.bus.add_pio(cmos.BASE, cmos.SIZE, clock)
    for device in (keyboard, debug, sleep, timer):
        parts.add_port_device(device)
    parts.bus.add_mmio(parts.map.ged, events.SIZE, events)
    parts.devices[cmos.ID] = clock
    parts.devices[events.ID] = events
    parts.keyboard = keyboard
    parts._ged = events  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _serial(parts: Parts, states: States) -> None:
    end = parts.backends.consoles[SERIAL]
    device = _core.Serial(end.output, parts.line(layout.SERIAL_IRQ), parts.control, states.take(SERIAL))
    end.attach(device)
    parts.bus.add_pio(layout.SERIAL_PORT, 8, device)
    parts.devices[SERIAL] = parts.virtual[SERIAL] = device
    parts.node(SERIAL)


def _console(parts: Parts, states: States) -> None:
    end = parts.backends.consoles[CONSOLE]
    device = _core.VirtioConsole(
        CONSOLE, parts.memory, parts.msi, parts.control, end.output, size=end.size, state=states.take(CONSOLE)
    )
    end.attach(device)
    parts.add_virtio(CONSOLE, CONSOLE_KIND, device, states, wide=True)


def _disk(parts: Parts, states: States, config: DiskConfig, name: str) -> _core.VirtioBlk:
    disk = parts.backends.disks[name]
    device = _core.VirtioBlk(
        name,
        parts.memory,
        parts.msi,
        parts.control,
        disk.fd,
        readonly=config.readonly,
        queues=config.num_queues,
        queue_size=config.queue_size,
        serial=config.serial or disk.serial,
        sparse=config.sparse,
        overlay=disk.scratch,
        state=states.take(name),
    )
    parts.add_virtio(name, block_kind(config.num_queues), device, states, wide=False)
    return device


def _disks(parts: Parts, states: States) -> None:
    blocks = {disk.id: _disk(parts, states, disk, disk.id) for disk in parts.config.disks or () if disk.id is not None}
    parts.backends.use_blocks(blocks)


def _rng(parts: Parts, states: States) -> None:
    fd = None if parts.seed is not None else open_entropy(parts.config.rng.src)
    try:
        device = _core.VirtioRng(
            RNG, parts.memory, parts.msi, parts.control, fd, seed=parts.seed, state=states.take(RNG)
        )
    finally:
        if fd is not None:
            os.close(fd)
    parts.add_virtio(RNG, RNG_KIND, device, states, wide=True)


# (is it there, component ids without their PCI side, builder), in order.
ROWS: tuple[
    tuple[Callable[[VmConfig], bool], Callable[[VmConfig], list[str]], Callable[[Parts, States], None]], ...
] = (
    (lambda _: True, lambda _: [IOAPIC], _ioapic),
    (lambda _: True, lambda _: [pci_bus.ID], _pci),
    (
        lambda _: True,
        lambda _: [
            cmos.ID,
            legacy.I8042.ID,
            legacy.DebugPort.ID,
            legacy.AcpiSleep.ID,
            legacy.PmTimer.ID,
            legacy.EventDevice.ID,
        ],
        _legacy,
    ),
    (lambda config: config.serial.mode != "Off", lambda _: [SERIAL], _serial),
    (lambda config: config.console.mode != "Off", lambda _: [CONSOLE, PCI_PREFIX + CONSOLE], _console),
    (
        lambda config: bool(config.disks),
        lambda config: [name for disk in config.disks or () for name in (str(disk.id), PCI_PREFIX + str(disk.id))],
        _disks,
    ),
    (lambda _: True, lambda _: [RNG, PCI_PREFIX + RNG], _rng),
    (lambda config: bool(config.test_devices), board.ids, board.build),
)


def component_ids(config: VmConfig) -> list[str]:
    """The ids of all components with saved state that a machine of this configuration has."""
    return [name for there, names, _ in ROWS if there(config) for name in names(config)]
