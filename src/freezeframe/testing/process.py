"""A VMM as a user runs it: a process, its console on pipes, and `ch-remote` beside it. For tests, demo and bench."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

DEADLINE_S = 120.0


def installed(name: str) -> str:
    """Path of one of our commands, beside the running Python."""
    return str(Path(sys.executable).parent / name)


class Unexpected(AssertionError):
    """The guest or the VMM did not do what was waited for; the message ends with what the console said last."""


class Console:
    """Everything that a process prints, with waiting for text in it.

    Guarantees: nothing printed is lost; `expect` returns as soon as its pattern is there, or raises after its
    deadline or when the output has ended.
    """

    def __init__(self, fd: int, *, echo: bool = False) -> None:
        self._fd = fd
        self._echo = echo
        self._text = ""
        self._arrivals: list[tuple[int, float]] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._fd, 65536)
            except OSError:
                chunk = b""
            now = time.monotonic()
            text = chunk.decode(errors="replace").replace("\r", "")
            if self._echo and text:
                sys.stdout.write(text)
                sys.stdout.flush()
            with self._changed:
                self._text += text
                self._arrivals.append((len(self._text), now))
                self._ended = not chunk
                self._changed.notify_all()
            if not chunk:
                return

    def join(self) -> None:
        """Until the output has ended."""
        self._reader.join(DEADLINE_S)

    @property
    def text(self) -> str:
        """All output so far, without carriage returns."""
        with self._changed:
            return self._text

    def mark(self) -> int:
        """Where the output ends now; pass it to `expect` to look only at what comes later."""
        return len(self.text)

    def expect(self, pattern: str, since: int = 0, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Waits until `pattern` (multi-line regular expression) appears after position `since`."""
        compiled = re.compile(pattern, re.MULTILINE)
        end = time.monotonic() + deadline_s
        with self._changed:
            while True:
                found = compiled.search(self._text, since)
                if found:
                    return found
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    why = "the output ended" if self._ended else f"{deadline_s:.0f} s passed"
                    message = f"{why} while waiting for {pattern!r}; the console's end:\n{self._text[-3000:]}"
                    raise Unexpected(message)
                self._changed.wait(left)

    def arrived(self, position: int) -> float:
        """When the character before `position` was read (monotonic seconds)."""
        with self._changed:
            return next(when for upto, when in self._arrivals if upto >= position)


class Vmm:
    """A `cloud-hypervisor` process. A context manager that kills it at the end if it still runs."""

    def __init__(
        self, argv: Sequence[str], *, socket: Path | None = None, echo: bool = False, command: str | None = None
    ) -> None:
        """`argv`: arguments after the command's name. `socket` adds `--api-socket` and makes `remote` work. `command`:
        another VMM.
        """
        self.socket = socket
        words = [command or installed("cloud-hypervisor"), *(["--api-socket", str(socket)] if socket else []), *argv]
        self.started = time.monotonic()
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._stdin = self.process.stdin
        self.console = Console(self.process.stdout.fileno(), echo=echo)
        self.errors = Console(self.process.stderr.fileno())

    def send(self, line: str) -> None:
        """Types a line on the guest's console."""
        self._stdin.write(line.encode() + b"\n")
        self._stdin.flush()

    def remote(self, *argv: str, check: bool = True, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Runs `ch-remote` on this VMM; with `check`, a failure raises with what it printed."""
        words = [installed("ch-remote"), f"--api-socket={self.socket}", *argv]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode != 0:
            message = f"ch-remote {' '.join(argv)} ended with {done.returncode}: {done.stderr}"
            raise Unexpected(message)
        return done

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> None:
        """Until the socket answers `info` with a machine (a restore on the command line is done when it does)."""
        end = time.monotonic() + deadline_s
        while self.remote("info", check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > end:
                message = f"the VMM did not answer (exit status {self.process.poll()}): {self.errors.text}"
                raise Unexpected(message)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Exit status, once it has ended."""
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """SIGKILL, as a user would with `kill -9`."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        """Lets go of the pipes of a process that has ended or is about to."""
        self.process.wait()
        self.console.join()
        self.errors.join()
        for pipe in (self._stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def resident(self) -> int:
        """Resident bytes of the process."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
