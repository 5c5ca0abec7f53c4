"""What each virtio device does with its buffers."""

from __future__ import annotations

import os
import struct
import threading
import time

import pytest

from freezeframe import _core
from freezeframe.errors import Incompatible, Refused
from freezeframe.store import SnapshotReader, write_snapshot
from freezeframe.testing.virtio_driver import (
    CONFIG,
    EVENT_IDX,
    INDIRECT,
    NEEDS_RESET,
    RAM,
    VERSION_1,
    Driver,
    Host,
    saved,
)

pytestmark = pytest.mark.unit

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
RO, CONFIG_WCE, MQ, DISCARD_BIT = 1 << 5, 1 << 11, 1 << 12, 1 << 13


class Disk:
    def __init__(self, path, *, readonly=False, size=1 << 20, **options) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(size))
        self.host = Host()
        self.readonly = readonly
        self.options = options
        self.device = self.build(None)
        self.driver = Driver(self.device, self.host)

    def build(self, state):
        fd = os.open(self.path, os.O_RDONLY if self.readonly else os.O_RDWR)
        try:
            return _core.VirtioBlk(
                "_disk0", *self.host.parts(), fd, readonly=self.readonly, state=state, **self.options
            )
        finally:
            os.close(fd)

    def start(self, **kw) -> Disk:
        self.driver.start(**kw)
        return self

    def request(self, kind, sector=0, *, data=b"", room=0, queue=0, split=0, indirect=False) -> tuple[int, bytes]:
        """(status, data read). `split`: buffers of at most so many bytes."""
        driver = self.driver
        driver._free = max(driver._free, 0x100000)
        at = driver.place(struct.pack("<IIQ", kind, 0, sector) + data)
        split = split or 1 << 30
        out = 16 + len(data)
        chain = [(at + n, min(split, out - n), False) for n in range(0, out, split)]
        back = driver.allocate(room + 1, 4096)
        chain += [(back + n, min(split, room - n), True) for n in range(0, room, split)]
        status = back + room
        self.host.memory.write(status, b"\xaa")
        ring = driver.rings[queue]
        head = ring.add([*chain, (status, 1, True)], indirect=indirect)
        ring.notify()
        if kind == FLUSH:
            self.device.pause()  # an engine would do the work that the flushing thread posts
        [(done, _)] = ring.completed()
        assert done == head
        return self.host.memory.read(status, 1)[0], self.host.memory.read(back, room)


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path / "disk").start()


def test_writes_and_reads_meet_in_the_file(disk) -> None:
    data = os.urandom(8192)
    assert disk.request(OUT, 3, data=data) == (OK, b"")
    assert disk.path.read_bytes()[3 * 512 :][:8192] == data
    assert disk.request(IN, 3, room=8192) == (OK, data)
    assert disk.request(FLUSH) == (OK, b"")
    counters = disk.device.counters()
    assert (counters["read_bytes"], counters["read_ops"]) == (8192, 1)
    assert (counters["write_bytes"], counters["write_ops"]) == (8192, 1)


@pytest.mark.parametrize("split", [1, 7, 100, 512, 5000])
@pytest.mark.parametrize("indirect", [False, True])
def test_buffers_may_be_cut_anywhere(tmp_path, split: int, indirect: bool) -> None:
    disk = Disk(tmp_path / "disk", queue_size=1024).start(features=VERSION_1 | INDIRECT | EVENT_IDX)
    data = os.urandom(512)
    assert disk.request(OUT, 9, data=data, split=split, indirect=indirect) == (OK, b"")
    assert disk.request(IN, 9, room=512, split=split, indirect=indirect) == (OK, data)


