"""The virtio-pci transport and its queues, as a driver sees them, on every device."""

from __future__ import annotations

import copy
import os
import random

import pytest

from freezeframe import _core
from freezeframe.errors import Incompatible
from freezeframe.testing.virtio_driver import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FEATURES_OK,
    INDIRECT,
    ISR,
    NEEDS_RESET,
    NEXT,
    NO_VECTOR,
    PBA,
    TABLE,
    VERSION_1,
    WRITE,
    Driver,
    Host,
    saved,
)

pytestmark = pytest.mark.unit


class Made:
    """One kind of device with what it needs from the host."""

    def __init__(self, kind: str, tmp_path) -> None:
        self.kind = kind
        self.host = Host()
        self.image = tmp_path / "disk"
        self.image.write_bytes(bytes(1 << 20))
        self.output = _core.ConsoleOutput(capture=1 << 20)
        self.device = self.build(None)

    def build(self, state, host=None):
        host = host or self.host
        if self.kind == "blk":
            fd = os.open(self.image, os.O_RDWR)
            try:
                return _core.VirtioBlk("_disk0", *host.parts(), fd, readonly=False, queues=2, state=state)
            finally:
                os.close(fd)
        if self.kind == "console":
            return _core.VirtioConsole("__console", *host.parts(), self.output, size=(80, 25), state=state)
        fd = os.open("/dev/urandom", os.O_RDONLY)
        try:
            return _core.VirtioRng("__rng", *host.parts(), fd, state=state)
        finally:
            os.close(fd)

    def driver(self) -> Driver:
        return Driver(self.device, self.host)

    def restored(self, host=None):
        self.device = self.build(saved(self.device), host)
        return self.device


@pytest.fixture(params=["blk", "console", "rng"])
def made(request, tmp_path):
    return Made(request.param, tmp_path)


@pytest.fixture
def rng(tmp_path):
    return Made("rng", tmp_path)


def ask(driver: Driver, length: int = 16, **kw) -> int:
    """One request for random bytes; gives where they go."""
    at = driver.allocate(length)
    driver.rings[0].add([(at, length, True)], **kw)
    return at


def test_a_driver_brings_it_up(made) -> None:
    driver = made.driver()
    assert driver.offered() & (VERSION_1 | EVENT_IDX | INDIRECT) == VERSION_1 | EVENT_IDX | INDIRECT
    driver.start()
    assert driver.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert made.device.vectors == len(driver.rings) + 1
    made.device.write(0x16, 2, 99)  # no such queue
    assert made.device.read(0x18, 2) == 0
    assert made.device.read(0x1C, 2) == 0


def test_features_must_include_version_1_and_be_offered(made) -> None:
    driver = made.driver()
    offered = driver.offered()
    for wrong in (offered & ~VERSION_1, offered | 1 << 40, 0):
        made.device.write(0x14, 1, 0)
        made.device.write(0x14, 1, ACKNOWLEDGE | DRIVER)
        assert not driver.accept(wrong)
        made.device.write(0x14, 1, driver.status() | DRIVER_OK)
        assert not driver.status() & DRIVER_OK
    made.device.write(0x14, 1, 0)
    made.device.write(0x14, 1, ACKNOWLEDGE | DRIVER)
    assert driver.accept(VERSION_1)
    driver.device.write(0x08, 4, 0)
    driver.device.write(0x0C, 4, 0xFFFF_FFFF)  # too late
    assert made.device.state()["virtio"]["driver_features"] == VERSION_1


def test_status_bits_stay_until_reset(made) -> None:
    driver = made.driver().start()
    made.device.write(0x14, 1, ACKNOWLEDGE)
    assert driver.status() & DRIVER_OK
    made.device.write(0x14, 1, 0)
    state = made.device.state()
    assert state["virtio"]["device_status"] == 0
    assert not any(queue["ready"] for queue in state["virtio"]["queues"])
    assert state["virtio"]["config_vector"] == NO_VECTOR
    # MSI-X is PCI's: a virtio reset leaves the table.
    assert made.device.read(TABLE + 8, 4) != 0
    made.device.reset()
    assert made.device.read(TABLE + 12, 4) == 1


