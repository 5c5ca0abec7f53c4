from __future__ import annotations

import pytest

from freezeframe import _core
from freezeframe.devices import cmos, legacy
from freezeframe.errors import Incompatible

WALL = 1_700_000_000  # 2023-11-14 22:13:20 UTC, a Tuesday


@pytest.fixture
def clock():
    state = {
        "tsc_khz": 2_000_000,
        "tsc": 0,
        "boot_ns": 3_000_000_000,
        "wall_ns": WALL * 10**9,
        "host_wall_ns": WALL * 10**9,
    }
    return _core.Clock.from_state(state, 0, False)


def rtc(device, index):
    device.write(0, 1, index)
    return device.read(1, 1)


def test_rtc_tells_the_machines_time_in_both_codes(clock):
    device = cmos.Cmos(cmos.cold(64 << 20, 0), clock, lambda: None)
    assert [rtc(device, i) for i in (0, 2, 4, 6, 7, 8, 9, 0x32)] == [0x20, 0x13, 0x22, 3, 0x14, 0x11, 0x23, 0x20]
    device.write(0, 1, 0x0B)
    device.write(1, 1, 4)  # binary, 12 hours
    assert rtc(device, 4) == 0x80 | 10
    assert rtc(device, 2) == 13
    assert rtc(device, 0x0D) == 0x80
    assert rtc(device, 0x0A) & 0x80 == 0
    assert rtc(device, 0x34) | rtc(device, 0x35) << 8 == 48 << 4


def test_cmos_remembers_index_and_memory(clock):
    device = cmos.Cmos(cmos.cold(64 << 20, 1 << 30), clock, lambda: None)
    device.write(0, 1, 0x40)
    device.write(1, 1, 0x5A)
    again = cmos.Cmos(device.state(), clock, lambda: None)
    assert again.read(1, 1) == 0x5A
    assert again.state() == device.state()
    assert device.read(1, 4) == 0xFFFF_FFFF


def test_resets(clock):
    seen = []
    cmos.Cmos(cmos.cold(0, 0), clock, lambda: seen.append("cmos")).write(0, 1, 0x0F)
    device = cmos.Cmos(cmos.cold(0, 0), clock, lambda: seen.append("cmos"))
    device.write(0, 1, 0x8F)
    device.write(1, 1, 0)
    keyboard = legacy.I8042({}, lambda: seen.append("i8042"))
    assert (keyboard.read(0, 1), keyboard.read(3, 1)) == (0x20, 0)
    keyboard.write(3, 1, 0xFF)
    keyboard.write(3, 1, 0xFE)
    sleep = legacy.AcpiSleep({}, lambda: seen.append("reset"), lambda: seen.append("off"))
    for value in (0, 1, 0x34, 0x80):
        sleep.write(0, 1, value)
    assert seen == ["cmos", "i8042", "reset", "off"]


def test_pm_timer_follows_the_clock(clock):
    device = legacy.PmTimer({}, clock)
    ticks = clock.pm_timer()
    assert ticks > 0
    assert device.read(0, 4) == ticks
    assert device.read(2, 2) == ticks >> 16


def test_power_button_is_told_once():
    pulses = []
    device = legacy.EventDevice(legacy.EventDevice.cold(), lambda: pulses.append(1))
    device.power_button()
    again = legacy.EventDevice(device.state(), lambda: None)
    assert (again.read(0, 1), again.read(0, 1), pulses) == (8, 0, [1])


def test_debug_port_keeps_its_code():
    device = legacy.DebugPort(legacy.DebugPort.cold())
    device.write(0, 1, 0xAA)
    assert legacy.DebugPort(device.state()).read(0, 1) == 0xAA


@pytest.mark.parametrize(
    "make",
    [
        legacy.DebugPort,
        lambda state: legacy.EventDevice(state, lambda: None),
        lambda state: legacy.I8042(state, lambda: None),
        lambda state: cmos.Cmos(state, None, lambda: None),
    ],
)
@pytest.mark.parametrize(
    "state", [None, [], {"x": 1}, {"code": 256}, {"pending": True}, {"index": 0, "memory": "00"}, 7]
)
def test_bad_states_are_refused(make, state):
    with pytest.raises(Incompatible):
        make(state)
