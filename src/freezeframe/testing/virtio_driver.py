"""A virtio driver in Python: what a guest's kernel does to a virtio-pci function, for tests of devices."""

from __future__ import annotations

import struct

from freezeframe import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

COMMON, ISR, CONFIG, NOTIFY, TABLE, PBA = 0x0, 0x2000, 0x4000, 0x6000, 0x8000, 0x48000
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
INDIRECT, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NEXT, WRITE, TABLE_FLAG = 1, 2, 4
NO_VECTOR = 0xFFFF
RAM = 8 << 20
VECTOR_BASE = 0x40


class Host:
    """What a device needs of its machine, without one."""

    def __init__(self, memory: _core.Memory | None = None) -> None:
        self.memory = memory or _core.Memory([(0, RAM)])
        self.msi = _core.MsiRelay()
        self.control = _core.Control()
        self.ioapic = _core.Ioapic.cold()

    def parts(self) -> tuple[_core.Memory, _core.MsiRelay, _core.Control]:
        return self.memory, self.msi, self.control

    def vectors(self) -> list[int]:
        """MSI-X vectors (table index) that were sent since the last call."""
        return [data - VECTOR_BASE for _, data in self.msi.take_waiting()]


class Ring:
    """The driver's side of one split queue. Buffers are not reclaimed: rings are short-lived here."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self._driver = driver
        self._memory = driver.host.memory
        self.index = index
        self.size = size
        self.desc = driver.allocate(16 * size, 4096)
        self.avail = driver.allocate(6 + 2 * size, 4096)
        self.used = driver.allocate(6 + 8 * size, 4096)
        for gpa, length in ((self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used, 6 + 8 * size)):
            self._memory.write(gpa, bytes(length))
        self.next_desc = 0
        self.avail_index = 0
        self.used_index = 0

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self._memory.read(gpa, 2), "little")

    def put16(self, gpa: int, value: int) -> None:
        self._memory.write(gpa, struct.pack("<H", value & 0xFFFF))

    def describe(self, index: int, gpa: int, length: int, flags: int, following: int = 0) -> None:
        self._memory.write(self.desc + 16 * index, struct.pack("<QIHH", gpa, length, flags, following))

    def add(self, buffers: Sequence[tuple[int, int, bool]], *, indirect: bool = False) -> int:
        """Makes a chain of (gpa, length, device writes) available; gives its head. Does not notify."""
        entries = [(gpa, length, WRITE if writes else 0) for gpa, length, writes in buffers]
        if indirect:
            table = self._driver.allocate(16 * len(entries), 16)
            for n, (gpa, length, flags) in enumerate(entries):
                more = NEXT if n + 1 < len(entries) else 0
                self._memory.write(table + 16 * n, struct.pack("<QIHH", gpa, length, flags | more, n + 1))
            entries = [(table, 16 * len(entries), TABLE_FLAG)]
        slots = [(self.next_desc + n) % self.size for n in range(len(entries))]
        for n, (gpa, length, flags) in enumerate(entries):
            more = NEXT if n + 1 < len(entries) else 0
            self.describe(slots[n], gpa, length, flags | more, slots[n + 1] if more else 0)
        self.next_desc += len(entries)
        self.offer(slots[0])
        return slots[0]

    def offer(self, head: int) -> None:
        self.put16(self.avail + 4 + 2 * (self.avail_index % self.size), head)
        self.avail_index += 1
        self.put16(self.avail + 2, self.avail_index)

    def completed(self) -> list[tuple[int, int]]:
        """(head, bytes written) of what came back since the last call."""
        done: list[tuple[int, int]] = []
        while self.used_index & 0xFFFF != self.u16(self.used + 2):
            at = self.used + 4 + 8 * (self.used_index % self.size)
            head, length = struct.unpack("<II", self._memory.read(at, 8))
            done.append((head, length))
            self.used_index += 1
        return done

    def notify(self) -> None:
        self._driver.device.write(NOTIFY + 4 * self.index, 2, self.index)


class Driver:
    """Brings a function up as Linux' `virtio_pci_modern` does, and moves buffers."""

    def __init__(self, device: _core.VirtioFunction, host: Host) -> None:
        self.device = device
        self.host = host
        self.rings: list[Ring] = []
        self._free = 0x10000

    def allocate(self, size: int, align: int = 16) -> int:
        at = -(-self._free // align) * align
        self._free = at + size
        return at

    def place(self, data: bytes) -> int:
        at = self.allocate(len(data))
        self.host.memory.write(at, data)
        return at

    def status(self) -> int:
        return self.device.read(0x14, 1)

    def offered(self) -> int:
        self.device.write(0x00, 4, 0)
        low = self.device.read(0x04, 4)
        self.device.write(0x00, 4, 1)
        return low | self.device.read(0x04, 4) << 32

    def accept(self, features: int) -> bool:
        """True when the device agrees."""
        for half in (0, 1):
            self.device.write(0x08, 4, half)
            self.device.write(0x0C, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.device.write(0x14, 1, self.status() | FEATURES_OK)
        return bool(self.status() & FEATURES_OK)

    def set_vector(self, vector: int, *, masked: bool = False) -> None:
        entry = TABLE + 16 * vector
        self.device.write(entry, 4, 0xFEE0_0000)
        self.device.write(entry + 4, 4, 0)
        self.device.write(entry + 8, 4, VECTOR_BASE + vector)
        self.device.write(entry + 12, 4, int(masked))

    def set_queue(self, index: int, size: int | None = None, *, vector: int = NO_VECTOR) -> Ring:
        self.device.write(0x16, 2, index)
        ring = Ring(self, index, size or self.device.read(0x18, 2))
        if size:
            self.device.write(0x18, 2, size)
        self.device.write(0x1A, 2, vector)
        for offset, gpa in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)):
            self.device.write(offset, 4, gpa & 0xFFFF_FFFF)
            self.device.write(offset + 4, 4, gpa >> 32)
        self.device.write(0x1C, 2, 1)
        return ring

    def start(self, *, features: int | None = None, msix: bool = True, size: int | None = None) -> Driver:
        """All steps of 3.1.1 up to DRIVER_OK, with every queue; vector 0 is the configuration's, n + 1 queue n's."""
        self.device.write(0x14, 1, 0)
        self.device.write(0x14, 1, ACKNOWLEDGE)
        self.device.write(0x14, 1, ACKNOWLEDGE | DRIVER)
        assert self.accept(self.offered() if features is None else features)
        self.device.set_msix_control(msix, False)
        queues = self.device.read(0x12, 2)
        if msix:
            for vector in range(queues + 1):
                self.set_vector(vector)
            self.device.write(0x10, 2, 0)
        self.rings = [self.set_queue(n, size, vector=n + 1 if msix else NO_VECTOR) for n in range(queues)]
        self.device.write(0x14, 1, self.status() | DRIVER_OK)
        return self

    def again(self, device: _core.VirtioFunction, host: Host | None = None) -> Driver:
        """The same driver, in the same memory, after its machine was restored."""
        self.device = device
        if host is not None:
            self.host = host
        return self


def saved(device: Any) -> Mapping[str, Any]:
    """The device's state as it comes back from a snapshot: through JSON."""
    import json

    return json.loads(json.dumps(device.state()))  # type: ignore[no-any-return]