def test_nothing_is_used_before_driver_ok(rng) -> None:
    driver = rng.driver()
    rng.device.write(0x14, 1, ACKNOWLEDGE | DRIVER)
    assert driver.accept(driver.offered())
    driver.rings = [driver.set_queue(0)]
    ask(driver)
    driver.rings[0].notify()
    assert driver.rings[0].completed() == []
    rng.device.write(0x14, 1, driver.status() | DRIVER_OK)
    assert driver.rings[0].completed() == [(0, 16)]


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | INDIRECT | EVENT_IDX])
def test_many_rounds_through_the_ring(rng, features: int) -> None:
    driver = rng.driver().start(features=features, size=8)
    ring = driver.rings[0]
    for round_ in range(70_000 if features == VERSION_1 else 500):
        at = 0x400000 + 64 * (round_ % 8)
        ring.add([(at, 8, True), (at + 32, 8, True)], indirect=bool(features & INDIRECT))
        if features & EVENT_IDX:
            ring.put16(ring.avail + 4 + 2 * ring.size, ring.used_index)
        ring.notify()
        assert [length for _, length in ring.completed()] == [16]
        assert rng.host.vectors() == [1]
    assert ring.used_index == (70_000 if features == VERSION_1 else 500)


def test_interrupts_as_the_driver_wants_them(rng) -> None:
    driver = rng.driver().start(features=VERSION_1)
    ring = driver.rings[0]
    ring.put16(ring.avail, 1)  # VIRTQ_AVAIL_F_NO_INTERRUPT
    ask(driver)
    ring.notify()
    assert (len(ring.completed()), rng.host.vectors()) == (1, [])
    driver = rng.driver().start(features=VERSION_1 | EVENT_IDX)
    ring = driver.rings[0]
    ring.put16(ring.avail + 4 + 2 * ring.size, 2)  # after the third
    for expected in ([], [], [1], []):
        ask(driver)
        ring.notify()
        assert rng.host.vectors() == expected


def test_masked_vectors_wait_in_the_pba(rng) -> None:
    driver = rng.driver().start()
    driver.set_vector(1, masked=True)
    ask(driver)
    driver.rings[0].notify()
    assert rng.host.vectors() == []
    assert rng.device.read(PBA, 8) == 0b10
    driver.again(rng.restored())
    assert rng.device.read(PBA, 8) == 0b10
    rng.device.write(TABLE + 16 + 12, 4, 0)
    assert rng.host.vectors() == [1]
    assert rng.device.read(PBA, 8) == 0
    rng.device.set_msix_control(True, True)  # the whole function
    driver.rings[0].put16(driver.rings[0].avail + 4 + 2 * driver.rings[0].size, 1)
    ask(driver)
    driver.rings[0].notify()
    assert rng.device.read(PBA, 8) == 0b10
    assert rng.device.msix_control() == (True, True)
    rng.device.set_msix_control(True, False)
    assert rng.host.vectors() == [1]


def test_intx_when_msix_is_off(rng) -> None:
    driver = rng.driver().start(msix=False)
    line = _core.IrqLine(rng.host.ioapic, 7)

    def level() -> bool:
        return bool(rng.host.ioapic.state()["lines"] >> 7 & 1)

    rng.device.set_intx(line)
    ask(driver)
    driver.rings[0].notify()
    assert level()
    assert rng.device.intx_pending()
    rng.device.set_intx_disabled(True)
    assert not level()
    rng.device.set_intx_disabled(False)
    driver.again(rng.restored())
    assert not level()  # the old device let go of it
    rng.device.set_intx(line)
    assert level()
    assert rng.device.read(ISR, 1) == 1
    assert not level()
    assert rng.device.read(ISR, 1) == 0
    assert rng.host.vectors() == []


