"""The terminal that this process was started on: raw while a console uses it, given back as it was on every exit."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

STDIN, STDOUT = 0, 1
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6
_FATAL = (signal.SIGHUP, signal.SIGQUIT, signal.SIGABRT, signal.SIGTERM)


def raw(settings: list[Any]) -> list[Any]:
    """Terminal settings as `cfmakeraw` makes them (termios(3))."""
    made = list(settings)
    iflag, oflag, cflag, lflag = (int(str(made[n])) for n in range(4))
    made[_IFLAG] = iflag & ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    made[_OFLAG] = oflag & ~termios.OPOST
    made[_CFLAG] = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    made[_LFLAG] = lflag & ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    return made


class Terminal:
    """Counts its users; the settings change with the first and come back with the last, at exit and before a stop.

    It is left alone while this process is in its background: changing it there would stop the process.
    """

    def __init__(self, fd: int = STDIN) -> None:
        self._fd = fd
        self._users = 0
        self._saved: list[Any] | None = None
        self._resized: list[Callable[[], None]] = []

    @staticmethod
    def usable() -> bool:
        """Input and output are both a terminal, as Cloud Hypervisor asks for before it changes anything."""
        return os.isatty(STDIN) and os.isatty(STDOUT)

    def acquire(self, resized: Callable[[], None] | None = None) -> None:
        """One more user. `resized` is called after a change of the window's size, on the main thread."""
        self._users += 1
        if resized is not None:
            self._resized.append(resized)
        if self._users == 1:
            atexit.register(self.restore)
        self.enter()

    def release(self, resized: Callable[[], None] | None = None) -> None:
        if resized is not None and resized in self._resized:
            self._resized.remove(resized)
        self._users -= 1
        if self._users == 0:
            self.restore()
            atexit.unregister(self.restore)

    def enter(self) -> None:
        """Raw mode, if somebody uses the terminal and it is ours to change now."""
        if self._users == 0 or self._saved is not None:
            return
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(self._fd) == os.getpgrp():
                saved = termios.tcgetattr(self._fd)
                termios.tcsetattr(self._fd, termios.TCSANOW, raw(saved))  # pyright: ignore[reportArgumentType]
                self._saved = saved

    def restore(self) -> None:
        """The settings from before; may be called at any time, as often as one likes."""
        saved, self._saved = self._saved, None
        if saved is not None:
            # With SIGTTOU blocked the change succeeds from the background too (POSIX, tcsetattr).
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            try:
                with contextlib.suppress(OSError, termios.error):
                    termios.tcsetattr(self._fd, termios.TCSANOW, saved)  # pyright: ignore[reportArgumentType]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def size(self) -> tuple[int, int]:
        """(columns, rows); (0, 0) where that is not known."""
        try:
            size = os.get_terminal_size(STDOUT)
        except OSError:
            return (0, 0)
        return (size.columns, size.lines)

    def watch_signals(self) -> None:
        """To be called once by a command, on the main thread, after it has set the signals that it handles itself.

        Others that end the process first give the terminal back; stopping and going on do the same; a new window size
        is passed on.
        """
        for number in _FATAL:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._end)
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._stop)
        signal.signal(signal.SIGCONT, self._continue)
        signal.signal(signal.SIGWINCH, self._window)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        # Here the process goes on.
        signal.signal(number, self._stop)
        self.enter()

    def _continue(self, _number: int, _frame: FrameType | None) -> None:
        self.enter()

    def _window(self, _number: int, _frame: FrameType | None) -> None:
        for resized in list(self._resized):
            resized()


terminal = Terminal()
