"""Programmable interval timer (Intel 231164, "8254") at ports 0x40 to 0x43; port 0x61 gates its third channel.

Counts are functions of the machine's clock. Only the output of channel 0 moves by itself: a thread waits for its edges
while the machine runs. Edges that nobody could see (a machine that stood, a host too slow) become one.
"""

from __future__ import annotations

import threading

from freezeframe.devices import saved
from freezeframe.errors import Incompatible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from freezeframe._core import Clock

ID = "__pit"
BASE = 0x40
SIZE = 4
CONTROL = 3

HZ = 1_193_182
SECOND_NS = 1_000_000_000
TICK_MAX = (1 << 64) - 1
# Memory refresh toggles port 0x61's bit 4 every 15 µs.
REFRESH_TICKS = 18
# Seconds; then it looks again.
WAIT_MAX = 3600.0

LOW, HIGH, BOTH = 1, 2, 3
# A channel's state. `reload` is the count as a number of ticks, 0 before the first; `start` the tick at which it began
# to count, `frozen` the ticks that it had counted when its gate fell; `latched` how many bytes wait in `latch`.
FIELDS = {
    "mode": 5,
    "bcd": 1,
    "access": BOTH,
    "reload": 0x1_0000,
    "start": TICK_MAX,
    "frozen": TICK_MAX,
    "gate": 1,
    "triggered": 1,
    "null": 1,
    "low": 0xFF,
    "second_write": 1,
    "second_read": 1,
    "latched": 2,
    "latch": 0xFFFF,
    "status_latched": 1,
    "status": 0xFF,
}