def test_the_end_of_the_disk_is_the_end(tmp_path) -> None:
    disk = Disk(tmp_path / "disk", size=10 * 512 + 100).start()
    assert disk.device.read(CONFIG, 8) == 10
    assert disk.request(IN, 9, room=512)[0] == OK
    for sector in (10, 9 + (1 << 55), (1 << 64) - 1):
        assert disk.request(IN, sector, room=512)[0] == IOERR
        assert disk.request(OUT, sector, data=bytes(512))[0] == IOERR
    assert disk.request(IN, 9, room=1024)[0] == IOERR
    assert disk.request(IN, 0, room=100)[0] == IOERR
    assert disk.path.stat().st_size == 10 * 512 + 100


def test_a_transfer_that_would_take_for_ever_is_refused(tmp_path) -> None:
    disk = Disk(tmp_path / "disk")
    with disk.path.open("r+b") as file:
        file.truncate(1 << 40)
    disk.device = disk.build(None)
    disk.driver = Driver(disk.device, disk.host)
    disk.start(size=64)
    ring, status = disk.driver.rings[0], disk.driver.allocate(1)
    head = disk.driver.place(struct.pack("<IIQ", IN, 0, 0))
    ring.add([(head, 16, False), *[(0x400000, 4 << 20, True)] * 61, (status, 1, True)])
    ring.notify()
    assert disk.host.memory.read(status, 1) == bytes([OK])
    ring.next_desc = 0
    ring.add([(head, 16, False), *[(0x400000, 4 << 20, True)] * 62, (status, 1, True)], indirect=True)
    ring.notify()
    assert disk.host.memory.read(status, 1) == bytes([OK])
    ring.add([(head, 16, False), *[(0x400000, 4 << 20, True)] * 65, (status, 1, True)], indirect=True)
    ring.notify()
    assert disk.host.memory.read(status, 1) == bytes([IOERR])


def test_read_only(tmp_path) -> None:
    disk = Disk(tmp_path / "disk", readonly=True)
    assert disk.driver.offered() & (RO | DISCARD_BIT) == RO
    disk.start()
    assert disk.request(OUT, 0, data=b"x" * 512)[0] == IOERR
    assert disk.request(DISCARD, data=struct.pack("<QII", 0, 1, 0))[0] == UNSUPP
    assert disk.request(FLUSH)[0] == OK
    assert disk.path.read_bytes() == bytes(1 << 20)


def test_names_and_unknown_requests(tmp_path) -> None:
    disk = Disk(tmp_path / "disk", serial="a-serial").start()
    assert disk.request(GET_ID, room=20) == (OK, b"a-serial" + bytes(12))
    assert disk.request(99)[0] == UNSUPP
    with pytest.raises(Refused):
        Disk(tmp_path / "disk", serial="x" * 21)


def test_discard_and_write_zeroes(disk) -> None:
    disk.request(OUT, 0, data=b"x" * 65536)
    blocks = disk.path.stat().st_blocks
    assert disk.request(DISCARD, data=struct.pack("<QIIQII", 0, 8, 0, 16, 8, 0))[0] == OK
    assert disk.request(IN, 0, room=4096) == (OK, bytes(4096))
    assert disk.path.stat().st_blocks < blocks
    for unmap in (0, 1):
        assert disk.request(WRITE_ZEROES, data=struct.pack("<QII", 32 + 8 * unmap, 8, unmap))[0] == OK
    assert disk.request(IN, 32, room=8192) == (OK, bytes(8192))
    assert disk.request(IN, 8, room=512) == (OK, b"x" * 512)
    assert disk.request(DISCARD, data=struct.pack("<QII", 0, 8, 1))[0] == UNSUPP
    assert disk.request(DISCARD, data=struct.pack("<QII", 2040, 9, 0))[0] == IOERR
    assert disk.request(DISCARD, data=b"short")[0] == IOERR
    assert disk.request(WRITE_ZEROES, data=struct.pack("<QII", 0, 1 << 31, 0))[0] == IOERR


def test_without_discard_the_requests_are_unknown(tmp_path) -> None:
    disk = Disk(tmp_path / "disk", sparse=False)
    assert not disk.driver.offered() & DISCARD_BIT
    disk.start()
    assert disk.request(DISCARD, data=struct.pack("<QII", 0, 8, 0))[0] == UNSUPP


