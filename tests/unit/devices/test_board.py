"""The devices of `--test-devices`."""

from __future__ import annotations

import threading

import pytest

from freezeframe.devices import pic, pit
from freezeframe.devices.debug_exit import DebugExit
from freezeframe.devices.fw_cfg import FwCfg
from freezeframe.devices.testdev import TestDevice
from freezeframe.errors import Incompatible

pytestmark = pytest.mark.unit


class Output:
    """The PIC's output, as it was set last."""

    level = False

    def set(self, level: bool) -> None:
        self.level = level


@pytest.fixture
def made():
    output = Output()
    return pic.Pic(pic.Pic.cold(), output.set), output


def ports(controller):
    return {base + n: (registers, n) for base, size, registers in controller.ports() for n in range(size)}


def out(controller, port, *values):
    registers, n = ports(controller)[port]
    for value in values:
        registers.write(n, 1, value)


def inb(controller, port):
    registers, n = ports(controller)[port]
    return registers.read(n, 1)


def initialise(controller, *, icw4=1):
    for first, base, third in ((0x20, 0x40, 4), (0xA0, 0x48, 2)):
        out(controller, first, 0x11)
        out(controller, first + 1, base, third, icw4, 0)


def test_an_edge_is_one_interrupt_until_its_end(made):
    controller, output = made
    initialise(controller)
    controller.set_line(4, True)
    assert output.level
    assert controller.acknowledge() == 0x44
    assert not output.level
    controller.set_line(4, False)
    controller.set_line(4, True)
    assert not output.level, "the first one is being served"
    assert inb(controller, 0x20) == 1 << 4
    out(controller, 0x20, 0x0B)
    assert inb(controller, 0x20) == 1 << 4
    out(controller, 0x20, 0x20)
    assert output.level
    assert controller.acknowledge() == 0x44


def test_priorities_nest_and_rotate(made):
    controller, output = made
    initialise(controller)
    controller.set_line(5, True)
    assert controller.acknowledge() == 0x45
    controller.set_line(6, True)
    assert not output.level
    controller.set_line(1, True)
    assert output.level
    assert controller.acknowledge() == 0x41
    out(controller, 0x20, 0x61, 0x65)  # specific ends
    assert controller.acknowledge() == 0x46
    out(controller, 0x20, 0xA0)  # end, and 6 becomes the lowest
    for line in (6, 7):
        controller.set_line(line, False)
        controller.set_line(line, True)
    assert controller.acknowledge() == 0x47
    out(controller, 0x20, 0x20, 0xC4)  # 4 is the lowest: 5 the highest
    for line in (3, 5):
        controller.set_line(line, False)
        controller.set_line(line, True)
    assert controller.acknowledge() == 0x45


def test_the_second_chip_by_the_cascade(made):
    controller, output = made
    initialise(controller)
    controller.set_line(11, True)
    assert output.level
    assert controller.acknowledge() == 0x4B
    out(controller, 0xA0, 0x0B)
    assert inb(controller, 0xA0) == 1 << 3
    controller.set_line(8, True)
    assert not output.level, "the first chip still serves the cascade"
    out(controller, 0x20, 0x20)
    assert output.level
    assert controller.acknowledge() == 0x48
    controller.set_line(2, True)  # not a pin
    assert inb(controller, 0x20) & 4 == 0


def test_masks_levels_polls_and_automatic_ends(made):
    controller, output = made
    initialise(controller, icw4=3)
    out(controller, 0x21, 0x10)
    assert inb(controller, 0x21) == 0x10
    controller.set_line(4, True)
    assert not output.level
    out(controller, 0x21, 0)
    assert controller.acknowledge() == 0x44
    assert not output.level
    out(controller, 0x4D0, 0xFF)
    assert inb(controller, 0x4D0) == 0xF8
    controller.set_line(5, True)
    assert [controller.acknowledge(), controller.acknowledge()] == [0x45, 0x45], "a level stays"
    controller.set_line(5, False)
    assert not output.level
    assert controller.acknowledge() == 0x47, "nobody asks any more: spurious"
    controller.set_line(3, True)
    out(controller, 0x20, 0x0C)
    assert [inb(controller, 0x20), inb(controller, 0x20)] == [0x83, 0x08]


def test_special_mask_mode(made):
    controller, output = made
    initialise(controller)
    controller.set_line(1, True)
    assert controller.acknowledge() == 0x41
    controller.set_line(4, True)
    assert not output.level
    out(controller, 0x21, 1 << 1)
    out(controller, 0x20, 0x68)
    assert output.level, "a masked interrupt in service holds nobody up"


def test_the_pic_is_its_state(made):
    controller, _ = made
    initialise(controller)
    for line in (3, 9, 12):
        controller.set_line(line, True)
    controller.acknowledge()
    output = Output()
    again = pic.Pic(controller.state(), output.set)
    assert again.state() == controller.state()
    out(controller, 0x20, 0x20)
    out(again, 0x20, 0x20)
    assert output.level
    assert again.acknowledge() == controller.acknowledge()
    state = controller.state()
    state["second"]["irr"] = 256
    with pytest.raises(Incompatible, match=r"__pic\.second"):
        pic.Pic(state, output.set)


