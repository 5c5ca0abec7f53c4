"""A built machine: resume, pause, save, close."""

from __future__ import annotations

import threading

from freezeframe.errors import Damaged, EngineError, InvalidState, IoFailed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from freezeframe import _core
    from freezeframe.config import VmConfig
    from freezeframe.errors import FreezeframeError
    from freezeframe.machine.backends import Backends
    from freezeframe.machine.engine import EngineReport
    from freezeframe.machine.parts import Parts

    State = Literal["created", "running", "paused", "shutdown"]
    Kind = Literal["poweroff", "reset", "failed"]


class StopReason:
    """Why a machine stopped by itself: `poweroff`, `reset`, or `failed` with an error.

    `status`: what the guest said that the process is to end with (isa-debug-exit), if it did.
    """

    __slots__ = ("error", "kind", "status")

    def __init__(self, kind: Kind, error: FreezeframeError | None = None, status: int | None = None) -> None:
        self.kind: Kind = kind
        self.error = error
        self.status = status

    def __repr__(self) -> str:
        return f"<StopReason {self.kind}{f': {self.error}' if self.error else ''}>"


def failure(code: str, message: str) -> FreezeframeError:
    """What the engine reports, as an exception. `damaged`: snapshot memory that is not what was written."""
    return Damaged(message) if code == "damaged" else EngineError(message, detail={"code": code})


class Machine:
    """One virtual machine.

    Guarantees: between `pause` and `resume` no vCPU executes, no device moves a byte, and everything that the guest was
    told is written is on its disks; `save` then gives the whole machine but its RAM and changes nothing; a machine that
    stopped by itself has told `on_stop` exactly once, from the vCPU thread. All methods may be called from any thread.
    """

    def __init__(self, parts: Parts, *, state: State) -> None:
        self.config: VmConfig = parts.config
        self.engine: EngineReport = parts.report
        self.memory: _core.Memory = parts.memory
        self.start_note = ""  # of a booted machine: how its kernel got into memory
        self.on_stop: Callable[[StopReason], None] | None = None
        self.stopped: StopReason | None = None
        self._parts = parts
        self._state: State = state
        self._lock = threading.Lock()
        # Set while no vCPU executes and the thread has written down why.
        self._stands = threading.Event()
        self._stands.set()

    @property
    def state(self) -> State:
        return self._state

    @property
    def backends(self) -> Backends:
        """Open disks and console ends. After `release` they can be given to the machine that takes this one's place."""
        return self._parts.backends

    def resume(self) -> None:
        """Starts or goes on; raises `InvalidState` when running or shut down, `IoFailed` without a thread to run on."""
        with self._lock:
            if self._state not in ("created", "paused"):
                raise InvalidState(f"the machine is {self._state}: it cannot run")
            for device in self._parts.virtual.values():
                device.resume()
            self._parts.clock.resume()
            before, self._state = self._state, "running"
            self._stands.clear()
            try:
                threading.Thread(target=self._run, name="vcpus", daemon=True).start()
            except RuntimeError as error:
                self._state = before
                self._stands.set()
                self._parts.clock.pause()
                self._still()
                raise IoFailed("the host gives no thread for the vCPUs") from error
            self._parts.backends.resume()

    def _run(self) -> None:
        try:
            kind, code, message = self._parts.engine.run()
        except BaseException as error:  # a panic of the core is none less
            kind, code, message = "failed", "host", f"the engine broke: {error!r}"
        self._parts.clock.pause()
        if kind != "paused":
            broken = failure(code or "", message or "") if kind == "failed" else None
            self.stopped = StopReason(kind, broken, self._parts.exit_status if kind == "poweroff" else None)
            self._state = "shutdown"
            self._parts.backends.pause()
        self._stands.set()
        if self.stopped is not None and self.on_stop is not None:
            self.on_stop(self.stopped)

    def pause(self) -> None:
        """Returns when all vCPUs stand, block I/O is drained and writable disks are synced.

        Raises `InvalidState` when the machine is not running or stopped by itself meanwhile, `IoFailed` when a disk
        cannot be synced (the machine is paused all the same).
        """
        with self._lock:
            if self._state != "running":
                raise InvalidState(f"the machine is {self._state}: it cannot be paused")
            self._parts.control.request_stop("paused")
            self._parts.backends.pause()
            self._stands.wait()
            if self.stopped is not None:
                raise InvalidState(f"the machine stopped by itself ({self.stopped.kind}) before it could be paused")
            self._state = "paused"
            # The vCPUs first: what they ask for until then is still done here, and its interrupts are in their state.
            self._still()
            self._parts.backends.sync()

    def _still(self) -> None:
        for device in self._parts.virtual.values():
            device.pause()

    def save(self) -> dict[str, Any]:
        """The machine without its RAM, as plain values by component.

        Raises `InvalidState` unless it stands still, and `IoFailed` for a disk that could not be synced: its memory and
        the disk disagree for as long as the guest has not been told (its next flush fails).
        """
        with self._lock:
            if self._state not in ("created", "paused"):
                raise InvalidState(f"the machine is {self._state}: only a paused one can be saved")
            parts = self._parts
            parts.backends.sync()
            return {
                "clock": parts.clock.state(),
                "vcpus": [parts.engine.state(n) for n in range(parts.config.cpus.boot_vcpus)],
                "devices": {name: device.state() for name, device in parts.devices.items()},
                "disks": parts.backends.identities(),
            }

    def power_button(self) -> None:
        """Presses the ACPI power button; raises `InvalidState` unless the machine runs."""
        with self._lock:
            if self._state != "running":
                raise InvalidState(f"the machine is {self._state}: nobody is there to see its power button")
            self._parts.press_power_button()

    def counters(self) -> dict[str, dict[str, int]]:
        """What each device has done since the machine was built, by device id."""
        counted = ((name, getattr(device, "counters", None)) for name, device in self._parts.virtual.items())
        return {name: counters() for name, counters in counted if counters is not None}

    def faults(self) -> dict[str, str]:
        """Why devices have stopped until their driver resets them (virtio's NEEDS_RESET), by device id."""
        asked = ((name, getattr(device, "fault", None)) for name, device in self._parts.virtual.items())
        return {name: why for name, fault in asked if fault is not None and (why := fault()) is not None}

    def device_tree(self) -> dict[str, Any]:
        """The devices as `vm.info` shows them: ids, PCI addresses and BARs."""
        return self._parts.device_tree()

    def release(self) -> Backends:
        """Ends the machine but keeps its back ends open, for a machine that takes its place (a guest's reset)."""
        with self._lock:
            self._end()
            return self._parts.backends

    def close(self) -> None:
        """Ends the machine and lets go of disks and consoles. May be called at any time, and again."""
        with self._lock:
            self._end()
            self._parts.backends.close()

    def _end(self) -> None:
        if self._state == "running":
            self._parts.control.request_stop("paused")
            self._stands.wait()
        self._state = "shutdown"
        self._parts.backends.pause()
        self._parts.close()

    def __enter__(self) -> Machine:  # noqa: PYI034 - typing.Self costs an import
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
