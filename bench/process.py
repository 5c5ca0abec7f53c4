"""A VMM under measurement: its process, its console on a pipe, and the clock."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from pathlib import Path

DEADLINE_S = 600.0


class Console:
    """Collects a process's standard output and remembers when each byte came (monotonic seconds)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._text = b""
        self._when: list[tuple[int, float]] = []
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while chunk := os.read(fd, 65536):
            now = time.monotonic()
            with self._changed:
                self._text += chunk
                self._when.append((len(self._text), now))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def length(self) -> int:
        with self._changed:
            return len(self._text)

    def expect(self, pattern: bytes, since: int = 0, deadline_s: float = DEADLINE_S) -> float:
        """Waits for `pattern` after position `since`; gives the moment at which its last byte was read."""
        end = time.monotonic() + deadline_s
        compiled = re.compile(pattern)
        with self._changed:
            while True:
                found = compiled.search(self._text, since)
                if found:
                    return next(when for upto, when in self._when if upto >= found.end())
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    raise RuntimeError(f"no {pattern!r} on the console; it ends with {self._text[-500:]!r}")
                self._changed.wait(left)


class Vmm:
    """Started by `argv`; its console is standard input and output."""

    def __init__(self, argv: list[str]) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.console = Console(self.process)

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def resident(self) -> int:
        """Resident bytes of the process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def stored_bytes(path: Path) -> int:
    """Bytes that a file or the files of a directory take on disk."""
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_blocks * 512 for file in files)
