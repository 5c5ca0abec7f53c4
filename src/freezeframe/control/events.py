"""`--event-monitor`: JSON objects and blank lines, as Cloud Hypervisor writes them (event_monitor/src/lib.rs)."""

from __future__ import annotations

import os
import time

from freezeframe.errors import Refused
from freezeframe.options.syntax import OptionError, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class EventMonitor:
    """Writes events to a file descriptor; a reader that went away or lags behind never holds up the machine."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._start = time.monotonic_ns()
        os.set_blocking(fd, False)

    @classmethod
    def from_option(cls, text: str) -> EventMonitor:
        """`path=<file>` (created or truncated) or `fd=<open descriptor>`."""
        try:
            options = Options(text, ("path", "fd"))
            fd = options.maybe("fd", int)
        except OptionError as error:
            raise Refused("Error parsing --event-monitor") from error
        path = options.text("path")
        if fd is None and path is None:
            raise Refused("Error parsing --event-monitor: path or fd required")
        try:
            if fd is None:
                fd = os.open(path or "", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            return cls(fd)
        except OSError as error:
            raise Refused("Error doing event monitor I/O") from error

    def emit(self, source: str, event: str, properties: Mapping[str, str] | None = None) -> None:
        """Write one event with the time since the VMM started."""
        from json import dumps

        secs, nanos = divmod(time.monotonic_ns() - self._start, 1_000_000_000)
        document = {
            "timestamp": {"secs": secs, "nanos": nanos},
            "source": source,
            "event": event,
            "properties": properties,
        }
        try:
            os.write(self._fd, dumps(document, indent=2).encode() + b"\n\n")
        except OSError:
            pass  # full pipe or closed reader: the event is lost, the machine goes on
