"""Machines for Python programs: the actions of `Vmm`, run in the caller's process, with a console to talk to."""

from __future__ import annotations

import contextlib
import os
import threading

from freezeframe.control.failures import ActionFailed, bottom
from freezeframe.control.live import LiveBackend
from freezeframe.control.vmm import Vmm
from freezeframe.errors import (
    DeadlineExceeded,
    FreezeframeError,
    InvalidState,
    IoFailed,
    NotFound,
    Refused,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import Any, Literal, Self

    from freezeframe.backends.console import Console as Reader
    from freezeframe.backends.console import HostConsole
    from freezeframe.config import DiskConfig, VmConfig
    from freezeframe.control.ports import EngineReport
    from freezeframe.machine import Machine as LiveMachine

    Size = int | str
    AnyPath = str | PathLike[str]
    State = Literal["created", "running", "paused", "stopped"]

CAPTURE = 1 << 20
VIRTIO_CONSOLE = "__console"
SERIAL_CONSOLE = "__serial"


class Snapshot:
    """A handle on a snapshot directory; nothing is read until it is asked for."""

    def __init__(self, path: AnyPath) -> None:
        self.path = os.fspath(path)

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<Snapshot {self.path}>"

    def restore(
        self,
        *,
        memory: Literal["auto", "ondemand", "copy"] = "auto",
        clock: Literal["advance", "freeze"] = "advance",
        resume: bool = True,
        disks: Mapping[str, AnyPath] | None = None,
        disk_check: bool = True,
        engine: Literal["auto", "kvm", "software"] = "auto",
    ) -> Machine:
        """One machine from this snapshot; see `freezeframe.restore`."""
        return restore(
            self, memory=memory, clock=clock, resume=resume, disks=disks, disk_check=disk_check, engine=engine
        )


class Console:
    """One of the guest's consoles: what it prints, and a way to type. The last MiB of output is kept."""

    def __init__(self, machine: Machine, device_id: str) -> None:
        self._machine = machine
        self._device_id = device_id
        self._host: HostConsole | None = None
        self._reader: Reader | None = None
        try:
            self._end()
        except (InvalidState, NotFound):
            pass  # said again when it is used

    @property
    def text(self) -> str:
        """All output that is still kept."""
        return self._end().text

    def read(self, timeout: float | None = 0) -> str:
        """Output since the last `read` or `expect`; waits up to `timeout` seconds for some."""
        return self._end().read(timeout)

    def write(self, text: str | bytes) -> None:
        """Type `text`; a line ends with a newline character. `Refused` when the guest does not read, `InvalidState`
        when it has stopped.
        """
        self._end().write(text)

    def expect(self, pattern: str | re.Pattern[str], timeout: float | None = 60) -> re.Match[str]:
        """Wait for output that a regular expression matches; what comes before its end counts as read.

        `DeadlineExceeded` after `timeout` seconds, with the last output in the message; `InvalidState` when the
        machine stops before.
        """
        return self._end().expect(pattern, timeout)

    def _end(self) -> Reader:
        """The reader of the host's end, made once: it outlives the guest's resets, and the machine."""
        from freezeframe.backends.console import Console as Reader

        try:
            host = self._machine.host_console(self._device_id)
        except InvalidState:
            if self._reader is None:
                raise
            return self._reader
        if self._reader is None or host is not self._host:
            self._host = host
            keys: Any = _Keys(host)
            self._reader = Reader(host.output, keys, self._machine.has_ended)
        return self._reader


class _Keys:
    """Types into whichever device the console has at the time."""

    def __init__(self, host: HostConsole) -> None:
        self._host = host

    def receive(self, data: bytes) -> int:
        device = self._host.device
        return 0 if device is None else device.receive(data)


class Machine:
    """A virtual machine in this process; made by `freezeframe.boot` and `freezeframe.restore`.

    A context manager: the machine ends with the block. Any thread may call any method.
    """

    def __init__(self, vmm: Vmm, report: list[str]) -> None:
        self._vmm = vmm
        self._reports = report
        self._ended = threading.Event()
        self._status: int | None = None
        # The virtio console (hvc0) and the first serial port (ttyS0).
        self.console = Console(self, VIRTIO_CONSOLE)
        self.serial = Console(self, SERIAL_CONSOLE)
        threading.Thread(target=self._watch, name="vmm", daemon=True).start()

    def _watch(self) -> None:
        try:
            self._status = self._vmm.run()
        except BaseException as error:
            # Nobody would see it here: `wait` raises it.
            broken = FreezeframeError(f"the machine's own thread broke: {error!r}")
            broken.__cause__ = error
            self._vmm.failure = self._vmm.failure or broken
            with contextlib.suppress(Exception):
                self._vmm.close()
        finally:
            self._ended.set()

    def __repr__(self) -> str:
        if self.state == "stopped":
            return "<Machine stopped>"
        config = self.config
        size = f"{config.memory.size >> 20}M"
        return f"<Machine {self.state} {config.cpus.boot_vcpus} cpu {size} {self.engine.name}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def state(self) -> State:
        """`running`, `paused`, or `stopped` for good; `created` before the first instruction."""
        machine = self._vmm.machine
        if machine is None or machine.state == "shutdown":
            return "stopped"
        return machine.state

    @property
    def config(self) -> VmConfig:
        """What the machine was asked to be, with every default filled in."""
        config = self._vmm.config
        if config is None:
            raise InvalidState("the machine has stopped")
        return config

    @property
    def engine(self) -> EngineReport:
        """The CPU engine's `name`, and the `reason` why that one."""
        return self._live().engine

    def pause(self) -> None:
        """Returns when nothing executes, block I/O is drained and disks are synced. `InvalidState` unless running."""
        _do(self._vmm.pause)

    def resume(self) -> None:
        """Go on. `InvalidState` unless paused."""
        _do(self._vmm.resume)

    def snapshot(self, to: AnyPath) -> Snapshot:
        """Write the machine into a directory, made if it is not there (its parent must be).

        A running machine is paused meanwhile and goes on; a paused one stays paused. Disks are not copied: the
        snapshot remembers their state. `Busy` when the directory holds a snapshot already,
        `IoFailed` when it cannot be written.
        """
        from freezeframe.config import SnapshotConfig

        path: str = os.path.abspath(os.fspath(to))
        made = not os.path.isdir(path)
        if made:
            _make_directory(path)
        running = self.state == "running"
        try:
            if running:
                self.pause()
            _do(lambda: self._vmm.snapshot(SnapshotConfig(destination_url=f"file://{path}")))
        except BaseException:
            if made:
                # What is left in it is in the error.
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            raise
        finally:
            if running and self.state == "paused":
                self.resume()
        return Snapshot(path)

    def power_button(self) -> None:
        """Press the ACPI power button; what the guest does about it is its business."""
        _do(self._vmm.power_button)

    def wait(self, timeout: float | None = None) -> None:
        """Until the guest has powered off.

        `EngineError` or `Damaged` when it could not go on, `DeadlineExceeded` after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise DeadlineExceeded(f"the machine did not stop within {timeout} seconds")
        if self._vmm.failure is not None:
            raise self._vmm.failure
        if self._status:
            raise FreezeframeError("\n".join(self._reports) or "the machine was stopped")

    def stop(self, timeout: float | None = 10) -> None:
        """Press the power button, wait, and end the machine when it has not powered off by then."""
        if self.state == "running":
            self.power_button()
            self._ended.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End the machine at once; nothing happens when it has ended."""
        self._vmm.request_exit()
        self._ended.wait()

    def has_ended(self) -> bool:
        """Stopped for good, whoever did it."""
        return self._ended.is_set()

    def host_console(self, device_id: str) -> HostConsole:
        """The host's end of a console of the machine that runs now; `NotFound` when it has none by that id."""
        host = self._live().backends.consoles.get(device_id)
        if host is None:
            raise NotFound(f"the machine has no console {device_id}: its configuration says off")
        return host

    def _live(self) -> LiveMachine:
        machine = self._vmm.machine
        if machine is None:
            raise InvalidState("the machine has stopped")
        live: Any = machine
        return live  # type: ignore[no-any-return]


def boot(
    *,
    kernel: AnyPath | None = None,
    initrd: AnyPath | None = None,
    cmdline: str | None = None,
    cpus: int = 1,
    memory: Size = "512M",
    disks: Sequence[DiskConfig | AnyPath] = (),
    engine: Literal["auto", "kvm", "software"] = "auto",
    config: VmConfig | None = None,
) -> Machine:
    """Boot a kernel (a bzImage, or an ELF file with a PVH entry) and give the running machine.

    `memory`: bytes, or text like "4G". `disks`: raw images, or `freezeframe.config.DiskConfig` for more than a path.
    `config`: the whole configuration instead of all these. Raises `Refused` or `NotSupported` for what cannot be,
    `NotFound` or `IoFailed` for files, `Busy` for a disk that another machine writes to.
    """
    from freezeframe.config import (
        CpusConfig,
        MemoryConfig,
        PayloadConfig,
        VmConfig,
        refuse_unsupported,
        validate,
    )

    if config is None:
        if kernel is None:
            raise Refused("there is nothing to boot", hint="kernel=PATH, a bzImage or an ELF file with a PVH entry")
        if isinstance(disks, str | bytes | os.PathLike):
            raise Refused(f"disks is one path, {os.fspath(disks)!r}", hint="a list of them: disks=[PATH]")
        config = VmConfig(
            cpus=CpusConfig(boot_vcpus=cpus, max_vcpus=cpus),
            memory=MemoryConfig(size=_bytes(memory)),
            payload=PayloadConfig(
                kernel=os.fspath(kernel),
                initramfs=None if initrd is None else os.fspath(initrd),
                cmdline=cmdline,
            ),
            disks=tuple(_disk(disk) for disk in disks) or None,
        )
    validate(config)
    refuse_unsupported(config)
    vmm, reports = _vmm(engine)
    asked = config
    _do(lambda: vmm.create(asked))
    _do(vmm.boot)
    return Machine(vmm, reports)


def restore(
    source: Snapshot | AnyPath,
    *,
    memory: Literal["auto", "ondemand", "copy"] = "auto",
    clock: Literal["advance", "freeze"] = "advance",
    resume: bool = True,
    disks: Mapping[str, AnyPath] | None = None,
    disk_check: bool = True,
    engine: Literal["auto", "kvm", "software"] = "auto",
) -> Machine:
    """The machine of a snapshot directory, running, or paused with `resume=False`.

    `memory`: `ondemand` (what `auto` means today) reads and verifies memory as the guest touches it, `copy` all of it
    now. `clock`: `advance` moves the guest's clocks on by the time that passed, `freeze` goes on where they were.
    `disks`: other files in place of the snapshot's, by device id (`{"_disk0": "copy.raw"}`). A disk that changed since
    the snapshot is refused (`Incompatible`) unless it is substituted or `disk_check` is False. `Damaged` names the
    file, `Torn` says that the snapshot was never finished.
    """
    from freezeframe.config import RestoreConfig, RestoredDisk

    _known("memory", memory, "auto", "ondemand", "copy")
    _known("clock", clock, "advance", "freeze")
    if disks is not None and not hasattr(disks, "items"):
        raise Refused(f"disks is {disks!r}", hint='paths by device id: disks={"_disk0": PATH}')
    directory = os.path.abspath(os.fsdecode(source).removeprefix("file://"))
    request = RestoreConfig(
        source_url=f"file://{directory}",
        memory_restore_mode="Copy" if memory == "copy" else "OnDemand",
        clock="Freeze" if clock == "freeze" else "Advance",
        disks=tuple(RestoredDisk(id=name, path=os.fspath(path)) for name, path in (disks or {}).items()),
        disk_check=disk_check,
        resume=resume,
    )
    vmm, reports = _vmm(engine)
    _do(lambda: vmm.restore(request))
    return Machine(vmm, reports)


def _known(option: str, given: str, *values: str) -> None:
    if given not in values:
        raise Refused(f"{option}={given!r} is not known", hint=f"one of {', '.join(values)}")


def _vmm(engine: str) -> tuple[Vmm, list[str]]:
    reports: list[str] = []
    return Vmm(LiveBackend(engine, capture=CAPTURE), report=reports.append), reports


def _make_directory(path: str) -> None:
    """A directory that is there after a crash too, as what is written into it will be."""
    try:
        os.mkdir(path, 0o700)
    except FileNotFoundError as error:
        raise NotFound(f"cannot make the directory {path}: its parent does not exist") from error
    except OSError as error:
        raise IoFailed(f"cannot make the directory {path}") from error
    # Who may not read the parent cannot sync it.
    with contextlib.suppress(PermissionError):
        parent = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _bytes(size: Size) -> int:
    if isinstance(size, int):
        return size
    from freezeframe.options.syntax import byte_size

    try:
        return byte_size(size)
    except ValueError:
        raise Refused(f"not a size: {size!r}", hint="a number of bytes, or one with K, M or G") from None


def _disk(disk: DiskConfig | AnyPath) -> DiskConfig:
    from freezeframe.config import DiskConfig

    return disk if isinstance(disk, DiskConfig) else DiskConfig(path=os.fspath(disk))


def _do(action: Callable[[], None]) -> None:
    try:
        action()
    except ActionFailed as failure:
        error = bottom(failure)
        raise error from error.__cause__
