from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest

from freezeframe import _core
from freezeframe.config import (
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    VmConfig,
)
from freezeframe.errors import FreezeframeError, Incompatible, InvalidState, IoFailed, NotFound, NotSupported, Refused
from freezeframe.machine import build, build_for_boot, build_from_snapshot, engine
from freezeframe.machine.parts import component_ids

MIB = 1 << 20
SEGMENT = dict.fromkeys(
    ("base", "limit", "selector", "type_", "present", "dpl", "db", "s", "l", "g", "avl", "unusable"), 0
)
RESET = {
    "regs": dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rip", "rflags"), 0),
    "sregs": {"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0, "cs": SEGMENT},
    "mp_state": "runnable",
}


class FakeEngine:
    """Stands for the vCPUs: runs until somebody says why to stop."""

    def __init__(self, vcpus):
        self.states = [dict(RESET, number=n) for n in range(vcpus)]
        self.stop = threading.Semaphore(0)
        self.why = ("paused", None, None)

    def state(self, number):
        return self.states[number]

    def set_state(self, number, state):
        self.states[number] = state

    def run(self):
        assert self.stop.acquire(timeout=20)
        return self.why

    def end(self, *why):
        self.why = (*why, None, None)[:3]
        self.stop.release()


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(build, "_make_engine", lambda parts, report: FakeEngine(parts.config.cpus.boot_vcpus))


def kernel(path):
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100000)
    out = struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    out += struct.pack("<IIQQQQQQ", 1, 5, 176, 0, 0x100000, 16, 4096, 4096)
    out += struct.pack("<IIQQQQQQ", 4, 4, 192, 0, 0, len(note), len(note), 4)
    path.write_bytes(out + b"\xf4" * 16 + note)
    return str(path)