class Channel:
    """One counter. `now` is in ticks of the PIT's clock."""

    __slots__ = tuple(FIELDS)

    mode: int
    bcd: int
    access: int
    reload: int
    start: int
    frozen: int
    gate: int
    triggered: int
    null: int
    low: int
    second_write: int
    second_read: int
    latched: int
    latch: int
    status_latched: int
    status: int

    def __init__(self, state: Mapping[str, int]) -> None:
        for name in FIELDS:
            setattr(self, name, state[name])

    def state(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in FIELDS}

    def elapsed(self, now: int) -> int:
        """Ticks counted since the count was loaded or the gate triggered it."""
        return max(0, now - self.start) if self.gate or self.mode in (1, 5) else self.frozen

    def output(self, now: int) -> bool:
        if not self.reload or not self.triggered:
            return self.mode != 0
        done = self.elapsed(now)
        if self.mode in (0, 1):
            return done >= self.reload
        if self.mode == 2:
            return not self.gate or done % self.reload != self.reload - 1
        if self.mode == 3:
            return not self.gate or done % self.reload < (self.reload + 1) // 2
        return done != self.reload

    def last_rise(self, now: int) -> int | None:
        """The latest tick up to `now` at which the output rose by counting."""
        if not self.reload or not self.triggered or not self.gate:
            return None
        done = self.elapsed(now)
        if self.mode in (2, 3):
            return self.start + done - done % self.reload if done >= self.reload else None
        at = self.reload + (self.mode in (4, 5))
        return self.start + at if done >= at else None

    def next_rise(self, now: int) -> int | None:
        if not self.reload or not self.triggered or not self.gate:
            return None
        done = self.elapsed(now)
        if self.mode in (2, 3):
            return self.start + (done // self.reload + 1) * self.reload
        at = self.reload + (self.mode in (4, 5))
        return self.start + at if done < at else None

    def count(self, now: int) -> int:
        """What the counting element shows, as it is read."""
        modulus = 10_000 if self.bcd else 0x1_0000
        if not self.reload:
            return 0
        done = self.elapsed(now) if self.triggered else 0
        if self.mode == 2:
            value = self.reload - done % self.reload
        elif self.mode == 3:
            value = self.reload - 2 * done % self.reload
        else:
            value = self.reload - done
        value %= modulus
        return int(f"{value:04d}", 16) if self.bcd else value

    def control(self, value: int, now: int) -> None:
        """A control word for this channel: access, mode, number system; or a latch of its count."""
        access = value >> 4 & 3
        if not access:
            self.latch_count(now)
            return
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = value & 1
        self.access = access
        self.reload = self.start = self.frozen = 0
        self.second_write = self.second_read = self.latched = self.status_latched = 0
        self.null = 1

    def latch_count(self, now: int) -> None:
        if not self.latched:
            count = self.count(now)
            self.latched = 2 if self.access == BOTH else 1
            self.latch = count >> 8 if self.access == HIGH else count

    def latch_status(self, now: int) -> None:
        if not self.status_latched:
            self.status_latched = 1
            self.status = self.output(now) << 7 | self.null << 6 | self.access << 4 | self.mode << 1 | self.bcd

    def write(self, value: int, now: int) -> None:
        if self.access == BOTH and not self.second_write:
            self.low, self.second_write = value, 1
            return
        self.second_write = 0
        self._load({LOW: value, HIGH: value << 8}.get(self.access, value << 8 | self.low), now)

    def _load(self, value: int, now: int) -> None:
        if self.bcd:
            digits = (value >> shift & 15 for shift in (12, 8, 4, 0))
            count = 0
            for digit in digits:
                count = count * 10 + digit
            self.reload = count or 10_000
        else:
            self.reload = value or 0x1_0000
        self.start, self.frozen, self.null = now, 0, 0
        self.triggered = int(self.mode not in (1, 5))

    def read(self, now: int) -> int:
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.latched:
            value = self.latch & 0xFF
            self.latch >>= 8
            self.latched -= 1
            return value
        count = self.count(now)
        if self.access == BOTH:
            self.second_read ^= 1
            return count & 0xFF if self.second_read else count >> 8
        return count >> 8 if self.access == HIGH else count & 0xFF

    def set_gate(self, gate: int, now: int) -> None:
        if gate == self.gate:
            return
        if not gate:
            self.frozen = self.elapsed(now)
        elif self.mode in (0, 4):
            self.start = max(0, now - self.frozen)
        else:
            self.start, self.triggered = now, 1
        self.gate = gate


class Pit:
    """Guarantee: the thread exists only between `resume` and `pause`, so that nothing moves while a machine stands."""

    def __init__(self, state: Mapping[str, Any], clock: Clock, irq0: Callable[[bool], None]) -> None:
        """`irq0`: the level of channel 0's output."""
        values = saved.keys(ID, state, {"channels": 0, "risen": 0, "speaker": 0})
        channels = values["channels"]
        if not isinstance(channels, list) or len(channels) != 3:  # pyright: ignore[reportUnknownArgumentType]
            raise Incompatible(f"saved state of {ID}: channels are not three")
        self._channels = [Channel(saved.fields(f"{ID}.channels", channel, FIELDS)) for channel in channels]
        # The tick of the last rising edge that was passed on.
        self._risen = saved.integer(ID, "risen", values["risen"], TICK_MAX)
        self._speaker = saved.integer(ID, "speaker", values["speaker"], 1)
        self._clock = clock
        self._irq0 = irq0
        self._changed = threading.Condition()
        self._runs = False
        self._thread: threading.Thread | None = None

    @staticmethod
    def cold() -> dict[str, Any]:
        """As firmware leaves it: channel 0 ticks at 18.2 Hz."""
        blank = dict.fromkeys(FIELDS, 0) | {"access": BOTH, "mode": 2, "gate": 1, "triggered": 1, "reload": 0x1_0000}
        channels = [dict(blank), blank | {"reload": REFRESH_TICKS}, blank | {"mode": 3, "gate": 0}]
        return {"channels": channels, "risen": 0, "speaker": 0}

    def state(self) -> dict[str, Any]:
        with self._changed:
            channels = [channel.state() for channel in self._channels]
            return {"channels": channels, "risen": self._risen, "speaker": self._speaker}

    # Registers.

    def read(self, offset: int, size: int) -> int:
        if size != 1 or offset == CONTROL:
            return (1 << 8 * size) - 1
        with self._changed:
            return self._channels[offset].read(self._now())

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 1:
            return
        with self._changed:
            now = self._now()
            if offset == CONTROL:
                self._control(value, now)
            else:
                self._channels[offset].write(value, now)
            if offset in (0, CONTROL):
                self._risen = now
                self._irq0(self._channels[0].output(now))
                self._changed.notify()

    def _control(self, value: int, now: int) -> None:
        number = value >> 6
        if number < 3:
            self._channels[number].control(value, now)
            return
        for number, channel in enumerate(self._channels):  # read-back
            if value >> 1 + number & 1:
                if not value & 0x20:
                    channel.latch_count(now)
                if not value & 0x10:
                    channel.latch_status(now)

    def read_port_b(self) -> int:
        with self._changed:
            now = self._now()
            third = self._channels[2]
            refresh = now // REFRESH_TICKS & 1
            return third.gate | self._speaker << 1 | refresh << 4 | third.output(now) << 5

    def write_port_b(self, value: int) -> None:
        with self._changed:
            self._channels[2].set_gate(value & 1, self._now())
            self._speaker = value >> 1 & 1

    # Time.

    def resume(self) -> None:
        with self._changed:
            self._runs = True
        self._thread = threading.Thread(target=self._tick, name="pit", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        with self._changed:
            self._runs = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _now(self) -> int:
        return self._clock.state()["boot_ns"] * HZ // SECOND_NS

    def _tick(self) -> None:
        channel = self._channels[0]
        with self._changed:
            while self._runs:
                now = self._now()
                last = channel.last_rise(now)
                if last is not None and last > self._risen:
                    self._risen = last
                    self._irq0(False)
                    self._irq0(True)
                following = channel.next_rise(now)
                # Rounded up, or the thread would wake before the edge; bounded, because Python's waits are.
                wait = None if following is None else ((following - now + 1) * SECOND_NS // HZ + 1) / SECOND_NS
                wait = None if wait is None else min(wait, WAIT_MAX)
                self._changed.wait(wait)
