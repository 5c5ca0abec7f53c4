"""The few PC ports without which kernels complain: i8042 reset line, POST code port, ACPI sleep port and PM timer."""

from __future__ import annotations

from _thread import allocate_lock

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from freezeframe._core import Clock
    from freezeframe.devices.pit import Pit


class I8042:
    """Ports 0x61 to 0x64: just enough of the keyboard controller to reset the machine by (command 0xfe)."""

    ID = "__i8042"
    BASE = 0x61
    SIZE = 4
    PORT_B = 0
    COMMAND = 3
    # Timer 2's output: without it Linux's PIT calibration waits for ever.
    PORT_B_VALUE = 0x20
    PULSE_RESET = 0xFE

    def __init__(self, state: Mapping[str, Any], reset: Callable[[], None]) -> None:
        saved.fields(self.ID, state, {})
        self._reset = reset
        self._timer: Pit | None = None

    def use_timer(self, timer: Pit) -> None:
        """A machine with a PIT has its gate and output in port B."""
        self._timer = timer

    def state(self) -> dict[str, Any]:
        """Nothing to remember: all it reads is constant, or the PIT's."""
        return {}

    def read(self, offset: int, size: int) -> int:
        if self._timer is not None and offset == self.PORT_B and size == 1:
            return self._timer.read_port_b()
        return self.PORT_B_VALUE if offset == self.PORT_B and size == 1 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 1 and offset == self.COMMAND and value == self.PULSE_RESET:
            self._reset()
        elif size == 1 and offset == self.PORT_B and self._timer is not None:
            self._timer.write_port_b(value)


class DebugPort:
    """Port 0x80: firmware's progress codes, Linux's I/O delay. Reads give the last code back."""

    ID = "__debug_port"
    BASE = 0x80
    SIZE = 1

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._code = saved.fields(self.ID, state, {"code": 0xFF})["code"]

    @staticmethod
    def cold() -> dict[str, Any]:
        return {"code": 0}

    def state(self) -> dict[str, Any]:
        return {"code": self._code}

    def read(self, offset: int, size: int) -> int:
        del offset
        return self._code | ((1 << 8 * size) - 1 & ~0xFF)

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size
        self._code = value & 0xFF


class AcpiSleep:
    """Port 0x600: the ACPI reset register (value 1) and sleep control register (S5 enters power-off)."""

    ID = "__acpi_sleep"
    BASE = 0x600
    SIZE = 8
    RESET = 1
    S5 = 5 << 2 | 1 << 5  # SLP_TYP 5, SLP_EN

    def __init__(self, state: Mapping[str, Any], reset: Callable[[], None], power_off: Callable[[], None]) -> None:
        saved.fields(self.ID, state, {})
        self._reset = reset
        self._power_off = power_off

    def state(self) -> dict[str, Any]:
        """Nothing to remember: both registers read as zero."""
        return {}

    def read(self, offset: int, size: int) -> int:
        del offset, size
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset or size != 1:
            return
        if value == self.RESET:
            self._reset()
        elif value == self.S5:
            self._power_off()


class PmTimer:
    """Port 0x608: the ACPI PM timer, 32 bits at 3.579545 MHz."""

    ID = "__pm_timer"
    BASE = 0x608
    SIZE = 4

    def __init__(self, state: Mapping[str, Any], clock: Clock) -> None:
        saved.fields(self.ID, state, {})
        self._clock = clock

    def state(self) -> dict[str, Any]:
        """Nothing of its own: it is a function of the machine's clock, which is saved."""
        return {}

    def read(self, offset: int, size: int) -> int:
        return self._clock.pm_timer() >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""


class EventDevice:
    """ACPI generic event device: one byte that says what happened (reading clears it) and one interrupt."""

    ID = "__ged"
    SIZE = 1
    POWER_BUTTON = 8

    def __init__(self, state: Mapping[str, Any], pulse: Callable[[], None]) -> None:
        """`pulse`: raises and lowers the interrupt line (edge)."""
        self._pending = saved.fields(self.ID, state, {"pending": 0xFF})["pending"]
        self._pulse = pulse
        # The button is pressed by another thread than the guest's.
        self._lock = allocate_lock()

    @staticmethod
    def cold() -> dict[str, Any]:
        return {"pending": 0}

    def state(self) -> dict[str, Any]:
        return {"pending": self._pending}

    def read(self, offset: int, size: int) -> int:
        del offset, size
        with self._lock:
            pending, self._pending = self._pending, 0
        return pending

    def write(self, offset: int, size: int, value: int) -> None:
        """Read-only."""

    def power_button(self) -> None:
        with self._lock:
            self._pending |= self.POWER_BUTTON
        self._pulse()
