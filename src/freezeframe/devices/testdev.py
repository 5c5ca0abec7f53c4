"""QEMU's `pc-testdev` (hw/misc/pc-testdev.c): latches and interrupt lines for programs that test a machine."""

from __future__ import annotations

from freezeframe.devices import saved
from freezeframe.errors import Incompatible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

ID = "__testdev"
# Ports: a latch of four bytes, a "flush" that does nothing, the same latch again, 24 interrupt lines.
LATCH, FLUSH, LATCH_BYTES, LINES = 0xE0, 0xE4, 0xE8, 0x2000
LINE_COUNT = 24
WINDOW = 0xFF00_0000
WINDOW_SIZE = 0x1_0000
BLOCK = 256


class TestDevice:
    """The latch and the memory-mapped window keep what is written; they are its whole state."""

    __test__ = False  # not a test of pytest's

    def __init__(self, state: Mapping[str, Any], set_line: Callable[[int, bool], None]) -> None:
        """`set_line`: holds an interrupt line (0 to 23) high or low."""
        values = saved.keys(ID, state, {"latch": 0, "window": 0})
        saved.integer(ID, "latch", values["latch"], 0xFFFF_FFFF)
        self._latch = bytearray(values["latch"].to_bytes(4, "little"))
        self._window = _unpack(values["window"])
        self._set_line = set_line

    @staticmethod
    def cold() -> dict[str, Any]:
        return {"latch": 0, "window": {}}

    def state(self) -> dict[str, Any]:
        """The window by blocks of 256 bytes that are not all zero."""
        blocks = ((at, bytes(self._window[at : at + BLOCK])) for at in range(0, WINDOW_SIZE, BLOCK))
        return {
            "latch": int.from_bytes(self._latch, "little"),
            "window": {f"{at:#06x}": block.hex() for at, block in blocks if any(block)},
        }

    def ports(self) -> tuple[tuple[int, int, Any], ...]:
        """(base, size, registers) for the bus."""
        return (
            (LATCH, 4, Bytes(self._latch)),
            (FLUSH, 4, Nothing()),
            (LATCH_BYTES, 4, Bytes(self._latch)),
            (LINES, LINE_COUNT, Lines(self._set_line)),
        )

    def window(self) -> Bytes:
        return Bytes(self._window)


def _unpack(blocks: object) -> bytearray:
    window = bytearray(WINDOW_SIZE)
    if not isinstance(blocks, dict):
        raise Incompatible(f"saved state of {ID}: window is not a table of blocks")
    known = {f"{at:#06x}": at for at in range(0, WINDOW_SIZE, BLOCK)}
    for name, block in blocks.items():  # pyright: ignore[reportUnknownVariableType]
        at = known.get(name) if isinstance(name, str) else None
        if at is None:
            raise Incompatible(f"saved state of {ID}: window has no block {name!r}")
        window[at : at + BLOCK] = saved.data(ID, f"window.{name}", block, BLOCK)
    return window


class Bytes:
    """Keeps what is written, at any width; ones behind its end."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    def read(self, offset: int, size: int) -> int:
        found = bytes(self._data[offset : offset + size])
        return int.from_bytes(found.ljust(size, b"\xff"), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        there = min(size, len(self._data) - offset)
        self._data[offset : offset + there] = value.to_bytes(size, "little")[:there]


class Lines:
    """One port a line: held high by any value but 0."""

    def __init__(self, set_line: Callable[[int, bool], None]) -> None:
        self._set_line = set_line

    def read(self, offset: int, size: int) -> int:
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        del size
        self._set_line(offset, value != 0)


class Nothing:
    """QEMU maps a page anew when this port is written, to flush translations: ours need no flushing."""

    def read(self, offset: int, size: int) -> int:
        del offset
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """No effect."""
