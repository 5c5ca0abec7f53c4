"""A pair of 8259A interrupt controllers at ports 0x20 and 0xa0, cascaded by input 2 (Intel 231468, "8259A").

Inputs come from the PIT (0) and from pc-testdev; all other devices have the I/O APIC only.
"""

from __future__ import annotations

from _thread import allocate_lock

from freezeframe.devices import saved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

ID = "__pic"
FIRST, SECOND, TRIGGER = 0x20, 0xA0, 0x4D0
CASCADE = 2
SPURIOUS = 7
# Inputs that may be level-triggered: not the timer, keyboard, cascade, clock and coprocessor.
TRIGGER_MASKS = (0xF8, 0xDE)

ICW1, OCW3 = 0x10, 0x08
# What a byte may be for each field; all of a chip's state.
FIELDS = {
    "lines": 0xFF,
    "irr": 0xFF,
    "isr": 0xFF,
    "imr": 0xFF,
    "trigger": 0xFF,
    "base": 0xF8,
    "first": 7,
    "step": 3,
    "wants_icw4": 1,
    "single": 1,
    "auto_eoi": 1,
    "rotate": 1,
    "nested": 1,
    "special_mask": 1,
    "read_isr": 1,
    "poll": 1,
}


class Chip:
    """One 8259A. `first`: the input with the highest priority; `step`: the initialisation word to come, or 0."""

    __slots__ = (*FIELDS, "_is_first")

    lines: int
    irr: int
    isr: int
    imr: int
    trigger: int
    base: int
    first: int
    step: int
    wants_icw4: int
    single: int
    auto_eoi: int
    rotate: int
    nested: int
    special_mask: int
    read_isr: int
    poll: int

    def __init__(self, state: Mapping[str, int], *, is_first: bool) -> None:
        self._is_first = is_first
        for name in FIELDS:
            setattr(self, name, state[name])

    def state(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in FIELDS}

    def set_line(self, number: int, level: bool) -> None:
        bit = 1 << number
        if not level:
            self.lines &= ~bit
            if self.trigger & bit:
                self.irr &= ~bit
        elif self.trigger & bit or not self.lines & bit:
            self.lines |= bit
            self.irr |= bit

    def wanted(self) -> int | None:
        """The input whose interrupt comes next."""
        number = self._highest(self.irr & ~self.imr)
        if number is None:
            return None
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        if self.nested and self._is_first:
            serving &= ~(1 << CASCADE)  # the second chip has priorities of its own
        current = self._highest(serving)
        if current is not None and self._rank(current) <= self._rank(number):
            return None
        return number

    def acknowledge(self, number: int) -> None:
        bit = 1 << number
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate:
            self.first = number + 1 & 7
        if not self.trigger & bit:
            self.irr &= ~bit

    def read(self, port: int) -> int:
        if self.poll:
            self.poll = 0
            number = self.wanted()
            if number is None:
                return 0
            self.acknowledge(number)
            return 0x80 | number
        if port == 1:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, port: int, value: int) -> None:
        if port == 1:
            self._write_data(value)
        elif value & ICW1:
            self._initialise(value)
        elif value & OCW3:
            self.poll = value >> 2 & 1
            if value & 2:
                self.read_isr = value & 1
            if value & 0x40:
                self.special_mask = value >> 5 & 1
        else:
            self._end(value >> 5, value & 7)

    def _initialise(self, value: int) -> None:
        for name in ("isr", "imr", "first", "auto_eoi", "rotate", "nested", "special_mask", "read_isr", "poll"):
            setattr(self, name, 0)
        self.irr = self.lines & self.trigger  # edges must come anew
        self.wants_icw4 = value & 1
        self.single = value >> 1 & 1
        self.step = 1

    def _write_data(self, value: int) -> None:
        after = 3 if self.wants_icw4 else 0
        if self.step == 1:
            self.base = value & 0xF8
            self.step = after if self.single else 2
        elif self.step == 2:
            self.step = after  # who is cascaded where is wired
        elif self.step == 3:
            self.nested = value >> 4 & 1
            self.auto_eoi = value >> 1 & 1
            self.step = 0
        else:
            self.imr = value

    def _end(self, command: int, number: int) -> None:
        """OCW2: ends of interrupts and priorities."""
        if command in (0, 4):
            self.rotate = command >> 2
        elif command in (1, 5):
            serving = self._highest(self.isr)
            if serving is not None:
                self.isr &= ~(1 << serving)
                if command == 5:
                    self.first = serving + 1 & 7
        elif command in (3, 7):
            self.isr &= ~(1 << number)
            if command == 7:
                self.first = number + 1 & 7
        elif command == 6:
            self.first = number + 1 & 7

    def _rank(self, number: int) -> int:
        return number - self.first & 7

    def _highest(self, bits: int) -> int | None:
        return min((n for n in range(8) if bits >> n & 1), key=self._rank, default=None)


