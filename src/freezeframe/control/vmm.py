"""The VMM: at most one machine, Cloud Hypervisor's states and transitions, and one method for each action.

Guarantees: actions happen one at a time, from whatever thread they come. A failed action leaves the VMM as it was: a
failed restore or boot leaves no half machine behind, a failed snapshot leaves the machine paused and whole. What the
guest does by itself (power-off, reset, an engine that cannot go on) arrives as a notice and is acted on in `run`.
"""

from __future__ import annotations

import os
import sys
from _queue import Empty, SimpleQueue
from _thread import RLock

from freezeframe.control.failures import BAD_REQUEST, NOT_FOUND, NOT_IMPLEMENTED, ActionFailed
from freezeframe.errors import EngineError, FreezeframeError, NotSupported, chain_messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from freezeframe.config import ResizeData, RestoreConfig, SnapshotConfig, VmConfig
    from freezeframe.control.events import EventMonitor
    from freezeframe.control.log import Log
    from freezeframe.control.ports import Backend, Machine, StopReason

# The release whose commands and REST API these are; clients look at it to know what they may ask for.
COMPATIBLE_VERSION = "53.0.0"
FILE_URL = "file://"
WARN, INFO = 0, 1  # levels of `control.log`, which is loaded only when there is a log
SENDING = ("Cannot send VM snapshot", "Failed to send migratable component snapshot")
RECEIVING = ("Cannot restore VM", "Failed to receive migratable component snapshot")


