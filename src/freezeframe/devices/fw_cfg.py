"""QEMU's firmware configuration ports 0x510 and 0x511, as far as numbers go (QEMU's docs/specs/fw_cfg.rst).

There are no files and there is no DMA: the feature word says so.
"""

from __future__ import annotations

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SIGNATURE, FEATURES, RAM_SIZE, CPUS, CPUS_MAX = 0x00, 0x01, 0x03, 0x05, 0x0F


class FwCfg:
    """A 16-bit selector and a byte after byte of what it selects; zeros behind the end and where nothing is."""

    ID = "__fw_cfg"
    BASE = 0x510
    SIZE = 2

    def __init__(self, state: Mapping[str, Any], cpus: int, ram: int) -> None:
        """`ram`: bytes of RAM, wherever it lies."""
        values = saved.fields(self.ID, state, {"selector": 0xFFFF, "offset": 0xFFFF_FFFF})
        self._selector, self._offset = values["selector"], values["offset"]
        self._items = {
            SIGNATURE: b"QEMU",
            FEATURES: (1).to_bytes(4, "little"),
            RAM_SIZE: ram.to_bytes(8, "little"),
            CPUS: cpus.to_bytes(2, "little"),
            CPUS_MAX: cpus.to_bytes(2, "little"),
        }

    @staticmethod
    def cold() -> dict[str, Any]:
        return {"selector": 0, "offset": 0}

    def state(self) -> dict[str, Any]:
        return {"selector": self._selector, "offset": self._offset}

    def read(self, offset: int, size: int) -> int:
        if offset != 1 or size != 1:
            return 0
        item = self._items.get(self._selector, b"")
        at, self._offset = self._offset, min(self._offset + 1, 0xFFFF_FFFF)
        return item[at] if at < len(item) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Items cannot be written: the data port ignores it."""
        if offset == 0 and size == 2:
            self._selector, self._offset = value, 0
