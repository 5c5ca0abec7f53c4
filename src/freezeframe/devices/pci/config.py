"""The 256 bytes of configuration space of one function: constant bytes, and named fields that a guest may write."""

from __future__ import annotations

import struct

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_INTX_OFF = 1 << 10
# I/O, memory, master, parity, SERR, INTx disable
COMMAND_WRITABLE = 0x0547
STATUS_CAPABILITIES = 1 << 4
FIRST_CAPABILITY = 0x40
BAR0 = 0x10
BAR_MEMORY_64 = 0b100


class Field:
    """A writable field: `size` bytes at `offset`, of which the bits in `mask` can be written."""

    __slots__ = ("mask", "offset", "size")

    def __init__(self, offset: int, size: int, mask: int) -> None:
        self.offset = offset
        self.size = size
        self.mask = mask


class Bar:
    """A memory BAR. `size` in bytes, a power of two of at least 16; `wide`: 64 bits."""

    __slots__ = ("index", "name", "size", "wide")

    def __init__(self, index: int, size: int, *, wide: bool) -> None:
        self.index = index
        self.size = size
        self.wide = wide
        self.name = f"bar{index}"


class Identity:
    """Who a function is. `class_code`: base class, subclass, programming interface. `pin`: 1 = INTA, 0 = none."""

    __slots__ = ("class_code", "device", "pin", "revision", "subsystem", "vendor")

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        pin: int = 0,
    ) -> None:
        """`subsystem`: (vendor, device)."""
        self.vendor = vendor
        self.device = device
        self.class_code = class_code
        self.revision = revision
        self.subsystem = subsystem
        self.pin = pin


class ConfigSpace:
    """Any access of any width at any offset does what hardware does: constant bits keep, writable bits follow."""

    def __init__(self, component: str, identity: Identity) -> None:
        self._component = component
        self._bytes = bytearray(256)
        self._writable = bytearray(256)
        self._fields: dict[str, Field] = {}
        self._next = FIRST_CAPABILITY
        self._link = 0x34
        struct.pack_into("<HH", self._bytes, 0, identity.vendor, identity.device)
        struct.pack_into("<I", self._bytes, 8, identity.class_code << 8 | identity.revision)
        struct.pack_into("<HH", self._bytes, 0x2C, *identity.subsystem)
        self._bytes[0x3D] = identity.pin
        self.add_field("command", Field(4, 2, COMMAND_WRITABLE))
        self.add_field("cache_line_size", Field(0x0C, 1, 0xFF))
        self.add_field("interrupt_line", Field(0x3C, 1, 0xFF))

    def add_field(self, name: str, field: Field) -> None:
        self._fields[name] = field
        mask = field.mask.to_bytes(field.size, "little")
        for n, bits in enumerate(mask):
            self._writable[field.offset + n] |= bits

    def add_bar(self, bar: Bar) -> None:
        """The low bits say memory, 32 or 64 bits wide, not prefetchable; address bits above the size can be written."""
        size = 8 if bar.wide else 4
        offset = BAR0 + 4 * bar.index
        self._bytes[offset] = BAR_MEMORY_64 if bar.wide else 0
        self.add_field(bar.name, Field(offset, size, -bar.size & (1 << 8 * size) - 1))

    def add_capability(self, kind: int, body: bytes) -> int:
        """Appends a capability (`body` without its two byte header); gives its offset."""
        offset = self._next
        self._bytes[self._link] = offset
        self._bytes[offset] = kind
        self._bytes[offset + 2 : offset + 2 + len(body)] = body
        self._bytes[6] |= STATUS_CAPABILITIES
        self._link = offset + 1
        self._next = offset + 2 + len(body) + 3 & ~3
        return offset

    def get(self, name: str) -> int:
        field = self._fields[name]
        return int.from_bytes(self._bytes[field.offset : field.offset + field.size], "little") & field.mask

    def set(self, name: str, value: int) -> None:
        field = self._fields[name]
        self._merge(field.offset, (value & field.mask).to_bytes(field.size, "little"))

    def _merge(self, offset: int, data: bytes) -> None:
        for n, byte in enumerate(data, offset):
            mask = self._writable[n]
            self._bytes[n] = self._bytes[n] & ~mask & 0xFF | byte & mask

    def read(self, offset: int, size: int) -> int:
        """Beyond the first 256 bytes there are no extended capabilities: zero."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if offset + size <= 256:
            self._merge(offset, value.to_bytes(size, "little"))

    def state(self) -> dict[str, int]:
        """All that can be written; the rest follows from the configuration."""
        return {name: self.get(name) for name in self._fields}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state once, at construction; raises `Incompatible`."""
        limits = {name: (1 << 8 * field.size) - 1 for name, field in self._fields.items()}
        values = saved.fields(self._component, state, limits)
        for name, field in self._fields.items():
            saved.integer(self._component, name, values[name] & ~field.mask, 0)
            self.set(name, values[name])