@pytest.fixture
def config(tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    return VmConfig(
        cpus=CpusConfig(boot_vcpus=2, max_vcpus=2),
        memory=MemoryConfig(size=64 * MIB),
        payload=PayloadConfig(kernel=kernel(tmp_path / "kernel"), cmdline="hello"),
        disks=(DiskConfig(path=str(disk)),),
        serial=SerialConfig(mode="File", file=str(tmp_path / "serial")),
        console=ConsoleConfig(mode="Null"),
    )


def restore(config, state, **options):
    memory = _core.Memory([(0, 64 * MIB)])
    return build_from_snapshot(config, json.loads(json.dumps(state)), memory, **options)


def test_boots_paused_and_saves_everything(config):
    with build_for_boot(config) as machine:
        assert machine.state == "created"
        assert machine.engine.name == "software"
        state = machine.save()
        assert set(state["devices"]) == set(component_ids(config.with_device_ids()))
        assert [vcpu["number"] for vcpu in state["vcpus"]] == [0, 1]
        assert state["vcpus"][0]["regs"]["rip"] == 0x100000
        assert set(state["disks"]) == {"_disk0"}
        assert machine.save()["devices"] == state["devices"]  # saving changes nothing


def test_devices_sit_where_cloud_hypervisor_puts_them(config):
    with build_for_boot(config) as machine:
        tree = machine.device_tree()
    assert {name: node.get("pci_bdf") for name, node in tree.items()} == {
        "__ioapic": None,
        "__serial": None,
        "__console": None,
        "_virtio-pci-__console": "0000:00:01.0",
        "_disk0": None,
        "_virtio-pci-_disk0": "0000:00:02.0",
        "__rng": None,
        "_virtio-pci-__rng": "0000:00:03.0",
    }
    bars = {name: node["resources"][0]["PciBar"] for name, node in tree.items() if node["resources"]}
    assert [(b["base"], b["type_"]) for b in bars.values()] == [
        (70368735789056, "Mmio64"),
        (0xE7F8_0000, "Mmio32"),
        (70368727400448, "Mmio64"),
    ]
    assert tree["__rng"] == {"id": "__rng", "resources": [], "parent": "_virtio-pci-__rng", "children": []}


def test_pause_and_resume_and_what_is_not_allowed(config):
    with build_for_boot(config) as machine:
        for wrong in (machine.pause, machine.power_button):
            with pytest.raises(InvalidState):
                wrong()
        machine.resume()
        with pytest.raises(InvalidState):
            machine.resume()
        with pytest.raises(InvalidState):
            machine.save()
        machine.power_button()
        machine._parts.engine.end("paused")
        machine.pause()
        assert machine.state == "paused"
        assert machine.save()["devices"]["__ged"] == {"pending": 8}
        machine.resume()
        machine._parts.engine.end("paused")
    assert machine.state == "shutdown"
    machine.close()


@pytest.mark.parametrize("kind", ["poweroff", "reset", "failed"])
def test_a_machine_that_stops_by_itself_says_so_once(config, kind):
    seen = []
    told = threading.Event()
    with build_for_boot(config) as machine:

        def on_stop(reason):
            seen.append(reason)
            machine.close()  # even from there
            told.set()

        machine.on_stop = on_stop
        machine.resume()
        machine._parts.engine.end(kind, "damaged", "chunk 7")
        assert told.wait(20)
        assert [reason.kind for reason in seen] == [kind]
        assert str(seen[0].error) == ("chunk 7" if kind == "failed" else "None")
        with pytest.raises(InvalidState):
            machine.pause()


def test_restored_machine_is_the_saved_one(config):
    with build_for_boot(config) as machine:
        machine._parts.bus.write("pio", 0xCF8, 4, 0x8000_1010)
        machine._parts.bus.write("pio", 0xCFC, 4, 0xD000_0000)
        machine._parts.bus.write("pio", 0x70, 1, 0x8D)
        machine._parts.bus.write("pio", 0x80, 1, 0x5A)
        state = machine.save()
    with restore(config, state) as again:
        assert again.state == "paused"
        assert again.save()["devices"] == json.loads(json.dumps(state["devices"]))
        assert again.save()["vcpus"] == json.loads(json.dumps(state["vcpus"]))
        assert again.device_tree()["_virtio-pci-_disk0"]["resources"][0]["PciBar"]["base"] == 0xD000_0000
        assert again._parts.bus.read("pio", 0x80, 1) == 0x5A


def test_clock_freeze_goes_on_where_it_was(config):
    with build_for_boot(config) as machine:
        state = machine.save()
    with restore(config, state, clock="Freeze") as again:
        assert again.save()["clock"] == state["clock"]
    # One that advances starts there too, and makes up for the time once it runs.
    state["clock"]["host_wall_ns"] -= 10**12
    with restore(config, state, clock="Advance") as again:
        assert again.save()["clock"] == state["clock"]
        clock = again._parts.clock
        clock.resume()
        assert clock.state()["host_wall_ns"] < time.time_ns() - 9 * 10**11


def test_a_disk_that_changed_is_refused_with_both_ways_out(config, tmp_path):
    disk = config.disks[0].path
    with build_for_boot(config) as machine:
        state = machine.save()
    with restore(config, state):
        pass
    os.utime(disk, ns=(1, 1))
    with pytest.raises(Incompatible, match="written since") as error:
        restore(config, state)
    assert "disks=[_disk0@" in error.value.hint
    assert "disk_check=off" in error.value.hint
    with restore(config, state, disk_check=False):
        pass
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(MIB))
    with restore(config, state, disks={"_disk0": str(copy)}) as again:
        assert again.config.disks[0].path == str(copy)
    copy.write_bytes(bytes(MIB + 512))
    with pytest.raises(Incompatible, match=str(MIB + 512)):
        restore(config, state, disks={"_disk0": str(copy)})
    with pytest.raises(Refused, match="no disk '_disk7'"):
        restore(config, state, disks={"_disk7": str(copy)})
    os.rename(disk, disk + ".old")
    Path(disk).write_bytes(bytes(MIB))
    with pytest.raises(Incompatible, match="another file"):
        restore(config, state)