class Time:
    """A clock that is set."""

    tick = 0

    def state(self):
        return {"boot_ns": -(-self.tick * pit.SECOND_NS // pit.HZ)}


def timer(state=None):
    time, edges = Time(), []
    return pit.Pit(state or pit.Pit.cold(), time, edges.append), time, edges


def program(device, channel, mode, count, access=3):
    device.write(pit.CONTROL, 1, channel << 6 | access << 4 | mode << 1)
    for byte in (count & 0xFF, count >> 8):
        device.write(channel, 1, byte)


def count(device, channel):
    return device.read(channel, 1) | device.read(channel, 1) << 8


def test_counts_of_the_modes():
    device, time, _ = timer()
    for mode, expected in (
        (0, (1000, 700, 65236)),
        (2, (1000, 700, 700)),
        (3, (1000, 400, 400)),
        (4, (1000, 700, 65236)),
    ):
        program(device, 0, mode, 1000)
        start = time.tick
        seen = []
        for later in (0, 300, 1300):
            time.tick = start + later
            seen.append(count(device, 0))
        assert tuple(seen) == expected, f"mode {mode}"


def test_latches_and_read_back():
    device, time, _ = timer()
    program(device, 0, 2, 5000)
    time.tick += 100
    device.write(pit.CONTROL, 1, 0x00)
    time.tick += 100
    assert count(device, 0) == 4900
    assert count(device, 0) == 4800
    device.write(pit.CONTROL, 1, 0xC2)  # status and count of channel 0
    assert device.read(0, 1) == 0x80 | 3 << 4 | 2 << 1
    assert count(device, 0) == 4800
    device.write(pit.CONTROL, 1, 0x34)
    device.write(pit.CONTROL, 1, 0xE2)
    assert device.read(0, 1) & 0x40, "no count yet"
    device.write(pit.CONTROL, 1, 0x35)
    device.write(0, 1, 0x00)
    device.write(0, 1, 0x10)
    time.tick += 1
    assert count(device, 0) == 0x0999, "in decimal"


def test_output_and_gate_of_the_speakers_channel():
    device, time, _ = timer()
    device.write_port_b(1)
    program(device, 2, 0, 1000)
    assert device.read_port_b() & 0x21 == 0x01
    time.tick += 600
    device.write_port_b(2)
    time.tick += 5000
    assert device.read_port_b() & 0x23 == 0x02, "the count stands while the gate is low"
    assert count(device, 2) == 400
    device.write_port_b(1)
    time.tick += 399
    assert device.read_port_b() & 0x20 == 0
    time.tick += 1
    assert device.read_port_b() & 0x20
    program(device, 2, 1, 50)
    time.tick += 100
    assert device.read_port_b() & 0x20, "a one-shot waits for its gate"
    device.write_port_b(0)
    device.write_port_b(1)
    assert not device.read_port_b() & 0x20
    time.tick += 50
    assert device.read_port_b() & 0x20


def test_the_pit_is_its_state():
    device, time, _ = timer()
    program(device, 0, 3, 777)
    device.write_port_b(3)
    time.tick += 1234
    device.write(pit.CONTROL, 1, 0x00)
    device.read(0, 1)
    again, then, _ = timer(device.state())
    then.tick = time.tick
    assert again.state() == device.state()
    assert again.read(0, 1) == device.read(0, 1)
    assert again.read_port_b() == device.read_port_b()
    state = device.state()
    state["channels"].pop()
    with pytest.raises(Incompatible, match="three"):
        timer(state)


def test_an_edge_far_away_does_not_end_the_pits_thread(monkeypatch):
    waited = []
    state = pit.Pit.cold()
    state["channels"][0]["start"] = pit.TICK_MAX
    device, _, _ = timer(state)
    device._runs = True

    def look(seconds):
        waited.append(seconds)
        device._runs = False

    monkeypatch.setattr(device._changed, "wait", look)
    device._tick()
    assert waited == [pit.WAIT_MAX]
    assert pit.WAIT_MAX <= threading.TIMEOUT_MAX


def test_firmware_configuration():
    device = FwCfg(FwCfg.cold(), cpus=3, ram=5 << 30)

    def item(key, size):
        device.write(0, 2, key)
        return bytes(device.read(1, 1) for _ in range(size))

    assert item(0, 6) == b"QEMU\0\0"
    assert int.from_bytes(item(5, 2), "little") == 3
    assert int.from_bytes(item(3, 8), "little") == 5 << 30
    assert item(0x4242, 4) == bytes(4)
    device.write(0, 2, 3)
    device.read(1, 1)
    again = FwCfg(device.state(), cpus=3, ram=5 << 30)
    assert [again.read(1, 1) for _ in range(4)] == [0, 0, 0x40, 1]
    assert [device.read(1, 1) for _ in range(4)] == [0, 0, 0x40, 1]


def test_latches_and_lines():
    lines = []
    device = TestDevice(TestDevice.cold(), lambda number, level: lines.append((number, level)))
    at = {base: registers for base, _, registers in device.ports()}
    at[0xE0].write(0, 4, 0x11223344)
    at[0xE0].write(2, 1, 0xAA)
    assert at[0xE0].read(0, 4) == 0x11AA3344
    assert at[0xE8].read(1, 1) == 0x33
    at[0xE4].write(0, 4, 1)
    at[0x2000].write(11, 4, 1)
    at[0x2000].write(11, 4, 0)
    assert lines == [(11, True), (11, False)]
    window = device.window()
    window.write(0xFFF8, 8, 0x1122334455667788)
    assert window.read(0xFFFE, 4) == 0xFFFF1122
    again = TestDevice(device.state(), lambda *_: None)
    assert again.window().read(0xFFF8, 8) == 0x1122334455667788
    assert again.state() == device.state()
    assert list(device.state()["window"]) == ["0xff00"]
    with pytest.raises(Incompatible, match="no block"):
        TestDevice({"latch": 0, "window": {"0x0001": "00"}}, lambda *_: None)


def test_exit_status():
    ended = []
    device = DebugExit(DebugExit.cold(), ended.append)
    for value in (0, 1, 38, 63, 0x80):
        device.write(0, 4, value)
    assert ended == [1, 3, 77, 127, 1]
