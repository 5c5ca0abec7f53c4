"""What a guest writes to any register may not end the VMM, nor stop any other device."""

from __future__ import annotations

import random
import threading

import pytest

from freezeframe.config import ConsoleConfig, DiskConfig, MemoryConfig, PayloadConfig, SerialConfig, VmConfig
from freezeframe.machine import build_for_boot, build_from_snapshot
from freezeframe.testing.guests import tick

pytestmark = pytest.mark.guest

MIB = 1 << 20
PORTS = [*range(0x60, 0x72), 0x80, *range(0x3F8, 0x400), *range(0x600, 0x610), *range(0xCF8, 0xD00)]
VALUES = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x1AF4, 0x8000_0000, 0xFFFF_FFFF, (1 << 64) - 1]


@pytest.fixture
def config(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    kernel = tmp_path / "tick"
    kernel.write_bytes(tick())
    return VmConfig(
        memory=MemoryConfig(size=64 * MIB),
        payload=PayloadConfig(kernel=str(kernel)),
        disks=(DiskConfig(path=str(disk)),),
        serial=SerialConfig(mode="Null"),
        console=ConsoleConfig(mode="Null"),
    )


def poke(machine, seed, count):
    """Random accesses to every range that a device answers, and beside it."""
    chance = random.Random(seed)
    bus = machine._parts.bus
    bars = [resource["PciBar"]["base"] for node in machine.device_tree().values() for resource in node["resources"]]
    windows = [
        (0xE800_0000, 0x20000, 6),
        (0xFEC0_0000, 0x20, 1),
        (machine._parts.map.ged, 8, 1),
        *((bar, 0x40, 4) for bar in bars),
        *((bar + 0x2000, 8, 1) for bar in bars),
        *((bar + 0x4000, 0x40, 1) for bar in bars),
        *((bar + 0x6000, 0x1000, 1) for bar in bars),
        *((bar + 0x8000, 0x80, 2) for bar in bars),
        *((bar, 0x80000, 1) for bar in bars),
    ]
    weights = [weight for _, _, weight in windows]
    for _ in range(count):
        size = chance.choice((1, 2, 4, 8))
        value = chance.choice((chance.choice(VALUES), chance.getrandbits(64))) & (1 << 8 * size) - 1
        if chance.random() < 0.4:
            space, address = "pio", chance.choice(PORTS)
            if (address, value) in ((0x64, 0xFE), (0x71, 0), (0x600, 1), (0x600, 0x34)):
                continue  # these end a machine, as they should
        else:
            base, length, _ = chance.choices(windows, weights)[0]
            space, address = "mmio", base + chance.randrange(length)
        if chance.random() < 0.6:
            bus.write(space, address, size, value)
        else:
            bus.read(space, address, size)


@pytest.mark.parametrize("seed", range(8))
def test_random_register_accesses_end_nothing_and_are_saved(config, seed):
    with build_for_boot(config) as machine:
        stopped = threading.Event()
        machine.on_stop = lambda _: stopped.set()
        poke(machine, seed, 6000)
        machine.resume()
        machine.pause()
        assert not stopped.is_set()
        state = machine.save()
        memory = machine.memory
    with build_from_snapshot(machine.config, state, memory, disk_check=False) as again:
        # Input and timers apart, the machine is the same.
        assert again.save()["devices"] == state["devices"]
        poke(again, seed + 100, 500)