def damaged(state, *path, value=None, drop=False):
    made = json.loads(json.dumps(state))
    at = made
    for step in path[:-1]:
        at = at[step]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("devices", "__rng"), None),
        (("devices", "__rng", "virtio", "queues"), []),
        (("devices", "_virtio-pci-__rng", "bar0"), 7),
        (("devices", "__ioapic", "lines"), 1 << 30),
        (("devices", "__serial"), {}),
        (("devices", "__new"), {}),
        (("devices",), []),
        (("vcpus",), []),
        (("vcpus",), {}),
        (("clock",), {}),
        (("clock", "tsc_khz"), -1),
        (("disks",), {}),
        (("disks", "_disk0"), {"size": "x"}),
        (("more",), 1),
    ],
)
def test_state_that_contradicts_the_configuration_is_refused(config, path, value):
    with build_for_boot(config) as machine:
        state = machine.save()
    with pytest.raises(FreezeframeError):
        restore(config, damaged(state, *path, value=value))
    with restore(config, state):  # nothing was left open or locked
        pass


def test_every_missing_component_is_refused(config):
    with build_for_boot(config) as machine:
        state = machine.save()
    for name in state["devices"]:
        with pytest.raises(Incompatible, match="missing"):
            restore(config, damaged(state, "devices", name, drop=True))


def test_another_memory_is_refused(config):
    with build_for_boot(config) as machine:
        state = machine.save()
    with pytest.raises(Incompatible, match="memory"):
        build_from_snapshot(config, state, _core.Memory([(0, 32 * MIB)]))


