"""Machines in a Python program: the example of the package's documentation, and what it does not show."""

from __future__ import annotations

import doctest
import threading

import pytest

import freezeframe as ff
from freezeframe.errors import (
    Busy,
    Damaged,
    DeadlineExceeded,
    FreezeframeError,
    InvalidState,
    IoFailed,
    NotFound,
    Refused,
)
from freezeframe.testing.guests import tick

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "tick.elf"
    path.write_bytes(tick(size=0x4000, spin=20_000))
    return path


def test_the_documentations_example(kernel, tmp_path):
    names = {"KERNEL": str(kernel), "DIRECTORY": str(tmp_path / "snapshot")}
    failures, tests = doctest.testmod(ff, extraglobs=names, verbose=False)
    assert (failures, tests > 3) == (0, True)


def test_names():
    assert set(ff.__all__) >= {"boot", "restore", "Machine", "Snapshot", "Console"}
    for name in ff.__all__:
        assert getattr(ff, name) is not None
    with pytest.raises(AttributeError):
        _ = ff.nope


def test_states(kernel, tmp_path):
    with ff.boot(kernel=kernel, memory="64M") as vm:
        assert vm.state == "running"
        assert vm.engine.name == "software"
        vm.serial.expect(r"T 2\n")
        with pytest.raises(InvalidState):
            vm.resume()
        vm.pause()
        with pytest.raises(InvalidState):
            vm.pause()
        kept = vm.snapshot(tmp_path / "s")
        assert vm.state == "paused"
        with pytest.raises(Busy):
            vm.snapshot(tmp_path / "s")
        vm.serial.read()
        with pytest.raises(DeadlineExceeded):
            vm.serial.expect("T", timeout=0.2)
        vm.resume()
        vm.serial.expect(r"T \d+\n")
    assert vm.state == "stopped"
    assert repr(vm) == "<Machine stopped>"
    assert "T 2\n" in vm.serial.text
    with pytest.raises(InvalidState):
        vm.serial.expect("never")
    with pytest.raises(InvalidState):
        vm.pause()
    with kept.restore(resume=False, memory="copy", clock="freeze") as first, kept.restore() as second:
        assert first.state == "paused"
        assert second.state == "running"
        second.serial.expect(r"T \d+\n")
        first.stop()
        assert first.state == "stopped"


def test_errors(kernel, tmp_path):
    with pytest.raises(NotFound):
        ff.boot(kernel=tmp_path / "none")
    with pytest.raises(Refused):
        ff.boot(kernel=kernel, memory="5 parsecs")
    with pytest.raises(Refused):
        ff.boot()
    with pytest.raises(NotFound, match="no directory"):
        ff.restore(tmp_path / "none")
    with ff.boot(kernel=kernel, memory="64M") as vm:
        kept = vm.snapshot(tmp_path / "s")
        with pytest.raises(FileNotFoundError):
            vm.snapshot(tmp_path / "no" / "parent")
    with open(tmp_path / "s" / "vm.json", "r+b") as file:
        file.seek(500)
        file.write(b"#")
    with pytest.raises(Damaged):
        kept.restore()


def test_a_machine_that_cannot_go_on(kernel, tmp_path):
    with ff.boot(kernel=kernel, memory="64M") as vm:
        vm.serial.expect(r"T 2\n")
        kept = vm.snapshot(tmp_path / "s")
    with open(tmp_path / "s" / "memory-region-0", "r+b") as file:
        file.seek(0x40_0100)
        byte = file.read(1)
        file.seek(0x40_0100)
        file.write(bytes([byte[0] ^ 1]))
    with kept.restore() as vm:
        with pytest.raises(Damaged, match=r"memory-region-0.*chunk"):
            vm.wait(30)
        assert vm.state == "stopped"


def test_the_errors_are_public_names() -> None:
    from freezeframe import errors

    with pytest.raises(ff.NotFound) as caught:
        ff.restore("/nonexistent/snapshot")
    assert isinstance(caught.value, ff.FreezeframeError)
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.FreezeframeError):
            assert getattr(ff, name) is value


def test_where_a_snapshot_cannot_go_is_said(kernel, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with ff.boot(kernel=kernel, memory="64M") as vm:
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(IoFailed):
                vm.snapshot(path)
        with pytest.raises(NotFound, match="parent"):
            vm.snapshot(tmp_path / "no" / "parent")
        with monkeypatch.context() as patch:

            def broken(*_args, **_more):
                raise IoFailed("no room")

            patch.setattr("freezeframe.store.write_snapshot", broken)
            with pytest.raises(IoFailed, match="no room"):
                vm.snapshot(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        assert vm.state == "running"


def test_a_thread_that_breaks_is_no_quiet_end(kernel, monkeypatch):
    with ff.boot(kernel=kernel, memory="64M") as vm:

        def broken():
            raise ZeroDivisionError("a bug")

        vm._vmm._notices.put(broken)
        with pytest.raises(FreezeframeError, match="a bug") as caught:
            vm.wait(30)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert vm.state == "stopped"


def test_nobody_waits_for_a_console_whose_machine_has_stopped(kernel):
    with ff.boot(kernel=kernel, memory="64M") as vm:
        vm.serial.expect(r"T 2\n")
        with pytest.raises(DeadlineExceeded):
            vm.serial.expect("never printed", timeout=0.1)
        caught = []

        def wait():
            try:
                vm.serial.expect("never printed", timeout=None)
            except InvalidState as error:
                caught.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        vm.kill()
        waiting.join(60)
        assert not waiting.is_alive()
        assert "stopped" in str(caught[0])
        vm.serial.read()
        assert vm.serial.read(timeout=None) == ""
        with pytest.raises(InvalidState, match="stopped"):
            vm.serial.write("nobody reads this")
        assert "T 2\n" in vm.serial.text


def test_nothing_is_accepted_and_ignored(kernel, tmp_path):
    with ff.boot(kernel=kernel, memory="64M") as vm:
        kept = vm.snapshot(tmp_path / "s")
    with pytest.raises(Refused, match="memory='fast'") as caught:
        kept.restore(memory="fast")  # type: ignore[arg-type]
    assert caught.value.hint == "one of auto, ondemand, copy"
    with pytest.raises(Refused, match="clock='stop'"):
        kept.restore(clock="stop")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="disks is"):
        kept.restore(disks=["a.raw"])  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"disks is one path, 'a\.raw'"):
        ff.boot(kernel=kernel, disks="a.raw")
    with pytest.raises(Refused, match="1 to 254"):
        ff.boot(kernel=kernel, cpus=255)
    # What the commands and `replay` call a snapshot is one here too.
    with ff.restore(f"file://{tmp_path}/s", resume=False) as vm:
        assert vm.state == "paused"
    with ff.restore(bytes(tmp_path / "s"), resume=False) as vm:  # type: ignore[arg-type]
        assert vm.state == "paused"
