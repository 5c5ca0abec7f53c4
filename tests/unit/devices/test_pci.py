from __future__ import annotations

import pytest

from freezeframe import _core
from freezeframe.devices.pci.bus import ConfigPorts, ConfigWindow, PciBus
from freezeframe.devices.pci.virtio import Kind, VirtioFunction
from freezeframe.errors import Incompatible, Refused

RNG = Kind(4, 0xFF_FF00, 2, 0)
BLOCK = Kind(2, 0x01_8000, 2, 60)
ECAM = 0xE800_0000
HIGH = 0x3FFF_FF80_0000
LOW = 0xE7F8_0000


class Registers:
    """A BAR that answers with a mark and remembers."""

    def __init__(self, mark):
        self.mark = mark
        self.seen = []

    def read(self, offset, size):
        return self.mark

    def write(self, offset, size, value):
        self.seen.append((offset, size, value))

    def set_msix_control(self, enabled, masked):
        self.seen.append(("msix", enabled, masked))

    def set_intx_disabled(self, disabled):
        self.seen.append(("intx", disabled))

    def intx_pending(self):
        return self.mark == 0x44


@pytest.fixture
def rig():
    bus = _core.Bus(_core.Control())
    pci = PciBus(None, bus)
    rng, block = Registers(0x42), Registers(0x43)
    pci.add(1, VirtioFunction("rng", RNG, rng, None, wide=True, bar=HIGH))
    pci.add(2, VirtioFunction("disk", BLOCK, block, None, wide=False, bar=LOW))
    bus.add_pio(0xCF8, 8, ConfigPorts(pci))
    bus.add_mmio(ECAM, 1 << 20, ConfigWindow(pci))
    return bus, pci, rng, block


def cfg(bus, slot, offset, size=4, value=None):
    if value is None:
        return bus.read("mmio", ECAM + (slot << 15) + offset, size)
    bus.write("mmio", ECAM + (slot << 15) + offset, size, value)
    return None


def test_identities_through_both_windows(rig):
    bus, *_ = rig
    assert [cfg(bus, n, 0) for n in range(4)] == [0x0D57_8086, 0x1044_1AF4, 0x1042_1AF4, 0xFFFF_FFFF]
    for slot in range(4):
        bus.write("pio", 0xCF8, 4, 1 << 31 | slot << 11)
        assert bus.read("pio", 0xCFC, 4) == cfg(bus, slot, 0)
        assert bus.read("pio", 0xCFE, 2) == cfg(bus, slot, 2, 2)
    assert cfg(bus, 2, 8) >> 8 == 0x01_8000
    bus.write("pio", 0xCF8, 4, 1 << 31 | 1 << 16)
    assert bus.read("pio", 0xCFC, 4) == 0xFFFF_FFFF
    bus.write("pio", 0xCF8, 4, 0)
    assert bus.read("pio", 0xCFC, 4) == 0xFFFF_FFFF
    assert cfg(bus, 1, 0x1000) == 0xFFFF_FFFF  # function 1
    assert cfg(bus, 1, 0x100) == 0


def test_address_latch_takes_dwords_only_and_is_saved(rig):
    bus, pci, *_ = rig
    bus.write("pio", 0xCF8, 4, 0x8000_0810)
    bus.write("pio", 0xCFB, 1, 1)
    assert bus.read("pio", 0xCF8, 4) == 0x8000_0810
    other = _core.Bus(_core.Control())
    again = PciBus(pci.state(), other)
    other.add_pio(0xCF8, 8, ConfigPorts(again))
    assert other.read("pio", 0xCF8, 4) == 0x8000_0810


def test_bars_size_and_move_at_any_time(rig):
    bus, _, _rng, _ = rig
    assert bus.read("mmio", HIGH, 4) == 0x42
    assert bus.read("mmio", LOW, 4) == 0x43
    # sizing with decoding on, as some kernels do
    cfg(bus, 1, 0x10, 4, 0xFFFF_FFFF)
    cfg(bus, 1, 0x14, 4, 0xFFFF_FFFF)
    assert cfg(bus, 1, 0x10) == 0xFFF8_0004
    assert cfg(bus, 1, 0x14) == 0xFFFF_FFFF
    cfg(bus, 1, 0x10, 4, 0x0000_0004)
    cfg(bus, 1, 0x14, 4, 0x10)
    assert bus.read("mmio", 0x10_0000_0000, 4) == 0x42
    assert bus.read("mmio", HIGH, 4) == 0xFFFF_FFFF
    cfg(bus, 2, 0x10, 4, 0xFFFF_FFFF)
    assert cfg(bus, 2, 0x10) == 0xFFF8_0000
    cfg(bus, 2, 0x10, 4, 0xD000_0000)
    assert bus.read("mmio", 0xD000_0000, 1) == 0x43
    cfg(bus, 2, 4, 2, 0)
    assert bus.read("mmio", 0xD000_0000, 1) == 0xFF
    cfg(bus, 2, 4, 2, 2)
    assert bus.read("mmio", 0xD000_0000, 1) == 0x43


