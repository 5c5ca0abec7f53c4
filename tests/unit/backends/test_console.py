"""Host ends of consoles: modes, pausing, the terminal."""

from __future__ import annotations

import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from freezeframe import _core
from freezeframe.backends.console import Console, open_console, open_consoles
from freezeframe.errors import DeadlineExceeded, IoFailed, NotSupported, Refused
from freezeframe.testing.virtio_driver import Host

pytestmark = pytest.mark.unit

PATIENCE = 60.0


def serial_on(output: _core.ConsoleOutput, state=None) -> _core.Serial:
    host = Host()
    return _core.Serial(output, _core.IrqLine(host.ioapic, 4), host.control, state)


def say(serial: _core.Serial, text: bytes) -> None:
    for byte in text:
        serial.write(0, 1, byte)


def heard(serial: _core.Serial) -> bytes:
    """What the guest reads, without waiting."""
    serial.resume()  # the engine would do the posted work
    got = bytearray()
    while serial.read(5, 1) & 1:
        got.append(serial.read(0, 1))
    return bytes(got)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.002)
    return value


def read_from(fd: int, count: int) -> bytes:
    got = b""
    while len(got) < count:
        assert select.select([fd], [], [], PATIENCE)[0]
        got += os.read(fd, count - len(got))
    return got


def test_off_and_null() -> None:
    assert open_console("Off") is None
    console = open_console("Null")
    assert console is not None
    serial = serial_on(console.output)
    serial.resume()
    say(serial, b"nobody")
    assert serial.state()["out_buffer"] == ""
    console.close()


def test_sockets_are_refused() -> None:
    with pytest.raises(NotSupported):
        open_console("Socket", "/tmp/x")
    with pytest.raises(Refused):
        open_console("File")