def flush(disk: Disk) -> int:
    """Starts a flush; gives where its status goes."""
    head, status = disk.driver.place(struct.pack("<IIQ", FLUSH, 0, 0)), disk.driver.place(b"\xaa")
    disk.driver.rings[0].add([(head, 16, False), (status, 1, True)])
    disk.driver.rings[0].notify()
    return status


def test_flushes_end_by_themselves_while_an_engine_runs(disk) -> None:
    host = disk.host
    bus, clock = _core.Bus(host.control), _core.Clock(2_000_000, 0)
    engine = _core.Engine(
        "software", host.memory, bus, clock, host.control, host.ioapic, host.msi, vcpus=1, phys_bits=46
    )
    state = engine.state(0)
    state["sregs"]["cs"]["base"], state["regs"]["rip"] = 0, 0x1000
    engine.set_state(0, state)
    host.memory.write(0x1000, b"\xf4")  # hlt, with interrupts off: an engine with nothing to do
    places = [flush(disk) for _ in range(3)]
    thread = threading.Thread(target=engine.run)
    thread.start()
    ring = disk.driver.rings[0]
    deadline = time.monotonic() + 60
    while ring.u16(ring.used + 2) < 3:
        assert time.monotonic() < deadline
        thread.join(0.001)
    host.control.request_stop("paused")
    thread.join()
    assert [host.memory.read(status, 1)[0] for status in places] == [OK] * 3


def test_a_flush_in_flight_is_in_no_state(tmp_path) -> None:
    disk = Disk(tmp_path / "disk").start(features=VERSION_1)
    for _ in range(20):
        status = flush(disk)
        queue = saved(disk.device)["virtio"]["queues"][0]
        assert queue["next_avail"] == queue["next_used"] == queue["signalled_used"]
        assert disk.host.memory.read(status, 1)[0] == OK
        assert len(disk.driver.rings[0].completed()) == 1
        assert disk.host.vectors() == [1]


def test_a_reset_forgets_flushes(disk) -> None:
    for _ in range(20):
        status = flush(disk)
        disk.device.write(0x14, 1, 0)
        disk.device.pause()
        disk.driver._free = 0x10000
        disk.driver.start()
        assert disk.driver.rings[0].completed() == []
        assert disk.request(IN, 0, room=512)[0] == OK
        assert disk.request(FLUSH)[0] == OK
        del status


def test_a_request_without_room_for_a_status_breaks_the_device(disk) -> None:
    at = disk.driver.place(struct.pack("<IIQ", IN, 0, 0))
    disk.driver.rings[0].add([(at, 16, False)])
    disk.driver.rings[0].notify()
    assert disk.driver.status() & NEEDS_RESET


def test_queues_of_their_own(tmp_path) -> None:
    disk = Disk(tmp_path / "disk", queues=4)
    assert disk.driver.offered() & MQ
    disk.start()
    assert disk.device.read(CONFIG + 34, 2) == 4
    for queue in range(4):
        disk.host.vectors()
        assert disk.request(OUT, queue, data=bytes([queue + 1]) * 512, queue=queue)[0] == OK
        assert disk.host.vectors() == [queue + 1]
    assert disk.path.read_bytes()[: 4 * 512 : 512] == b"\1\2\3\4"


def test_the_cache_mode_is_state(disk) -> None:
    assert disk.driver.offered() & CONFIG_WCE
    assert disk.device.read(CONFIG + 32, 1) == 1
    disk.device.write(CONFIG + 32, 1, 0)
    device = disk.build(saved(disk.device))
    assert device.read(CONFIG + 32, 1) == 0
    assert disk.request(OUT, 0, data=bytes(512))[0] == OK
    disk.driver.start()
    assert disk.device.read(CONFIG + 32, 1) == 1


