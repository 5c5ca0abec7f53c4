"""`cloud-hypervisor`: one VMM process with at most one machine, by Cloud Hypervisor's options.

Exit status: 0 for a guest that powered off, a shutdown that was asked for, SIGTERM, SIGINT or SIGHUP; 1 with the chain
of causes on stderr; 2 for usage.
"""

from __future__ import annotations

import os
import sys

from freezeframe.cli.chain import print_chain
from freezeframe.errors import FreezeframeError, NotSupported, Refused, chain_messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe.api.listener import Listener
    from freezeframe.api.server import ApiServer
    from freezeframe.control.events import EventMonitor
    from freezeframe.control.log import Log
    from freezeframe.control.vmm import Vmm

PROGRAM = "Cloud Hypervisor"


def main() -> int:
    """Run with the process' arguments; the exit status."""
    from freezeframe.cli.cloud_hypervisor_options import COMMAND, check_groups

    ensure_standard_descriptors()
    os.umask(0o077)  # sockets and files that are made here are for their owner
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(COMMAND.help_text())
        return 2
    values = COMMAND.parse(arguments)
    if values.get("version"):
        from freezeframe import __version__

        print(f"cloud-hypervisor v53.0 (freezeframe {__version__})")
        print("Migration Protocol Versions: none")
        return 0
    check_groups(values)
    try:
        return _Process(values).run()
    except (FreezeframeError, OSError) as error:
        print_chain(PROGRAM, chain_messages(error))
        return 1
    except KeyboardInterrupt:
        return 0  # before there was anything to end


def ensure_standard_descriptors() -> None:
    """Opens /dev/null where a standard descriptor is closed, or else the next file opened (a disk!) would become it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one


class _Process:
    """The life of the process: socket, machine, signals, end."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._listener: Listener | None = None
        self._server: ApiServer | None = None

    def run(self) -> int:
        from freezeframe.control.live import LiveBackend
        from freezeframe.control.vmm import Vmm

        self._refuse()
        vmm = Vmm(
            LiveBackend(self._values.get("engine")),
            events=self._events(),
            log=self._log(),
            no_shutdown="no-shutdown" in self._values,
        )
        # Signals first: from the moment the socket exists, whatever ends the process also removes it.
        catch_signals(vmm)
        self._listener = self._listen()
        try:
            return self._run(vmm)
        finally:
            vmm.close()
            if self._server is not None:
                self._server.close()
            elif self._listener is not None:
                self._listener.close()

    def _run(self, vmm: Vmm) -> int:
        self._start_machine(vmm)
        if self._listener is not None:
            from freezeframe.api.server import ApiServer

            self._server = ApiServer(vmm, self._listener)
            self._server.start()
        return vmm.run()

    def _refuse(self) -> None:
        """What cannot be: options that contradict each other, or that ask for what we do not have."""
        values = self._values
        if "restore" in values:
            others = [name for name in ("kernel", "firmware") if name in values]
            if others:
                raise Refused(
                    f"--restore and --{others[0]} contradict each other: a restored machine has its kernel in memory",
                    hint=f"give --restore alone to restore, or --{others[0]} alone to boot",
                )
        elif "kernel" not in values and "firmware" not in values and "api-socket" not in values:
            raise Refused(
                "there is nothing to run", hint="give --kernel to boot, --restore to restore or --api-socket to wait"
            )
        for name, only in (("seccomp", ("true", "false")), ("log-format", ()), ("gdb", ())):
            if name in values and values[name] not in only:
                raise NotSupported(f"--{name} {values[name]} is not supported by this VMM: leave it out")
        for name in ("dbus-service-name", "dbus-object-path", "dbus-system-bus"):
            if name in values:
                raise NotSupported(f"--{name} is not supported by this VMM: leave it out")

    def _events(self) -> EventMonitor | None:
        text = self._values.get("event-monitor")
        if text is None:
            return None
        from freezeframe.control.events import EventMonitor

        return EventMonitor.from_option(text)

    def _log(self) -> Log | None:
        level, path = self._values.get("v", 0), self._values.get("log-file")
        if not level and path is None:
            return None  # warnings go to stderr all the same
        from freezeframe.control.log import Log

        return Log(level, path)

    def _listen(self) -> Listener | None:
        """The API socket: taken at once, so that a second VMM is refused; answered on when the machine exists."""
        text = self._values.get("api-socket")
        if text is None:
            return None
        from freezeframe.api.listener import Listener
        from freezeframe.options.syntax import OptionError, Options, integer

        try:
            options = Options(text, ("path", "fd"))
        except OptionError:
            return Listener.bind(text)  # a plain path, as CH takes it
        fd = options.text("fd")
        if fd is None:
            return Listener.bind(options.text("path") or text)
        try:
            return Listener.from_fd(integer(fd, 31))
        except ValueError:
            raise Refused("Error parsing --api-socket") from Refused("invalid digit found in string")

    def _start_machine(self, vmm: Vmm) -> None:
        values = self._values
        if "kernel" in values or "firmware" in values:
            from freezeframe.config import refuse_unsupported, validate
            from freezeframe.options.vm import parse_vm

            try:
                config = parse_vm(values)
                try:
                    validate(config)
                except FreezeframeError as error:
                    raise Refused("Error validating configuration") from error
                refuse_unsupported(config)
            except FreezeframeError as error:
                raise Refused("Error parsing config") from error
            _act("Error creating VM", vmm.create, config)
            _act("Error booting VM", vmm.boot)
        elif "restore" in values:
            from freezeframe.options.restore import parse_restore

            try:
                request = parse_restore(values["restore"])
            except FreezeframeError as error:
                raise Refused("Error parsing restore") from error
            _act("Error restoring VM", vmm.restore, request)


def _act(top: str, action: Any, *arguments: object) -> None:
    from freezeframe.control.failures import ActionFailed

    try:
        action(*arguments)
    except ActionFailed as error:
        raise FreezeframeError(error.texts[-1]).chained(top, *error.texts[:-1]) from error


def catch_signals(vmm: Vmm) -> None:
    # The C module below `signal`: making enumerations of all signals takes longer than a restore's work.
    signals: Any = __import__("_signal")

    def end(_number: int, _frame: object) -> None:
        vmm.request_exit(0)

    for number in (signals.SIGTERM, signals.SIGINT, signals.SIGHUP):
        signals.signal(number, end)
    if os.isatty(0):
        from freezeframe.backends.terminal import terminal

        terminal.watch_signals()


if __name__ == "__main__":
    sys.exit(main())