def test_a_file_is_emptied_at_boot_and_continued_after_a_restore(tmp_path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    for restored, text in ((False, b"one\n"), (True, b"two\n"), (True, b"three\n")):
        console = open_console("File", str(path), restored=restored)
        serial = serial_on(console.output)
        console.attach(serial)
        serial.resume()
        console.resume()
        say(serial, text)
        console.close()
    assert path.read_text() == "one\ntwo\nthree\n"
    with pytest.raises(IoFailed):
        open_console("File", str(tmp_path / "none" / "log"))


def test_a_fifo_without_a_reader_is_no_obstacle(tmp_path) -> None:
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    console = open_console("File", path)
    serial = serial_on(console.output)
    serial.resume()
    say(serial, b"hello")
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert read_from(fd, 5) == b"hello"
    os.close(fd)


def test_a_pseudo_terminal_talks_both_ways() -> None:
    console = open_console("Pty")
    serial = serial_on(console.output)
    console.attach(serial)
    serial.resume()
    console.resume()
    fd = os.open(console.path, os.O_RDWR | os.O_NOCTTY)
    say(serial, b"login: ")
    assert read_from(fd, 7) == b"login: "
    os.write(fd, b"root\r")
    got = bytearray()
    wait_until(lambda: got.extend(heard(serial)) or len(got) == 5)
    assert got == b"root\r"
    os.close(fd)
    console.close()


def test_a_byte_is_in_the_state_or_still_outside() -> None:
    """Pauses at every point of a stream of input; nothing is lost, doubled or out of order."""
    source, keys = os.pipe()
    output = _core.ConsoleOutput()
    serial = serial_on(output)
    reader = _core.ConsoleInput(source, serial)
    got = b""
    sent = b""
    for number in range(60):
        reader.resume()
        part = b"%03d," % number
        os.write(keys, part)
        sent += part
        if number % 3:
            got += heard(serial)
        reader.pause()
        # "Killed" here: what this life has read is in its state, the rest in the pipe.
        state = serial.state()
        reader.close()
        serial = serial_on(output, state)
        reader = _core.ConsoleInput(source, serial)
    reader.resume()

    def more() -> bool:
        nonlocal got
        got += heard(serial)
        return len(got) >= len(sent)

    wait_until(more)
    assert got == sent
    reader.close()


def test_the_end_of_input_is_not_the_end() -> None:
    source, keys = os.pipe()
    os.close(keys)
    serial = serial_on(_core.ConsoleOutput(capture=100))
    reader = _core.ConsoleInput(source, serial)
    reader.resume()
    reader.pause()
    reader.resume()
    say(serial, b"alive")
    assert serial.state()["in_buffer"] == ""
    reader.close()
    reader.close()


def test_descriptors_that_are_not_open() -> None:
    with pytest.raises(Refused, match="not open"):
        _core.ConsoleOutput(1_000_000)
    with pytest.raises(Refused, match="not open"):
        _core.ConsoleInput(-1, serial_on(_core.ConsoleOutput()))


def test_expect() -> None:
    console = open_console("Null", capture=1 << 16)
    serial = serial_on(console.output)
    window = Console(console.output, serial)
    say(serial, "Wörld\nlogin: ".encode())
    assert window.expect(r"W(.)rld")[1] == "ö"
    assert window.read() == "\nlogin: "
    assert window.read() == ""
    assert window.text == "Wörld\nlogin: "
    window.write("root\n")
    assert heard(serial) == b"root\n"
    say(serial, b"half \xc3")
    assert window.read() == "half "
    say(serial, b"\xb6")
    assert window.read() == "ö"
    with pytest.raises(DeadlineExceeded, match="never"):
        window.expect("never", timeout=0.01)
    with pytest.raises(Refused):
        window.write(bytes(2 << 20))


def test_both_on_the_terminal_is_told(capfd) -> None:
    serial, console = open_consoles(("Tty", None), ("Tty", None))
    assert "virtio-console" in capfd.readouterr().err
    assert serial is not None
    assert console is not None
    serial.close()
    console.close()


CHILD = """
import os, signal, sys, time
from freezeframe import _core
from freezeframe.backends.console import open_console
from freezeframe.backends.terminal import terminal
from freezeframe.testing.virtio_driver import Host
if "handled" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
terminal.watch_signals()
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)  # a signal just before a wait would not end it otherwise
host = Host()
console = open_console("Tty")
serial = _core.Serial(console.output, _core.IrqLine(host.ioapic, 4), host.control)
console.attach(serial)
serial.resume()
console.resume()
for byte in b"ready":
    serial.write(0, 1, byte)
if "raise" in sys.argv:
    raise SystemExit(3)
if "echo" in sys.argv:
    while True:
        serial.resume()
        while serial.read(5, 1) & 1:
            serial.write(0, 1, serial.read(0, 1))
        time.sleep(0.002)
while True:
    os.read(woken, 1)
"""


# A parent that stays, as a shell does: without one in its session a stopped process would be an orphan.
PARENT = """
import fcntl, os, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Whoever runs the tests may ignore them (nohup, a background job), and children inherit that.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = subprocess.Popen(sys.argv[1:], process_group=0)
os.tcsetpgrp(0, child.pid)
print(child.pid, file=sys.stderr, flush=True)
sys.exit(child.wait() & 255)
"""


class Session:
    """A child on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.main, self.sub = pty.openpty()
        self.before = termios.tcgetattr(self.sub)
        self.child = subprocess.Popen(
            [sys.executable, "-c", PARENT,
             sys.executable, "-c", CHILD, *words],
            stdin=self.sub, stdout=self.sub, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.child.stderr is not None
        self.pid = int(self.child.stderr.readline())
        assert read_from(self.main, 5) == b"ready"

    def settings(self):
        return termios.tcgetattr(self.sub)

    def is_raw(self) -> bool:
        return not self.settings()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        code = self.child.wait(PATIENCE)
        os.close(self.main)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for pid in (self.pid, self.child.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.child.wait(PATIENCE)
        self.child.stderr.close()
        os.close(self.sub)


@pytest.mark.parametrize(("word", "number"), [("handled", 15), ("", 15), ("", 1), ("", 3), ("", 2), ("raise", 0)])
def test_the_terminal_comes_back_on_every_exit(word: str, number: int) -> None:
    with Session(word) as session:
        if number:
            assert session.is_raw()
            session.signal(number)
        session.child.wait(PATIENCE)
        assert session.settings() == session.before


def test_the_terminal_comes_back_for_a_stop_and_goes_again() -> None:
    with Session() as session:
        session.signal(signal.SIGTSTP)
        wait_until(lambda: not session.is_raw())
        assert session.settings() == session.before
        wait_until(lambda: pathlib.Path(f"/proc/{session.pid}/stat").read_text().split()[2] == "T")
        session.signal(signal.SIGCONT)
        wait_until(session.is_raw)


def test_keys_arrive_raw() -> None:
    with Session("echo") as session:
        os.write(session.main, b"\x03a\r\x1a")
        assert read_from(session.main, 4) == b"\x03a\r\x1a"