class Pic:
    """Both chips. Inputs may be moved from any thread; `acknowledge` is called by the engine."""

    def __init__(self, state: Mapping[str, Any], intr: Callable[[bool], None]) -> None:
        """`intr`: the level of the output, whenever it may have changed."""
        values = saved.keys(ID, state, {"first": 0, "second": 0})
        for name, chip in values.items():
            saved.fields(f"{ID}.{name}", chip, FIELDS)
        self._chips = (Chip(values["first"], is_first=True), Chip(values["second"], is_first=False))
        self._intr = intr
        self._lock = allocate_lock()
        self._update()

    @staticmethod
    def cold() -> dict[str, Any]:
        """As firmware leaves it: vectors 0x08 and 0x70, the timer and the cascade open."""
        blank = dict.fromkeys(FIELDS, 0)
        return {"first": blank | {"base": 0x08, "imr": 0xFA}, "second": blank | {"base": 0x70, "imr": 0xFF}}

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {"first": self._chips[0].state(), "second": self._chips[1].state()}

    def set_line(self, number: int, level: bool) -> None:
        """Input 0 to 15. Input 2 is the cascade and cannot be pulled from outside."""
        with self._lock:
            if number != CASCADE:
                self._chips[number >> 3].set_line(number & 7, level)
            self._update()

    def acknowledge(self) -> int:
        """The vector; that of input 7 when whoever asked has gone."""
        with self._lock:
            first, second = self._chips
            number = first.wanted()
            if number is None:
                vector = first.base + SPURIOUS
            elif number == CASCADE:
                inner = second.wanted()
                vector = second.base + (SPURIOUS if inner is None else inner)
                if inner is not None:
                    second.acknowledge(inner)
                first.acknowledge(CASCADE)
            else:
                first.acknowledge(number)
                vector = first.base + number
            self._update()
            return vector

    def ports(self) -> tuple[tuple[int, int, Registers], ...]:
        """(base, size, registers) for the bus."""
        return (
            (FIRST, 2, Registers(self, 0)),
            (SECOND, 2, Registers(self, 1)),
            (TRIGGER, 2, Registers(self, None)),
        )

    def read(self, chip: int | None, port: int) -> int:
        with self._lock:
            if chip is None:
                return self._chips[port].trigger
            value = self._chips[chip].read(port)
            self._update()
            return value

    def write(self, chip: int | None, port: int, value: int) -> None:
        with self._lock:
            if chip is None:
                self._chips[port].trigger = value & TRIGGER_MASKS[port]
            else:
                self._chips[chip].write(port, value)
            self._update()

    def _update(self) -> None:
        first, second = self._chips
        first.set_line(CASCADE, second.wanted() is not None)
        self._intr(first.wanted() is not None)


class Registers:
    """Two ports of one chip, or the two trigger registers (`chip` None)."""

    def __init__(self, pic: Pic, chip: int | None) -> None:
        self._pic = pic
        self._chip = chip

    def read(self, offset: int, size: int) -> int:
        value = self._pic.read(self._chip, offset)
        return value if size == 1 else value | (1 << 8 * size) - 0x100

    def write(self, offset: int, size: int, value: int) -> None:
        """A word goes to both ports, as on an 8-bit bus."""
        for port in range(offset, min(2, offset + size)):
            self._pic.write(self._chip, port, value >> 8 * (port - offset) & 0xFF)