def test_a_disk_of_another_size_is_refused(disk) -> None:
    state = saved(disk.device)
    with disk.path.open("r+b") as file:
        file.truncate(2 << 20)
    with pytest.raises(Incompatible, match=r"device\.sectors: the disk had 2048 .* 4096 now"):
        disk.build(state)


def test_a_feature_that_went_away_is_refused(disk) -> None:
    state = saved(disk.device)
    disk.options["sparse"] = False
    with pytest.raises(Incompatible, match="driver_features"):
        disk.build(state)


def test_the_file_shows_the_first_write_after_the_barrier(disk) -> None:
    for _ in range(20):
        disk.request(OUT, 0, data=bytes(512))
        before = disk.path.stat()
        disk.device.arm_write_barrier()
        disk.request(IN, 0, room=512)
        assert disk.path.stat().st_mtime_ns == before.st_mtime_ns
        disk.request(OUT, 0, data=bytes(512))
        assert disk.path.stat().st_mtime_ns > before.st_mtime_ns
    disk.device.sync()


class Line:
    """A console with pipes at its host's end."""

    def __init__(self, **options) -> None:
        self.reader, writer = os.pipe()
        self.source, self.keys = os.pipe()
        self.host = Host()
        self.output = _core.ConsoleOutput(writer, capture=1 << 16)
        os.close(writer)
        self.device = _core.VirtioConsole("__console", *self.host.parts(), self.output, **options)
        self.driver = Driver(self.device, self.host).start()
        self.device.resume()

    def send(self, data: bytes) -> None:
        self.driver.rings[1].add([(self.driver.place(data), len(data), False)])
        self.driver.rings[1].notify()
        self.driver.rings[1].completed()

    def buffers(self, count: int, size: int = 64) -> None:
        for _ in range(count):
            self.driver.rings[0].add([(self.driver.allocate(size), size, True)])
        self.driver.rings[0].notify()

    def received(self) -> bytes:
        ring = self.driver.rings[0]
        parts = []
        for head, length in ring.completed():
            gpa = struct.unpack("<Q", self.host.memory.read(ring.desc + 16 * head, 8))[0]
            parts.append(self.host.memory.read(gpa, length))
        return b"".join(parts)


def test_console_output_is_out_at_once() -> None:
    line = Line()
    line.send(b"hello ")
    line.send(b"world")
    assert os.read(line.reader, 100) == b"hello world"
    assert line.output.read(0, 0) == (11, b"hello world")
    line.send(b"x" * 10_000)
    assert len(os.read(line.reader, 20_000)) == 10_000


def test_console_input_waits_for_buffers_and_survives_a_save() -> None:
    line = Line()
    assert line.device.receive(b"typed ahead") == 11
    line.device.resume()
    assert saved(line.device)["device"]["in_buffer"] == b"typed ahead".hex()
    device = _core.VirtioConsole("__console", *line.host.parts(), line.output, state=saved(line.device))
    line.driver.again(device)
    line.buffers(1, size=6)
    assert line.received() == b"typed "
    line.buffers(4)
    assert line.received() == b"ahead"
    assert saved(device)["device"]["in_buffer"] == ""


def test_console_output_that_nobody_took_moves_with_the_machine() -> None:
    line = Line()
    line.send(b"before ")
    line.device.pause()
    assert os.read(line.reader, 100) == b"before "
    line.send(b"in between ")  # cannot happen in a machine; a full pipe looks the same
    state = saved(line.device)
    assert bytes.fromhex(state["device"]["out_buffer"]) == b"in between "
    reader, writer = os.pipe()
    output = _core.ConsoleOutput(writer)
    device = _core.VirtioConsole("__console", *line.host.parts(), output, state=state)
    device.resume()
    assert os.read(reader, 100) == b"in between "


def test_console_chains_have_a_bound() -> None:
    line = Line()
    ring = line.driver.rings[1]
    ring.add([(0, 4 << 20, False)])
    ring.notify()
    assert line.driver.status() & NEEDS_RESET
    assert "transmit" in str(line.device.fault())


