"""CMOS memory and real-time clock (Motorola MC146818) at ports 0x70 and 0x71. The clock is the machine's wall clock."""

from __future__ import annotations

import time

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from freezeframe._core import Clock

BASE = 0x70
SIZE = 2
ID = "__cmos"

REGISTER_A = 0x0A
REGISTER_B = 0x0B
REGISTER_D = 0x0D
CENTURY = 0x32
BINARY = 1 << 2
HOURS_24 = 1 << 1
PM = 0x80
DIVIDER_32KHZ = 0x20
UPDATE_IN_PROGRESS = 0x80
POWER_GOOD = 0x80
SECOND_NS = 1_000_000_000
# The update-in-progress bit is seen in the last 244 µs of each second.
UPDATE_NS = SECOND_NS * 8 // 32768
RESET_INDEX = 0x8F  # shutdown status with NMI off: firmware's way to a reset, which Cloud Hypervisor obeys


def cold(ram_below_4g: int, ram_above_4g: int) -> dict[str, Any]:
    """The state at power-on; the memory sizes (bytes) are where firmware looks for them."""
    memory = bytearray(128)
    memory[REGISTER_B] = HOURS_24
    low = min(0xFFFF, max(0, ram_below_4g - (16 << 20)) >> 16)
    high = min(0xFF_FFFF, ram_above_4g >> 16)
    memory[0x34:0x36] = low.to_bytes(2, "little")
    memory[0x5B:0x5E] = high.to_bytes(3, "little")
    return {"index": 0, "memory": memory.hex()}


class Cmos:
    """Times that the guest writes are kept but not told: as with Cloud Hypervisor, the host's clock rules."""

    def __init__(self, state: Mapping[str, Any], clock: Clock, reset: Callable[[], None]) -> None:
        values = saved.keys(ID, state, {"index": 0, "memory": 0})
        self._index = saved.integer(ID, "index", values["index"], 0xFF)
        self._memory = bytearray(saved.data(ID, "memory", values["memory"], 128))
        self._clock = clock
        self._reset = reset

    def state(self) -> dict[str, Any]:
        return {"index": self._index, "memory": self._memory.hex()}

    def read(self, offset: int, size: int) -> int:
        if size != 1:
            return (1 << 8 * size) - 1
        return self._index if offset == 0 else self._register(self._index & 0x7F)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        if offset == 0:
            self._index = value
        elif self._index == RESET_INDEX and value == 0:
            self._reset()
        else:
            self._memory[self._index & 0x7F] = value

    def _register(self, index: int) -> int:
        if index > REGISTER_D and index != CENTURY:
            return self._memory[index]
        if index == REGISTER_D:
            return POWER_GOOD
        wall = self._clock.wall_ns()
        if index == REGISTER_A:
            updating = wall % SECOND_NS >= SECOND_NS - UPDATE_NS
            return DIVIDER_32KHZ | (UPDATE_IN_PROGRESS if updating else 0)
        now = time.gmtime(wall // SECOND_NS)
        mode = self._memory[REGISTER_B]
        hour = now.tm_hour
        afternoon = 0
        if not mode & HOURS_24:
            afternoon = PM if hour >= 12 else 0
            hour = (hour + 11) % 12 + 1
        numbers = {
            0x00: now.tm_sec,
            0x02: now.tm_min,
            0x04: hour,
            0x06: (now.tm_wday + 1) % 7 + 1,
            0x07: now.tm_mday,
            0x08: now.tm_mon,
            0x09: now.tm_year % 100,
            CENTURY: now.tm_year // 100,
        }
        number = numbers.get(index)
        if number is None:
            return self._memory[index]
        if not mode & BINARY:
            number = number // 10 << 4 | number % 10
        return number | (afternoon if index == 0x04 else 0)