def test_vectors_outside_of_the_table_read_back_as_none(made) -> None:
    made.device.write(0x10, 2, made.device.vectors)
    assert made.device.read(0x10, 2) == NO_VECTOR
    made.device.write(0x10, 2, 0)
    assert made.device.read(0x10, 2) == 0


def broken(name: str, driver: Driver) -> None:
    """Something that no driver may do, in queue 0."""
    ring, ram = driver.rings[0], driver.host.memory.regions[0][1]
    at = driver.allocate(64)
    if name == "loop":
        ring.describe(0, at, 1, WRITE | NEXT, 0)
        ring.offer(0)
    elif name == "head outside":
        ring.offer(ring.size)
    elif name == "next outside":
        ring.describe(0, at, 1, WRITE | NEXT, 0xFFFF)
        ring.offer(0)
    elif name == "index jump":
        ring.put16(ring.avail + 2, ring.size + 1)
    elif name == "buffer outside of RAM":
        ring.add([(ram - 8, 16, True)])
    elif name == "buffer that wraps":
        ring.add([((1 << 64) - 8, 16, True)])
    elif name == "readable after writable":
        ring.add([(at, 1, True), (at, 1, False)])
    elif name == "table of odd size":
        ring.describe(0, at, 17, 4)
        ring.offer(0)
    elif name == "table outside of RAM":
        ring.describe(0, ram, 16, 4)
        ring.offer(0)
    elif name == "table in a table":
        driver.host.memory.write(at, at.to_bytes(8, "little") + bytes([16, 0, 0, 0, 4, 0, 0, 0]))
        ring.describe(0, at, 16, 4)
        ring.offer(0)
    elif name == "table with a next":
        ring.describe(0, at, 16, 4 | NEXT, 1)
        ring.offer(0)


BROKEN = [
    "loop",
    "head outside",
    "next outside",
    "index jump",
    "buffer outside of RAM",
    "buffer that wraps",
    "readable after writable",
    "table of odd size",
    "table outside of RAM",
    "table in a table",
    "table with a next",
]


@pytest.mark.parametrize("name", BROKEN)
def test_an_impossible_driver_stops_its_device_only(made, name: str) -> None:
    driver = made.driver().start()
    broken(name, driver)
    if made.kind == "console":
        made.device.receive(bytes(100))  # the receive queue is looked at when there is some
        made.device.resume()
    driver.rings[0].notify()
    assert driver.status() & NEEDS_RESET
    assert made.device.fault()
    assert made.host.vectors() == [0]  # a configuration interrupt
    driver.rings[0].notify()
    driver.again(made.restored())
    assert driver.status() & NEEDS_RESET
    assert "saved" in made.device.fault()
    driver.start()
    assert driver.status() == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert made.device.fault() is None


def test_rings_must_lie_in_ram(made) -> None:
    driver = made.driver()
    made.device.write(0x14, 1, ACKNOWLEDGE | DRIVER)
    assert driver.accept(driver.offered())
    made.device.write(0x16, 2, 0)
    made.device.write(0x20, 8, made.host.memory.regions[0][1])
    made.device.write(0x1C, 2, 1)
    assert made.device.read(0x1C, 2) == 0
    assert driver.status() & NEEDS_RESET


def test_available_but_not_notified_is_done_after_a_restore(rng) -> None:
    driver = rng.driver().start()
    ask(driver)
    driver.again(rng.restored())
    assert driver.rings[0].completed() == []
    rng.device.resume()
    assert driver.rings[0].completed() == [(0, 16)]
    assert rng.host.vectors() == [1]
    rng.device.resume()
    assert rng.host.vectors() == []


def test_used_but_not_signalled_is_signalled_after_a_restore(rng) -> None:
    driver = rng.driver().start(features=VERSION_1)
    ask(driver)
    driver.rings[0].notify()
    rng.host.vectors()
    state = copy.deepcopy(rng.device.state())
    state["virtio"]["queues"][0]["signalled_used"] = 0
    device = rng.build(state)
    device.resume()
    assert rng.host.vectors() == [1]