def test_console_size() -> None:
    line = Line(size=(80, 25))
    assert line.driver.offered() & 1
    assert line.device.read(CONFIG, 4) == 80 | 25 << 16
    generation = line.device.read(0x15, 1)
    line.device.resize(100, 40)
    assert line.device.read(CONFIG, 4) == 100 | 40 << 16
    assert line.device.read(0x15, 1) == generation + 1
    assert line.host.vectors() == [0]
    line.device.resize(100, 40)
    assert line.host.vectors() == []
    plain = Line()
    assert not plain.driver.offered() & 1
    plain.device.resize(100, 40)
    assert plain.device.read(CONFIG, 4) == 0


def test_a_stuck_reader_never_blocks_the_guest() -> None:
    line = Line()
    payload = os.urandom(1 << 20)
    sent = threading.Event()

    def write() -> None:
        for n in range(0, len(payload), 4096):
            line.driver._free = 0x100000
            line.send(payload[n : n + 4096])
        sent.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert sent.wait(60)
    thread.join()
    got = b""
    while len(got) < len(payload):
        got += os.read(line.reader, 1 << 20)
    assert got == payload


def test_randomness(tmp_path) -> None:
    host = Host()
    fd = os.open("/dev/urandom", os.O_RDONLY)
    device = _core.VirtioRng("__rng", *host.parts(), fd)
    os.close(fd)
    driver = Driver(device, host).start()
    at = driver.allocate(1 << 20)
    driver.rings[0].add([(at, 32, True), (at + 100, 32, True)])
    driver.rings[0].add([(at + 4096, 1 << 19, True)])
    driver.rings[0].notify()
    assert [length for _, length in driver.rings[0].completed()] == [64, 65536]
    assert len({host.memory.read(at, 32), host.memory.read(at + 100, 32), bytes(32)}) == 3
    assert host.memory.read(at + 32, 68) == bytes(68)


def test_a_dry_source_of_randomness_is_told(tmp_path) -> None:
    source = tmp_path / "few"
    source.write_bytes(b"12345678")
    host = Host()
    fd = os.open(source, os.O_RDONLY)
    device = _core.VirtioRng("__rng", *host.parts(), fd)
    driver = Driver(device, host).start()
    driver.rings[0].add([(driver.allocate(64), 64, True)])
    driver.rings[0].notify()
    assert driver.status() & NEEDS_RESET
    assert "randomness" in str(device.fault())


@pytest.mark.parametrize("what", ["ring", "buffer"])
def test_damaged_snapshot_memory_stops_the_machine_before_a_device_uses_it(tmp_path, what: str) -> None:
    disk = Disk(tmp_path / "disk").start()
    ring = disk.driver.rings[0]
    data = 0x300000
    disk.host.memory.write(data, b"precious" * 64)
    head = disk.driver.place(struct.pack("<IIQ", OUT, 0, 0))
    ring.add([(head, 16, False), (data, 512, False), (disk.driver.allocate(1), 1, True)])
    directory = tmp_path / "snapshot"
    directory.mkdir()
    write_snapshot(directory, config={"memory": {"size": RAM}}, state={}, memory=disk.host.memory, engine="software")
    with (directory / "memory-region-0").open("r+b") as file:
        file.seek(ring.avail if what == "ring" else data)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    state = saved(disk.device)
    with SnapshotReader.open(directory) as reader:
        disk.host = Host(reader.open_memory("ondemand"))
    device = disk.build(state)
    host = disk.host
    bus, clock = _core.Bus(host.control), _core.Clock(2_000_000, 0)
    engine = _core.Engine(
        "software", host.memory, bus, clock, host.control, host.ioapic, host.msi, vcpus=1, phys_bits=46
    )
    device.resume()
    kind, code, message = engine.run()
    assert (kind, code) == ("failed", "damaged")
    assert "memory-region-0" in str(message)
    assert disk.path.read_bytes() == bytes(1 << 20)
