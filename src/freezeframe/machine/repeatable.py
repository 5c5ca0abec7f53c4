"""A machine whose runs are the same each time: only its snapshot, its seed and its input decide what it does."""

from __future__ import annotations

from freezeframe import _core
from freezeframe.errors import InvalidState, Refused
from freezeframe.machine.live import StopReason, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe.machine.parts import Parts

# A host's clock has no part in what the guest does; the guest's own wall clock follows from the seed and the count.
_NOT_COMPARED = ("wall_ns", "host_wall_ns")


class RepeatableMachine:
    """One machine of the software engine that stands still unless `run_to` is being called.

    Guarantees: two of these, made of one snapshot with one seed and given the same input at the same counts, have the
    same state, memory and console output at the same count, to the bit, on either tier and however they were stopped on
    the way; neither the snapshot nor a disk is changed. One thread at a time, but for `interrupt`.
    """

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        self.engine = parts.report
        self.memory = parts.memory
        self._parts = parts
        self._begun = False
        self._interrupted = False
        self._contents: _core.MemoryContents | None = None
        self.stopped: StopReason | None = None
        """Why it ended: by itself or because it cannot go on."""
        self.asleep = False
        """Every vCPU is halted and no timer runs: only input would wake it."""

    @property
    def instructions(self) -> int:
        """What all vCPUs together have retired since the snapshot."""
        return self._parts.clock.counts()[0]

    @property
    def slept_ns(self) -> int:
        """Nanoseconds of the guest's time that no vCPU had anything to do, since the snapshot."""
        return self._parts.clock.counts()[1]

    def run_to(self, instructions: int) -> bool:
        """Executes until exactly so many instructions are retired; True when it got there.

        False: the guest ended (`stopped`), sleeps for ever (`asleep`), or `interrupt` was called.
        """
        parts = self._parts
        if not self._begun:
            self._begun = True
            for device in parts.virtual.values():
                device.resume()
        if self.stopped is None and self.instructions < instructions:
            parts.clock.set_limit(instructions)
            kind, code, message = parts.engine.run()
            if kind != "paused":
                self.stopped = StopReason(kind, failure(code or "", message or "") if kind == "failed" else None)
        there = self.instructions >= instructions
        self.asleep = not there and self.stopped is None and not self._interrupted
        return there

    def interrupt(self) -> None:
        """Makes a `run_to` on another thread come back soon, wherever it is."""
        self._interrupted = True
        self._parts.control.request_stop("paused")

    def receive(self, device: str, data: bytes) -> None:
        """Input for a console (`__console`, `__serial`), now. Raises `Refused`: no room, or no such console."""
        found = self._parts.virtual.get(device)
        receive = getattr(found, "receive", None)
        if receive is None:
            raise Refused(f"the machine has no console {device!r}")
        if receive(data) != len(data):
            raise Refused(f"the guest does not read its console {device}: its input buffer is full")

    def press_power_button(self) -> None:
        self._parts.press_power_button()

    def output(self, device: str) -> bytes:
        """What the guest printed on a console since the snapshot, the last `capture` bytes of it."""
        return self._parts.backends.consoles[device].output.read(0, 0)[1]

    def state(self) -> dict[str, Any]:
        """Everything but memory, as plain values: `cpu` and `devices`."""
        parts = self._parts
        clock = {name: value for name, value in parts.clock.state().items() if name not in _NOT_COMPARED}
        trails = {name: device.trail().hex() for name, device in parts.virtual.items() if hasattr(device, "trail")}
        vcpus = [parts.engine.state(number) for number in range(parts.config.cpus.boot_vcpus)]
        return {
            "cpu": {"clock": clock, "vcpus": vcpus, "turn": parts.engine.turn()[0]},
            "devices": {**{name: device.state() for name, device in parts.devices.items()}, "disk writes": trails},
        }

    def memory_digest(self, *, afresh: bool = False) -> bytes:
        """BLAKE3 of all RAM. The first call looks at all that was touched, later ones at what was written since.

        `afresh`: looks at everything again, also at what nobody said that it was written.
        """
        if self._contents is None or afresh:
            self._contents = _core.MemoryContents(self.memory, self._parts.engine)
        return self._contents.update(self._parts.engine)

    def memory_differences(self, other: RepeatableMachine, most: int) -> list[tuple[int, int]]:
        """(guest address, bytes) of chunks that differ, as of the last `memory_digest` of both."""
        if self._contents is None or other._contents is None:
            raise InvalidState("no memory digest was made yet")
        return self._contents.differences(other._contents, most)

    def turn(self) -> tuple[int, list[int]]:
        """Whose turn it is, and what each vCPU has executed."""
        return self._parts.engine.turn()

    def listing(self, vcpu: int) -> list[tuple[int, bytes, str]]:
        """(address, bytes, text) of what a vCPU executes next, up to a branch."""
        return self._parts.engine.listing(vcpu)

    def close(self) -> None:
        """Ends it and lets go of disks and memory; may be called again."""
        self._parts.backends.pause()
        self._parts.close()
        self._parts.backends.close()

    def __enter__(self) -> RepeatableMachine:  # noqa: PYI034 - typing.Self costs an import
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
