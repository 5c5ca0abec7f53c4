"""Host ends of the serial port and the virtio console, in Cloud Hypervisor's modes."""

from __future__ import annotations

import codecs
import os
import stat
import sys

from freezeframe._core import ConsoleInput, ConsoleOutput
from freezeframe.errors import DeadlineExceeded, InvalidState, IoFailed, NotSupported, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Literal

    from freezeframe._core import Serial, VirtioConsole
    from freezeframe.backends.terminal import Terminal

    Mode = Literal["Off", "Pty", "Tty", "File", "Socket", "Null"]

# Seconds without a byte taken after which a reader counts as gone at the end of a machine.
PATIENCE = 1.0
# Seconds after which a program that waits for output hears that the machine has ended.
LOOK_UP = 0.1


STDIN, STDOUT = 0, 1


class HostConsole:
    """One console's output and input on the host. Made paused, before its device; `attach` gives it the device.

    `path`: the file or pseudo terminal, None for the other modes. `size`: (columns, rows) to offer to the guest.

    Guarantees: while it is paused not a byte moves in either direction, so that each is either in the device's state or
    still outside. The end of input never ends a machine; an output that nobody reads never blocks one.
    """

    def __init__(
        self,
        mode: Mode,
        output: ConsoleOutput,
        *,
        source: int | None = None,
        path: str | None = None,
        close: tuple[int, ...] = (),
    ) -> None:
        self.mode = mode
        self.output = output
        self.path = path
        self.size: tuple[int, int] | None = None
        self._source = source
        self._close = close
        self._device: VirtioConsole | Serial | None = None
        self._input: ConsoleInput | None = None
        # The terminal, if this console uses it. Loaded only then: it needs modules that take longer than a restore.
        self._terminal: Terminal | None = None
        if mode == "Tty" and os.isatty(STDIN) and os.isatty(STDOUT):
            from freezeframe.backends.terminal import terminal

            self._terminal = terminal
            self.size = terminal.size()
            terminal.acquire(self._resized)

    def attach(self, device: VirtioConsole | Serial) -> None:
        """The device whose `output` is ours; input goes there from the next `resume` on."""
        self._device = device
        if self._source is not None:
            self._input = ConsoleInput(self._source, device)

    @property
    def device(self) -> VirtioConsole | Serial | None:
        """What `attach` was given last; another one after the guest's reset."""
        return self._device

    def _resized(self) -> None:
        resize = getattr(self._device, "resize", None)
        if resize is not None and self._terminal is not None:
            self.size = self._terminal.size()
            resize(*self.size)

    def pause(self) -> None:
        """Stops input (the device stops its output itself)."""
        if self._input is not None:
            self._input.pause()

    def resume(self) -> None:
        """Before the vCPUs run, after the device's own `resume`."""
        if self._terminal is not None:
            self._terminal.enter()
            self._resized()
        if self._input is not None:
            self._input.resume()

    def close(self) -> None:
        """Ends input, lets a slow reader have the rest of the output, and gives the terminal back."""
        if self._input is not None:
            self._input.close()
            self._input = None
        self.output.drain(PATIENCE)
        if self._terminal is not None:
            self._terminal.release(self._resized)
            self._terminal = None
        fds, self._close = self._close, ()
        for fd in fds:
            os.close(fd)


def open_console(
    mode: Mode,
    file: str | None = None,
    *,
    restored: bool = False,
    takes_input: bool = True,
    capture: int = 0,
) -> HostConsole | None:
    """The host's end for one console; None for `Off`.

    `file`: the path for `File`: created or emptied for a boot, continued for a restored machine. `takes_input`: False
    for the second of two consoles on one terminal. `capture`: how many bytes of output to keep for `Console`.
    """
    if mode == "Off":
        return None
    if mode == "Null":
        return HostConsole(mode, ConsoleOutput(capture=capture))
    if mode == "Tty":
        source = STDIN if takes_input and _can_be_read(STDIN) else None
        return HostConsole(mode, ConsoleOutput(_standard_output(), capture=capture), source=source)
    if mode == "File":
        if not file:
            raise Refused("a console in file mode needs the path of the file: file=PATH")
        fd = _open_file(file, restored=restored)
        try:
            return HostConsole(mode, ConsoleOutput(fd, capture=capture), path=file)
        finally:
            os.close(fd)
    if mode == "Pty":
        return _open_pty(capture)
    raise NotSupported(
        f"consoles on a socket are not supported (mode {mode})", hint="use pty, file=PATH, tty, null or off"
    )


