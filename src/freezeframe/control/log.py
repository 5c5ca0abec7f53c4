"""The VMM's log, `-v` and `--log-file`: lines as Cloud Hypervisor writes them, to stderr unless a file is named."""

from __future__ import annotations

import os
import time

from freezeframe.errors import Refused

STDERR = 2
WARN, INFO, DEBUG, TRACE = range(4)
_NAMES = ("WARN", "INFO", "DEBUG", "TRACE")


class Log:
    """Writes what is at most as verbose as `level`. A full or closed log never stops the machine."""

    def __init__(self, level: int, path: str | None = None) -> None:
        self._level = min(level, TRACE)
        self._start = time.monotonic()
        self._fd = STDERR
        if path is not None:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise Refused("Error creating log file") from error

    def write(self, level: int, text: str) -> None:
        """One line: seconds since the start, level, text."""
        if level <= self._level:
            seconds = time.monotonic() - self._start
            line = f"cloud-hypervisor: {seconds:10.6f}s: <vmm> {_NAMES[level]}:freezeframe -- {text}\n"
            try:
                os.write(self._fd, line.encode(errors="replace"))
            except OSError:
                pass