def test_failed_boot_leaves_nothing_open(config, tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(NotFound):
        build_for_boot(config.replace(payload=PayloadConfig(kernel=str(tmp_path / "none"))))
    with pytest.raises(NotFound):
        build_for_boot(config.replace(disks=(*config.disks, DiskConfig(path=str(tmp_path / "none")))))
    with pytest.raises(Refused):
        build_for_boot(config.replace(payload=None))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_reset_keeps_disks_and_console_files(config, tmp_path):
    first = build_for_boot(config)
    serial = tmp_path / "serial"
    first.resume()
    first._parts.bus.write("pio", 0x3F8, 1, ord("a"))
    first._parts.engine.end("paused")
    first.pause()
    backends = first.release()
    with build_for_boot(config, backends=backends) as second:
        second.resume()
        second._parts.bus.write("pio", 0x3F8, 1, ord("b"))
        second._parts.engine.end("paused")
        second.pause()
        assert serial.read_bytes() == b"ab"


def found(monkeypatch, *, runs, fit):
    """A /dev/kvm of which a trial says this."""
    monkeypatch.delenv(engine.VARIABLE, raising=False)
    monkeypatch.setattr(engine, "KVM_DEVICE", os.devnull)
    for how in ("_tried", "_known_or_tried"):
        monkeypatch.setattr(engine, how, lambda: engine.Trial(runs=runs, fit=fit, found="it hums"))


@pytest.mark.parametrize("fit", [False, True])
def test_auto_takes_kvm_where_the_trial_says_so(monkeypatch, fit):
    found(monkeypatch, runs=True, fit=fit)
    for asked in (None, "auto"):
        report = engine.choose(asked)
        assert (report.name, report.ours, report.warning) == ("kvm" if fit else "software", True, None)
        assert report.reason == f"{os.devnull} was tried: it hums"


@pytest.mark.parametrize("runs", [False, True])
def test_who_asks_for_kvm_gets_it_and_a_warning(monkeypatch, runs):
    found(monkeypatch, runs=runs, fit=False)
    report = engine.choose("kvm")
    assert (report.name, report.ours) == ("kvm", False)
    assert (report.warning is None) == runs
    assert runs or report.warning == "Linux is not expected to boot on the kvm engine of this host: it hums"


def test_a_machine_that_kvm_cannot_take_gets_the_software_engine_unless_kvm_was_asked_for(monkeypatch):
    found(monkeypatch, runs=True, fit=True)
    refused = []

    def check(clock, memory, *, vcpus, phys_bits, states):
        refused.append((vcpus, phys_bits, states))
        raise NotSupported("the guest's TSC runs at another rate")

    monkeypatch.setattr(_core, "kvm_check", check)
    cpus = CpusConfig(boot_vcpus=1, max_vcpus=1)
    report = engine.settle(engine.choose("auto"), None, None, cpus, [{}])
    assert report.name == "software"
    assert "it hums; but not for this machine: the guest's TSC runs at another rate" in report.reason
    with pytest.raises(NotSupported, match="another rate"):
        engine.settle(engine.choose("kvm"), None, None, cpus, [{}])
    assert refused == [(cpus.boot_vcpus, cpus.max_phys_bits, [{}])] * 2
    assert "8259" in engine.settle(engine.choose("auto"), None, None, cpus, needs_software="8259").reason
    assert len(refused) == 2
    software = engine.choose("software")
    assert engine.settle(software, None, None, cpus) is software


def test_engine_choice(monkeypatch):
    monkeypatch.delenv(engine.VARIABLE, raising=False)
    assert "/dev/kvm" in engine.choose("auto").reason
    assert "option" in engine.choose("software").reason
    monkeypatch.setattr(engine, "KVM_DEVICE", "/dev/no-such-device")
    with pytest.raises(NotSupported, match="there is no /dev/no-such-device"):
        engine.choose("kvm")
    with pytest.raises(Refused, match="no engine 'fast'"):
        engine.choose("fast")
    monkeypatch.setenv(engine.VARIABLE, "kvm")
    with pytest.raises(NotSupported):
        engine.choose(None)
    assert engine.choose("software").name == "software"


def test_the_tier_is_translator_unless_the_variable_or_the_caller_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FREEZEFRAME_TIER", raising=False)
    assert engine.choose("software").tier == "translator"
    monkeypatch.setenv("FREEZEFRAME_TIER", "interpreter")
    assert engine.choose("software").tier == "interpreter"
    assert engine.choose("software", "translator").tier == "translator"
    monkeypatch.setenv("FREEZEFRAME_TIER", "fast")
    with pytest.raises(Refused, match="FREEZEFRAME_TIER"):
        engine.choose("software")


class Block:
    """A disk's device whose medium fails as it is told."""

    def __init__(self):
        self.failing = False

    def sync(self):
        if self.failing:
            raise OSError(5, "Input/output error")

    def arm_write_barrier(self):
        pass


def test_a_machine_whose_disk_is_not_synced_is_paused_but_cannot_be_saved(config):
    with build_for_boot(config) as machine:
        block = Block()
        machine.backends.use_blocks({"_disk0": block})
        block.failing = True
        with pytest.raises(IoFailed, match="_disk0"):
            machine.save()  # also one that never ran: others may have written to the file
        machine.resume()
        machine._parts.engine.end("paused")
        with pytest.raises(IoFailed, match="cannot be synced"):
            machine.pause()
        assert machine.state == "paused"
        with pytest.raises(IoFailed, match="cannot be synced"):
            machine.save()
        block.failing = False
        assert "_disk0" in machine.save()["disks"]


def test_a_machine_without_a_thread_stays_as_it_was(config, monkeypatch):
    with build_for_boot(config) as machine:
        started = []

        def refuse(thread):
            started.append(thread.name)
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(IoFailed, match="thread"):
                machine.resume()
        assert started == ["vcpus"]
        assert machine.state == "created"
        machine.resume()
        machine._parts.engine.end("paused")
        machine.pause()
        assert machine.state == "paused"


def test_no_device_has_stopped_in_a_new_machine(config):
    with build_for_boot(config) as machine:
        assert machine.faults() == {}