def test_a_bar_on_top_of_another_stays_silent_until_one_moves(rig):
    bus, *_ = rig
    cfg(bus, 1, 0x14, 4, 0)
    cfg(bus, 1, 0x10, 4, LOW)
    assert bus.read("mmio", LOW, 1) in (0x42, 0x43)
    cfg(bus, 2, 0x10, 4, 0xD000_0000)
    assert (bus.read("mmio", LOW, 1), bus.read("mmio", 0xD000_0000, 1)) == (0x42, 0x43)
    cfg(bus, 1, 0x10, 4, ECAM)
    assert bus.read("mmio", ECAM, 4) == 0x0D57_8086


def capabilities(bus, slot):
    at = cfg(bus, slot, 0x34, 1)
    while at:
        yield at, cfg(bus, slot, at, 1)
        at = cfg(bus, slot, at + 1, 1)


def test_capabilities_are_where_cloud_hypervisor_has_them(rig):
    bus, *_ = rig
    found = list(capabilities(bus, 1))
    assert found == [(0x40, 9), (0x50, 9), (0x60, 9), (0x74, 9), (0x88, 0x11)]
    assert [cfg(bus, 1, at + 3, 1) for at, kind in found if kind == 9] == [1, 3, 2, 5]
    assert len(list(capabilities(bus, 2))) == 6
    assert cfg(bus, 1, 0x8A, 2) == 2  # table size − 1
    assert cfg(bus, 1, 0x8C) == 0x8000
    assert cfg(bus, 1, 0x90) == 0x48000


def test_msix_and_intx_control_reach_the_device(rig):
    bus, _, rng, _ = rig
    rng.seen.clear()
    cfg(bus, 1, 0x8A, 2, 0xFFFF)
    cfg(bus, 1, 0x8A, 2, 0x8000)
    cfg(bus, 1, 4, 2, 0x0402)
    assert ("msix", True, True) in rng.seen
    assert ("msix", True, False) in rng.seen
    assert ("intx", True) in rng.seen
    assert cfg(bus, 1, 0x8A, 2) == 0x8002


def test_status_shows_a_pending_intx(rig):
    bus, _, rng, _ = rig
    before = cfg(bus, 1, 4)
    rng.mark = 0x44
    assert cfg(bus, 1, 4) == before | 1 << 19
    assert cfg(bus, 1, 6, 2) == before >> 16 | 8
    assert cfg(bus, 1, 6, 1) & 8
    assert cfg(bus, 1, 4, 2) == before & 0xFFFF
    assert cfg(bus, 1, 7, 1) == before >> 24


def test_window_capability_reaches_bar_0(rig):
    bus, _, rng, _ = rig
    rng.seen.clear()
    cfg(bus, 1, 0x74 + 8, 4, 0x14)
    cfg(bus, 1, 0x74 + 12, 4, 1)
    assert cfg(bus, 1, 0x74 + 16, 1) == 0x42
    cfg(bus, 1, 0x74 + 16, 1, 0x0F)
    assert (0x14, 1, 0x0F) in rng.seen
    for offset, length in ((0x14, 3), (0x80000, 4), (0x15, 2), (0, 0), (0x14, 0xFFFF_FFFF)):
        rng.seen.clear()
        cfg(bus, 1, 0x74 + 8, 4, offset)
        cfg(bus, 1, 0x74 + 12, 4, length)
        cfg(bus, 1, 0x74 + 16, 4, 1)
        assert rng.seen == []


def test_all_ones_and_zeros_everywhere_change_only_what_is_writable(rig):
    bus, *_ = rig
    before = [cfg(bus, 1, at) for at in range(0, 256, 4)]
    for value in (0xFFFF_FFFF, 0):
        for size in (1, 2, 4):
            for at in range(0, 4096, size):
                cfg(bus, 1, at, size, value & (1 << 8 * size) - 1)
    after = [cfg(bus, 1, at) for at in range(0, 256, 4)]
    writable = {1, 3, 4, 5, 15, 0x78 >> 2, 0x7C >> 2, 0x80 >> 2, 0x84 >> 2, 0x88 >> 2}
    assert {n for n in range(64) if before[n] != after[n]} <= writable
    assert cfg(bus, 1, 0) == 0x1044_1AF4


def test_state_goes_round(rig):
    _bus, _pci, *_ = rig
    function = VirtioFunction("rng", RNG, Registers(1), None, wide=True, bar=HIGH)
    function.write(0x10, 4, 0xABC0_0000)
    function.write(4, 2, 0x0406)
    function.write(0x8A, 2, 0xC000)
    state = function.state()
    again = VirtioFunction("rng", RNG, Registers(1), state, wide=True, bar=0)
    assert again.state() == state
    assert [again.read(n, 4) for n in range(0, 256, 4)] == [function.read(n, 4) for n in range(0, 256, 4)]


@pytest.mark.parametrize(
    "change",
    [
        {"bar0": 1},
        {"bar0": -1},
        {"command": 0x10000},
        {"x": 0},
        {"msix_control": 1},
        {"command": "2"},
        {"bar0": 1 << 64},
    ],
)
def test_bad_state_is_refused(change):
    state = VirtioFunction("rng", RNG, Registers(1), None, wide=True, bar=HIGH).state()
    with pytest.raises(Incompatible):
        VirtioFunction("rng", RNG, Registers(1), {**state, **change}, wide=True, bar=0)


def test_slots(rig):
    _, pci, *_ = rig
    for slot in (0, 1, 32):
        with pytest.raises(Refused):
            pci.add(slot, VirtioFunction("x", RNG, Registers(1), None, wide=True, bar=0x20_0000_0000))