class Vmm:
    """One VMM process' worth of state. `run` must be running somewhere for the guest's own power-off to be noticed."""

    def __init__(
        self,
        backend: Backend,
        *,
        events: EventMonitor | None = None,
        log: Log | None = None,
        no_shutdown: bool = False,
        no_reboot: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._backend = backend
        self._events = events
        self._log = log
        self._no_shutdown = no_shutdown
        self._no_reboot = no_reboot
        self._report = report or _to_stderr
        self._lock = RLock()
        self._notices: SimpleQueue[Callable[[], int | None]] = SimpleQueue()
        self._config: VmConfig | None = None
        self._machine: Machine | None = None
        self._source: dict[str, Any] | None = None
        # Why the machine could not go on, once that has ended the VMM.
        self.failure: FreezeframeError | None = None
        self.emit("vmm", "starting")

    # The loop.

    def run(self) -> int:
        """Act on notices until the VMM ends; the process' exit status. All machines are closed then."""
        while True:
            try:
                # Bounded: a signal that comes just before the wait is acted on only when it ends.
                notice = self._notices.get(timeout=1)
            except Empty:
                continue
            status = notice()
            if status is not None:
                self.close()
                return status

    def request_exit(self, status: int = 0) -> None:
        """End `run`. Safe from any thread and from a signal handler."""
        self._notices.put(lambda: status)

    def close(self) -> None:
        """Close the machine, whatever its state."""
        with self._lock:
            self._drop_machine()

    def emit(self, source: str, event: str) -> None:
        self.log(INFO, f"Event: source = {source} event = {event}")
        if self._events is not None:
            self._events.emit(source, event)

    def log(self, level: int, text: str) -> None:
        """A warning is written to stderr where there is no log."""
        if self._log is None and level == WARN:
            from freezeframe.control.log import Log

            self._log = Log(WARN)
        if self._log is not None:
            self._log.write(level, text)

    # VMM actions.

    def ping(self) -> dict[str, Any]:
        from freezeframe import __version__

        return {
            "build_version": f"v53.0+freezeframe.{__version__}",
            "version": COMPATIBLE_VERSION,
            "pid": os.getpid(),
            "features": ["software"],
        }

    def vmm_shutdown(self) -> None:
        with self._lock:
            self.delete()
            self.emit("vmm", "shutdown")
        self.request_exit(0)

    # Machine actions.

    def create(self, config: VmConfig) -> None:
        from freezeframe.config import refuse_unsupported, validate

        top = "The VM could not be created"
        with self._lock:
            if self._config is not None:
                raise ActionFailed(top, "VM is already created")
            try:
                validate(config)
                refuse_unsupported(config)
            except NotSupported as error:
                raise ActionFailed(top, "Failed to validate config", status=BAD_REQUEST, cause=error) from error
            except FreezeframeError as error:
                raise ActionFailed(top, "Failed to validate config", cause=error) from error
            self._config = config
            self._source = None

    def boot(self) -> None:
        top = "The VM could not boot"
        with self._lock:
            if self._machine is not None:
                raise ActionFailed(top, "VM is already created")
            self.emit("vm", "booting")
            if self._config is None:
                raise ActionFailed(top, "VM config is missing", status=NOT_FOUND)
            self._start(top)
            self.emit("vm", "booted")

    def _start(self, top: str, old: Machine | None = None) -> None:
        assert self._config is not None
        config = self._config.with_device_ids()
        machine: Machine | None = None
        try:
            machine = self._backend.boot(config) if old is None else self._backend.reboot(old, config)
            self.log(INFO, machine.start_note)
            self._adopt(machine)
            machine.resume()
        except (FreezeframeError, OSError) as error:
            self._machine = None
            if machine is not None:
                machine.close()
            raise ActionFailed(top, cause=error) from error
        self._config = config

    def info(self) -> dict[str, Any]:
        with self._lock:
            config, machine = self._config, self._machine
            if config is None:
                raise ActionFailed("The VM info is not available", "VM is not created", status=NOT_FOUND)
            if machine is not None:
                config = self._backend.shown_config(machine, config)
            info: dict[str, Any] = {
                "config": config.to_plain(),
                "state": self.state,
                "memory_actual_size": config.memory_actual_size,
            }
            if machine is not None:
                tree = self._backend.device_tree(machine)
                if tree is not None:
                    info["device_tree"] = tree
                info["engine"] = {"name": machine.engine.name, "reason": machine.engine.reason}
                faults = machine.faults()
                if faults:
                    info["faults"] = faults
                if self._source is not None:
                    info["restored"] = self._source
            return info

    @property
    def machine(self) -> Machine | None:
        """The machine, if one was booted or restored."""
        return self._machine

    @property
    def config(self) -> VmConfig | None:
        return self._config

    @property
    def state(self) -> str:
        """CH's `VmState`."""
        return "Created" if self._machine is None else self._machine.state.capitalize()

    def counters(self) -> dict[str, dict[str, int]]:
        with self._lock:
            return self._running("The VM info is not available").counters()

    def pause(self) -> None:
        top = "The VM could not be paused"
        with self._lock:
            machine = self._running(top)
            self._check_transition(machine, "Paused", top, "Cannot pause VM", "Failed to pause migratable component")
            self.emit("vm", "pausing")
            self._attempt(machine.pause, top, "Cannot pause VM", "Failed to pause migratable component")
            self.emit("vm", "paused")

    def resume(self) -> None:
        top = "The VM could not resume"
        with self._lock:
            machine = self._running(top)
            self._check_transition(machine, "Running", top, "Cannot resume VM", "Failed to resume migratable component")
            self.emit("vm", "resuming")
            self._attempt(machine.resume, top, "Cannot resume VM", "Failed to resume migratable component")
            self.emit("vm", "resumed")

    def snapshot(self, request: SnapshotConfig) -> None:
        top = "The VM could not be snapshotted"
        with self._lock:
            machine = self._running(top)
            self.emit("vm", "snapshotting")
            if machine.state != "paused":
                state = machine.state
                text = f"Trying to snapshot while VM is {state}"
                raise ActionFailed(top, "Cannot snapshot VM", "Failed to snapshot migratable component", text)
            directory = directory_of(request.destination_url, top, "Cannot send VM snapshot")
            assert self._config is not None
            try:
                self._backend.snapshot(directory, self._config, machine)
            except (FreezeframeError, OSError) as error:
                raise ActionFailed(top, *_unless_chained(error, *SENDING), cause=error) from error
            self.emit("vm", "snapshotted")

    def restore(self, request: RestoreConfig) -> None:
        top = "The VM could not be restored"
        with self._lock:
            if self._config is not None:
                raise ActionFailed(top, "VM is already created")
            directory = directory_of(request.source_url, top, "Cannot restore VM")
            try:
                request.validate()
            except NotSupported as error:
                raise ActionFailed(top, "Failed to validate config", status=BAD_REQUEST, cause=error) from error
            except FreezeframeError as error:
                raise ActionFailed(top, "Failed to validate config", cause=error) from error
            self.emit("vm", "restoring")
            try:
                config, machine = self._backend.restore(directory, request)
            except (FreezeframeError, OSError) as error:
                raise ActionFailed(top, *_unless_chained(error, *RECEIVING), cause=error) from error
            self._config = config
            self._adopt(machine)
            mode = self._backend.memory_mode(machine, request)
            self._source = {"source_url": request.source_url, "memory_restore_mode": mode, "clock": request.clock}
            self.emit("vm", "restored")
            if request.resume:
                try:
                    self.resume()
                except ActionFailed as error:
                    self.delete()
                    raise ActionFailed(top, *error.texts[1:]) from error

    def shutdown(self) -> None:
        with self._lock:
            self._running("The VM could not shutdown")
            self._drop_machine()
            self.emit("vm", "shutdown")

    def reboot(self) -> None:
        top = "The VM could not reboot"
        with self._lock:
            self.emit("vm", "rebooting")
            if self._machine is None:
                raise ActionFailed(top, "VM is not created", status=NOT_FOUND)
            old, self._machine = self._machine, None
            _watch(old, _ignore)
            self._source = None
            self._start(top, old)
            self.emit("vm", "rebooted")

    def delete(self) -> None:
        """Forget the machine and its configuration; nothing happens when there is none."""
        with self._lock:
            if self._config is None:
                return
            if self._machine is not None:
                self.shutdown()
            self._config = None
            self._source = None
            self.emit("vm", "deleted")

    def power_button(self) -> None:
        top = "Error triggering power button"
        with self._lock:
            self._attempt(self._running(top).power_button, top)

    def nmi(self) -> None:
        with self._lock:
            self._running("Error triggering NMI")
            raise ActionFailed("Error triggering NMI", _UNSUPPORTED.format("vm.nmi"), status=NOT_IMPLEMENTED)

    def resize(self, request: ResizeData) -> None:
        """A machine that was not booted yet may be resized; hot-plug is not supported."""
        from freezeframe.config import refuse_unsupported, validate

        top = "The VM could not be resized"
        with self._lock:
            if self._config is None:
                raise ActionFailed(top, "VM is not created", status=NOT_FOUND)
            if self._machine is not None or request.desired_balloon is not None:
                raise ActionFailed(top, _UNSUPPORTED.format("Resizing a booted VM"), status=NOT_IMPLEMENTED)
            cpus, memory = self._config.cpus, self._config.memory
            if request.desired_vcpus is not None:
                cpus = cpus.replace(boot_vcpus=request.desired_vcpus, max_vcpus=request.desired_vcpus)
            if request.desired_ram is not None:
                memory = memory.replace(size=request.desired_ram)
            changed = self._config.replace(cpus=cpus, memory=memory)
            try:
                validate(changed)
                refuse_unsupported(changed)
            except FreezeframeError as error:
                raise ActionFailed(top, "Failed to validate config", cause=error) from error
            self._config = changed

    # What the machine does by itself.

    def _adopt(self, machine: Machine) -> None:
        self._machine = machine
        self.log(INFO, f"CPU engine {machine.engine.name}: {machine.engine.reason}")
        if machine.engine.warning is not None:
            self.log(WARN, machine.engine.warning)
        _watch(machine, lambda reason: self._notices.put(lambda: self._stopped(machine, reason)))

    def _stopped(self, machine: Machine, reason: StopReason) -> int | None:
        """Act on the end of the vCPUs; the exit status when the VMM is to end."""
        with self._lock:
            if machine is not self._machine:
                return None  # closed by an action meanwhile
            if reason.kind == "reset":
                return self._reset()
            if reason.kind == "failed":
                self.failure = reason.error or EngineError("the CPU engine stopped without saying why")
                self._report(describe("The VM was stopped because it cannot go on", chain_messages(self.failure)))
                self.delete()
                return 1
            if self._no_shutdown:
                self.shutdown()
                return None
            self.delete()
            self.emit("vmm", "shutdown")
            return reason.status or 0

    def _reset(self) -> int | None:
        if self._no_reboot:
            self._report("The guest asked for a reset (or its first exception handler failed): the machine ends")
            self.delete()
            self.emit("vmm", "shutdown")
            return 0
        try:
            self.reboot()
        except ActionFailed as error:
            self._report(describe("The guest asked for a reset", error.texts))
            return 1
        return None

    # Pieces.

    def _drop_machine(self) -> None:
        machine, self._machine = self._machine, None
        if machine is not None:
            _watch(machine, _ignore)
            machine.close()

    def _running(self, top: str) -> Machine:
        if self._machine is None:
            raise ActionFailed(top, "VM is not running")
        return self._machine

    def _check_transition(self, machine: Machine, to: str, *chain: str) -> None:
        state = machine.state.capitalize()
        if (state, to) not in _TRANSITIONS:
            raise ActionFailed(*chain, f"Invalid transition: InvalidStateTransition({state}, {to})")

    @staticmethod
    def _attempt(action: Callable[[], None], *chain: str) -> None:
        try:
            action()
        except (FreezeframeError, OSError) as error:
            raise ActionFailed(*chain, cause=error) from error


def _watch(machine: Any, notice: Callable[[StopReason], object]) -> None:
    machine.on_stop = notice


def _ignore(_reason: StopReason) -> None:
    """For a machine that is being closed."""


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# vm.rs, `VmState::valid_transition`, for the two states that a client can ask for.
_TRANSITIONS = frozenset(
    {
        ("Created", "Running"),
        ("Created", "Paused"),
        ("Running", "Paused"),
        ("Paused", "Running"),
        ("Shutdown", "Running"),
    }
)
_UNSUPPORTED = "{} is not supported by this VMM"


def directory_of(url: str, *chain: str) -> str:
    """The directory that a `file://` URL names; no percent-decoding, as CH."""
    link = "Failed to send migratable component snapshot"  # CH says "send" on restore too
    if not url.startswith(FILE_URL):
        raise ActionFailed(*chain, link, f"Could not extract path from URL: {url}")
    path = url.removeprefix(FILE_URL)
    if "\0" in path or not os.path.isdir(path):
        from freezeframe._core import debug_text
        from freezeframe.errors import NotFound, Refused

        there = "\0" not in path and os.path.lexists(path)
        why = Refused(f"{path!r} is not a directory") if there else NotFound(f"there is no directory {path!r}")
        raise ActionFailed(*chain, link, f"Destination is not a directory: {debug_text(path)}") from why
    return path


def describe(top: str, texts: list[str]) -> str:
    """Several lines for a terminal: what happened, then why, one cause a line."""
    return "\n".join([f"Error: {top}:", *_numbered(texts)])


def _numbered(texts: list[str]) -> Iterator[str]:
    return (f"  {index}: {text}" for index, text in enumerate(texts))


def _unless_chained(error: BaseException, *links: str) -> tuple[str, ...]:
    """CH's links between the action and its cause, unless the error brings its own."""
    return () if getattr(error, "chain", ()) else links


def unsupported(top: str, name: str) -> NoReturn:
    """Refuse an action that CH has and we do not."""
    raise ActionFailed(top, _UNSUPPORTED.format(name), status=NOT_IMPLEMENTED)
