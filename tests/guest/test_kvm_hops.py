"""One guest at work, moved between the engines by snapshots again and again; after each move every field of every vCPU is compared."""

from __future__ import annotations

import copy
import os
import re

import pytest

from freezeframe.machine import build_for_boot
from freezeframe.testing.guests import work, work_checksum
from freezeframe.testing.tiny import MIB, again, configured, serial

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here"),
]

BLOCKS = 64
TIMER = 0x40
TSC, DEADLINE = "0x10", "0x6e0"
LONG = 60
# How many times it moves; the full hundred takes about a minute.
HOPS = int(os.environ.get("FREEZEFRAME_HOPS", "100"))


def held(machine):
    """The vCPUs' state as the engine itself holds it: loaded, and read back before the first instruction."""
    parts = machine._parts
    parts.control.request_stop("paused")
    assert parts.engine.run()[0] == "paused"
    return [parts.engine.state(n) for n in range(parts.engine.vcpus)]


def take_time_out(before, after, khz):
    """Checks what may move between two states of a vCPU that executes nothing while its machine's clock runs, and makes these
    fields of `after` equal to those of `before`: its TSC, its timer, and that timer's request.
    """
    tsc_before, tsc_after = (state["msrs"][TSC] for state in (before, after))
    # Where a host's KVM shows its own TSC, it goes on by more than has been lived through.
    assert tsc_after >= tsc_before
    after["msrs"][TSC] = tsc_before
    old, new = before["lapic"], after["lapic"]
    word, bit = TIMER // 32, 1 << TIMER % 32
    fired = bool(new["irr"][word] & bit and not old["irr"][word] & bit)
    if fired:
        new["irr"][word] &= ~bit
    deadline = before["msrs"][DEADLINE]
    if fired and deadline:
        assert after["msrs"][DEADLINE] == 0
    elif deadline:
        # As far away as before, less what has been lived through meanwhile.
        lived = (deadline - tsc_before) - (after["msrs"][DEADLINE] - tsc_after)
        assert 0 <= lived < LONG * 1000 * khz
    else:
        assert after["msrs"][DEADLINE] == 0
    after["msrs"][DEADLINE] = deadline
    mode = old["lvt_timer"] >> 17 & 3
    if mode == 1:
        assert 0 < new["timer_current"] <= new["timer_initial"]
    else:
        assert new["timer_current"] <= old["timer_current"]
        assert fired == (new["timer_current"] == 0) or not old["timer_current"] or mode == 2
    new["timer_current"] = old["timer_current"]


def assert_same(before, after, khz):
    assert len(before) == len(after)
    for old, new in zip(before, copy.deepcopy(after), strict=True):
        take_time_out(old, new, khz)
        assert new == old


@pytest.mark.parametrize(
    ("cpus", "x2apic", "hops"),
    [(1, False, HOPS), (2, True, HOPS), (4, False, HOPS // 5)],
    ids=["1-cpu", "2-cpus-x2apic", "4-cpus"],
)
def test_a_guest_at_work_moves_between_the_engines(tmp_path, cpus, x2apic, hops):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(BLOCKS * 4096))
    image = work(cpus, blocks=BLOCKS, x2apic=x2apic)
    machine = build_for_boot(
        configured(tmp_path, image, cpus, ram=32 * MIB, disk=str(disk)), capture=MIB, engine="software"
    )
    text = ""
    try:
        for hop in range(hops + 1):
            console = serial(machine)
            machine.resume()
            # The first hop takes it out of its start, the others out of whatever it is doing behind a line.
            console.expect(r"READY|BAD.*\n" if hop == 0 else r"T \d+ \w{8}\r?\n|BAD.*\n", LONG)
            machine.pause()
            text += console.text.replace("\r", "")
            assert "BAD" not in text, text[-300:]
            before = machine.save()
            assert machine.save()["vcpus"] == before["vcpus"]
            target = ("kvm", "software")[hop % 2]
            machine = again(machine, engine=target, clock="Freeze" if hop % 3 else "Advance")
            assert machine.engine.name == target
            after = machine.save()
            assert after["vcpus"] == before["vcpus"]
            assert after["devices"] == before["devices"]
            assert_same(before["vcpus"], held(machine), before["clock"]["tsc_khz"])
    finally:
        machine.close()
    lines = re.findall(r"^T (\d+) (\w{8})$", text, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= hops
    for number, found in lines[:: max(1, len(lines) // 50)]:
        assert found == work_checksum(int(number), BLOCKS)