def open_consoles(
    serial: tuple[Mode, str | None],
    console: tuple[Mode, str | None],
    *,
    restored: bool = False,
    capture: int = 0,
) -> tuple[HostConsole | None, HostConsole | None]:
    """Both consoles of a machine, each given as (mode, path).

    As in Cloud Hypervisor both may use the terminal, with a warning: their output mixes. There each key goes to
    whichever comes first; here all go to the virtio console.
    """
    both = serial[0] == console[0] == "Tty"
    if both:
        print('warning: using the terminal for two consoles: ["virtio-console", "serial-console"]', file=sys.stderr)
    first = open_console(*serial, restored=restored, takes_input=not both, capture=capture)
    try:
        return first, open_console(*console, restored=restored, capture=capture)
    except BaseException:
        if first is not None:
            first.close()
        raise


def _can_be_read(fd: int) -> bool:
    """Terminals, pipes and sockets can be talked to; files and /dev/null are what is left when nobody is there."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return os.isatty(fd) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _standard_output() -> int | None:
    try:
        os.fstat(STDOUT)
    except OSError:
        return None
    return STDOUT


def _open_file(path: str, *, restored: bool) -> int:
    try:
        if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            # Read and write: opening must not wait for a reader, and losing one must not be an error.
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        how = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(path, how if restored else how | os.O_TRUNC, 0o666)
    except OSError as error:
        raise IoFailed(f"cannot open the console's file {path}") from error


def _open_pty(capture: int) -> HostConsole:
    import termios

    from freezeframe.backends.terminal import raw

    try:
        main, sub = os.openpty()
    except OSError as error:
        raise IoFailed("cannot make a pseudo terminal") from error
    try:
        os.set_blocking(main, False)
        termios.tcsetattr(sub, termios.TCSANOW, raw(termios.tcgetattr(sub)))  # pyright: ignore[reportArgumentType]
        # The other side stays open here too: without any user of it the pty would be hung up.
        return HostConsole(
            "Pty", ConsoleOutput(main, capture=capture), source=main, path=os.ttyname(sub), close=(main, sub)
        )
    except BaseException:
        os.close(main)
        os.close(sub)
        raise


class Console:
    """A console for programs: what the guest prints, and a way to type. The output must have been made with
    `capture`. `ended` says whether the machine is gone, after which there is nothing to wait for.
    """

    def __init__(
        self,
        output: ConsoleOutput,
        device: VirtioConsole | Serial,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._output = output
        self._device = device
        self._ended = ended
        self._position = 0
        self._seen = ""
        # A character may come in two halves.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    @property
    def text(self) -> str:
        """All output that is still kept (the last MiB)."""
        return self._output.read(0, 0)[1].decode(errors="replace")

    def read(self, timeout: float | None = 0) -> str:
        """Output since the last `read` or the last `expect`'s match; waits up to `timeout` seconds for some."""
        if not self._seen:
            self._wait(_deadline(timeout))
        seen, self._seen = self._seen, ""
        return seen

    def _wait(self, deadline: float | None) -> bool:
        """For more output; False when none came in time, or none will come any more."""
        while True:
            over = self._ended()  # asked first: all that it printed is there then
            left = _left(deadline)
            if self._more(0.0 if over else min(left, LOOK_UP)):
                return True
            if over or left == 0:
                return False

    def _more(self, timeout: float) -> bool:
        self._position, data = self._output.read(self._position, timeout)
        self._seen += self._decode(data)
        return bool(data)

    def write(self, text: str | bytes) -> None:
        """Types `text`. Raises `Refused` when the guest has left a megabyte unread, `InvalidState` when it is gone."""
        if self._ended():
            raise InvalidState("the machine has stopped: nobody reads its console")
        data = text.encode() if isinstance(text, str) else text
        if self._device.receive(data) != len(data):
            raise Refused("the guest does not read its console: its input buffer is full")

    def expect(self, pattern: str | re.Pattern[str], timeout: float | None = 60) -> re.Match[str]:
        """Waits for output that `pattern` (a regular expression) matches; gives the match, and the output up to its end
        counts as read. Raises `DeadlineExceeded` with the last lines, `InvalidState` when the machine ends before.
        """
        import re

        compiled = re.compile(pattern)
        deadline = _deadline(timeout)
        while True:
            match = compiled.search(self._seen)
            if match is not None:
                self._seen = self._seen[match.end() :]
                return match
            if self._wait(deadline):
                continue
            last = f"it ends with: {self._seen[-500:]!r}"
            if _left(deadline) == 0:
                raise DeadlineExceeded(
                    f"the console did not show {compiled.pattern!r} within {timeout} seconds; {last}"
                )
            raise InvalidState(
                f"the machine has stopped, and its console did not show {compiled.pattern!r}; {last}",
                hint="wait() of the machine raises why, if it failed",
            )


def _deadline(timeout: float | None) -> float | None:
    """`timeout` seconds from now, as `_left` takes it."""
    import time

    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float:
    """Seconds until then; infinite without a deadline."""
    import time

    return float("inf") if deadline is None else max(0.0, deadline - time.monotonic())
