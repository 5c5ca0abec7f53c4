"""The very same guests on both engines: what a guest's kernel needs of its machine, one test a subject."""

from __future__ import annotations

import os
import random
import struct
import threading

import pytest

from freezeframe import _core
from freezeframe.machine import build_for_boot
from freezeframe.testing import guests
from freezeframe.testing.tiny import MIB, configured, console, serial

pytestmark = pytest.mark.guest

DEADLINE = 120


@pytest.fixture(params=["software", "kvm"])
def engine(request):
    if request.param == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened here")
    return request.param


class Running:
    """A machine that runs its guest until the guest switches it off."""

    def __init__(self, config, engine):
        self.machine = build_for_boot(config, capture=MIB, engine=engine)
        self.serial = serial(self.machine)
        self.ended = threading.Event()
        self.machine.on_stop = lambda _: self.ended.set()

    def __enter__(self):
        self.machine.resume()
        return self

    def __exit__(self, *_):
        self.machine.close()

    def finish(self, *parts):
        """That it has printed all of `parts`, in this order, and has switched itself off."""
        for part in (*parts, "DONE"):
            self.serial.expect(rf"(?m)^{part}\r?$|(?P<bad>BAD.*)", DEADLINE)
            assert "BAD" not in self.serial.text, self.serial.text
        assert self.ended.wait(DEADLINE)
        assert self.machine.stopped.kind == "poweroff"


def checksum(data):
    """FNV-1a of 32 bits."""
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{value:08x}"


@pytest.mark.parametrize("x2apic", [False, True])
def test_timers(tmp_path, engine, x2apic):
    with Running(configured(tmp_path, guests.timers(x2apic=x2apic)), engine) as guest:
        guest.finish(
            "one-shot", "divided", "periodic", "masked", "deadline", "past deadline", "no deadline", "deadlines"
        )


def test_paging(tmp_path, engine):
    with Running(configured(tmp_path, guests.paging()), engine) as guest:
        guest.finish(
            "not present",
            "read-only",
            "written",
            "remapped",
            "another space",
            "reserved",
            "no execution",
            "split",
            "user",
        )


@pytest.mark.parametrize("x2apic", [False, True])
def test_serial_port(tmp_path, engine, x2apic):
    typed = random.Random(1).randbytes(3000)
    with Running(configured(tmp_path, guests.serial(received=len(typed), x2apic=x2apic)), engine) as guest:
        for _ in range(2):
            guest.serial.expect("TYPE", DEADLINE)
            guest.serial.write(typed)
            assert guest.serial.expect(r"INPUT (\w{8})\r?\n", DEADLINE).group(1) == checksum(typed)
        guest.serial.expect("MASKED", DEADLINE)
        guest.serial.write(b"x")
        guest.finish("level", "transmitter")


@pytest.mark.parametrize("x2apic", [False, True])
def test_virtio_block_and_console(tmp_path, engine, x2apic):
    blocks = 64
    chosen = random.Random(2)
    before, typed = chosen.randbytes(blocks * 4096), chosen.randbytes(3000)
    disk = tmp_path / "disk"
    disk.write_bytes(before)
    image = guests.virtio(blocks=blocks, typed=len(typed), x2apic=x2apic)
    with Running(configured(tmp_path, image, disk=str(disk)), engine) as guest:
        found = guest.serial.expect(r"SECTORS (\d+)\r?\nDISK (\w{8})\r?\n", DEADLINE)
        assert found.groups() == (str(blocks * 8), checksum(before))
        # Three passes over the disk, a flush and two refused requests: one interrupt each.
        assert guest.serial.expect(r"REQUESTS (\d+)\r?\n", DEADLINE).group(1) == str(3 * blocks + 3)
        screen = console(guest.machine)
        guest.serial.expect("TYPE", DEADLINE)
        screen.write(typed)
        assert guest.serial.expect(r"INPUT (\d+ \w{8})\r?\n", DEADLINE).group(1) == f"{len(typed)} {checksum(typed)}"
        assert screen.text == "".join(511 * chr(ord("a") + n) + "\n" for n in range(16))
        guest.finish()
    written = b"".join(struct.pack("<I", n * 0x9E3779B1 & 0xFFFFFFFF ^ 0x5BD1E995) for n in range(blocks * 1024))
    assert disk.read_bytes() == written


@pytest.mark.parametrize("deadline", [False, True])
@pytest.mark.parametrize("cpus", [2, 4])
def test_processors_interrupt_each_other(tmp_path, engine, cpus, deadline):
    image = guests.smp(cpus, x2apic=deadline, deadline=deadline, iret=False)
    with Running(configured(tmp_path, image, cpus), engine) as guest:
        guest.serial.expect(rf"CPUS {cpus}\r?\n", DEADLINE)
        # The timers of the other processors are looked at every 64 rounds.
        guest.serial.expect(r"T 70\r?\n", DEADLINE)
        assert "BAD" not in guest.serial.text


def test_interrupts_are_left_in_protected_mode(tmp_path, engine):
    with Running(configured(tmp_path, guests.smp(2), 2), engine) as guest:
        while not guest.ended.wait(0.05):
            if "T 10" in guest.serial.text:
                return
        error = guest.machine.stopped.error
        if engine == "kvm" and not _core.kvm_probe()[0] and error.detail == {"code": "unsupported-instruction"}:
            pytest.skip(str(error))
        raise error
