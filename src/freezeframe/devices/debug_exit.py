"""QEMU's `isa-debug-exit` (hw/misc/debugexit.c) at port 0xf4: whatever is written ends the machine and its process."""

from __future__ import annotations

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


class DebugExit:
    """Status of the process: `value << 1 | 1`, of which the operating system keeps 8 bits. So it is never 0."""

    ID = "__debug_exit"
    BASE = 0xF4
    SIZE = 4

    def __init__(self, state: Mapping[str, Any], end: Callable[[int], None]) -> None:
        """`end`: ends the machine with a status."""
        saved.fields(self.ID, state, {})
        self._end = end

    @staticmethod
    def cold() -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing to remember: the first write is the last."""
        return {}

    def read(self, offset: int, size: int) -> int:
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size
        self._end((value << 1 | 1) & 0xFF)
