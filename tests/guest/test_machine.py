"""Tiny guests on whole machines: boot, pause, save, restore, at any moment."""

from __future__ import annotations

import os
import re
import threading
import time

import pytest

from freezeframe import _core
from freezeframe.machine import build_for_boot, build_from_snapshot
from freezeframe.testing.guests import smp, tick
from freezeframe.testing.tiny import MIB, again, configured, copy_of, serial

pytestmark = pytest.mark.guest


@pytest.fixture(params=["software", "kvm"], autouse=True)
def engine(request, monkeypatch):
    """Every test here runs on both engines; where one cannot, it says so."""
    if request.param == "kvm":
        need_kvm()
    monkeypatch.setenv("FREEZEFRAME_ENGINE", request.param)
    return request.param


def need_kvm():
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be opened here")


GUESTS = {
    "tick": (lambda: tick(size=0x4_0000), 1),
    "smp-2": (lambda: smp(2, iret=False), 2),
    "smp-4-x2apic-deadline": (lambda: smp(4, x2apic=True, deadline=True, iret=False), 4),
    "smp-8": (lambda: smp(8, iret=False), 8),
}


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_goes_on_through_many_restores(tmp_path, name, engine):
    image, cpus = GUESTS[name]
    machine = build_for_boot(configured(tmp_path, image(), cpus), capture=MIB)
    try:
        last = 0
        for round_ in range(12):
            console = serial(machine)
            machine.resume()
            # The first rounds interrupt the guest's start, the later ones its work.
            if round_ > 3:
                number = int(console.expect(r"(?<=T )\d+(?=\r?\n)", 60).group(0))
                assert number > last or round_ == 4
                last = number
            machine.pause()
            assert "BAD" not in console.text
            machine = again(machine, clock="Freeze" if round_ % 2 else "Advance")
    finally:
        machine.close()


def test_a_restored_guest_catches_up_with_the_time_that_passed(tmp_path, engine):
    machine = build_for_boot(configured(tmp_path, smp(2, iret=False), 2), capture=MIB)
    try:
        machine.resume()
        serial(machine).expect("T 3", 60)
        machine.pause()
        state, memory = machine.save(), copy_of(machine.memory)
        for name in ("host_wall_ns", "wall_ns"):
            state["clock"][name] -= 3600 * 10**9
        config = machine.config
        machine.close()
        machine = build_from_snapshot(config, state, memory, capture=MIB)
        console = serial(machine)
        machine.resume()
        deadline = time.monotonic() + 60
        while machine._parts.clock.state()["boot_ns"] < 3600 * 10**9:
            console.expect(r"T \d+", 60)
            assert time.monotonic() < deadline
        assert "BAD" not in console.text
        machine.pause()
        assert abs(machine.save()["clock"]["wall_ns"] - time.time_ns()) < 5 * 10**9
    finally:
        machine.close()


def test_the_guests_own_time_stands_still_while_it_is_paused(tmp_path):
    with build_for_boot(configured(tmp_path, tick(size=0x1000)), capture=MIB) as machine:
        machine.resume()
        serial(machine).expect("T 3", 60)
        machine.pause()
        before = machine.save()
        assert machine.save() == {**before, "clock": machine.save()["clock"]}
        assert machine.save()["clock"]["tsc"] == before["clock"]["tsc"]


def ports(code):
    """A guest of a few instructions in 32-bit mode behind the PVH entry of `tick`."""
    image = bytearray(tick())
    entry = int.from_bytes(re.search(rb"Xen\0(....)", bytes(image), re.DOTALL).group(1), "little")
    at = entry - 0x10_0000 + image_offset(image)
    image[at : at + len(code)] = code
    return bytes(image)


def image_offset(image):
    """File offset of what is loaded at 1 MiB."""
    start, count = int.from_bytes(image[32:40], "little"), int.from_bytes(image[56:58], "little")
    for n in range(count):
        header = image[start + 56 * n : start + 56 * n + 56]
        if int.from_bytes(header[:4], "little") == 1 and int.from_bytes(header[24:32], "little") == 0x10_0000:
            return int.from_bytes(header[8:16], "little")
    raise AssertionError


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("66ba 0006 b034 ee f4", "poweroff"),  # mov dx, 0x600; mov al, S5; out dx, al; hlt
        ("66ba 0006 b001 ee f4", "reset"),
        ("b0fe e664 f4", "reset"),  # the keyboard controller
        ("b08f e670 b000 e671 f4", "reset"),
        ("0f011d 00000000 cc", "reset"),  # lidt of zeros; int3: a triple fault
        ("0f011d 00000000 0f0b", "reset"),  # the same with ud2
    ],
)
def test_a_guest_that_ends_itself(tmp_path, code, kind, engine):
    if engine == "kvm" and code.endswith("cc") and not _core.kvm_probe()[0]:
        pytest.skip("this host's KVM does not know int3 in ring 0")
    config = configured(tmp_path, ports(bytes.fromhex(code)))
    with build_for_boot(config) as machine:
        seen = []
        told = threading.Event()
        machine.on_stop = lambda reason: (seen.append(reason.kind), told.set())
        machine.resume()
        assert told.wait(20)
        assert seen == [kind]
        # As control does it: the same disks and consoles, a new machine.
        with build_for_boot(config, backends=machine.release()) as second:
            assert second.state == "created"


def test_a_device_that_raises_stops_the_machine_and_says_why(tmp_path):
    class Broken:
        def read(self, offset, size):
            raise ZeroDivisionError("in a register")

        def write(self, offset, size, value):
            pass

    with build_for_boot(configured(tmp_path, ports(bytes.fromhex("e4e9 ebfc")))) as machine:  # in al, 0xe9, for ever
        machine._parts.bus.add_pio(0xE9, 1, Broken())
        told = threading.Event()
        machine.on_stop = lambda _: told.set()
        machine.resume()
        assert told.wait(20)
        assert machine.stopped.kind == "failed"
        assert "ZeroDivisionError: in a register" in str(machine.stopped.error)
        assert machine.stopped.error.detail == {"code": "device"}