def test_state_comes_back_the_same(made) -> None:
    driver = made.driver().start(size=16)
    for ring in driver.rings:
        ring.notify()
    before = saved(made.device)
    assert saved(made.restored()) == before
    assert before == saved(made.device), "saving has side effects"


def change(state, path: str, value):
    """A copy of `state` with another value at `path` (dots and numbers)."""
    state = copy.deepcopy(state)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = state
    for part in way:
        target = target[part]
    target[last] = value
    return state


BAD_STATE = [
    ("virtio.device_status", 0x10),
    ("virtio.device_status", 0x04),
    ("virtio.device_status", 0x100),
    ("virtio.device_status", -1),
    ("virtio.driver_features", 1 << 63),
    ("virtio.driver_features", 0),
    ("virtio.isr", 4),
    ("virtio.config_vector", 500),
    ("virtio.queues", []),
    ("virtio.queues.0.size", 3),
    ("virtio.queues.0.size", 0),
    ("virtio.queues.0.size", 32768),
    ("virtio.queues.0.vector", 77),
    ("virtio.queues.0.desc_table", 8),
    ("virtio.queues.0.used_ring", 1 << 40),
    ("virtio.queues.0.avail_ring", (1 << 64) - 2),
    ("virtio.queues.0.next_avail", 9),
    ("virtio.queues.0.signalled_used", 1000),
    ("virtio.queues.0.extra", 1),
    ("virtio.msix.table", []),
    ("virtio.msix.pending", [999]),
    ("virtio.msix.pending", [1, 0]),
    ("virtio.msix.pending", "x"),
    ("device.extra", 1),
    ("extra", 1),
]


@pytest.mark.parametrize(("path", "value"), BAD_STATE)
def test_states_that_cannot_be_are_refused_by_name(made, path: str, value) -> None:
    made.driver().start()
    state = change(saved(made.device), path, value)
    with pytest.raises(Incompatible) as caught:
        made.build(state)
    *_, outer, last = ("", *path.split("."))
    assert (outer if last.isdigit() else last) in str(caught.value)


def test_any_access_returns(made) -> None:
    """Random accesses of every width, most of them near registers: nothing but the device may suffer."""
    random_ = random.Random(made.kind)
    driver = made.driver()
    places = [0, 0x2000, CONFIG, 0x6000, TABLE, PBA, 0x7FFF8, 0x47FF0, 0x487F8]
    for round_ in range(30_000):
        if round_ % 500 == 0:
            driver.start()
            made.host.vectors()
        offset = random_.choice(places) + random_.randrange(64)
        size = random_.choice((1, 2, 4, 8))
        if random_.random() < 0.3:
            made.device.read(offset, size)
        else:
            value = random_.choice((0, 1, 0xFFFF, random_.getrandbits(64), random_.randrange(256)))
            made.device.write(offset, size, value & (1 << 8 * size) - 1)
        if round_ % 100 == 0:
            made.restored(made.host)
            driver.again(made.device)


def test_random_rings(made) -> None:
    """Rings full of random descriptors."""
    random_ = random.Random(made.kind)
    driver = made.driver()
    for _ in range(300):
        driver._free = 0x10000
        driver.start(size=16)
        ring = random_.choice(driver.rings)
        for index in range(16):
            gpa = random_.choice((random_.randrange(1 << 23), random_.getrandbits(64), ring.desc, ring.used))
            length = random_.choice((0, 1, 16, 17, 512, 4096, random_.getrandbits(32)))
            ring.describe(index, gpa, length, random_.randrange(8), random_.randrange(18))
        for _ in range(random_.randrange(1, 17)):
            ring.offer(random_.randrange(17))
        if made.kind == "console":
            made.device.receive(b"x" * 100)
        ring.notify()
        made.device.resume()
        made.restored()
        driver.again(made.device)
