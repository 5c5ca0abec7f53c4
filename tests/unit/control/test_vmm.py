"""The VMM's states, what the guest does by itself, and that failures leave nothing behind."""

from __future__ import annotations

import json
import os
import threading

import pytest

from freezeframe.config import ResizeData, RestoreConfig, SnapshotConfig, VmConfig
from freezeframe.control.events import EventMonitor
from freezeframe.control.failures import ActionFailed
from freezeframe.control.log import INFO, Log
from freezeframe.control.vmm import Vmm
from freezeframe.errors import Damaged, EngineError, Incompatible, Refused, chain_messages
from freezeframe.testing.machines import FakeBackend

pytestmark = pytest.mark.unit

CONFIG = VmConfig.from_json(b'{"payload":{"kernel":"k"},"disks":[{"path":"d"}]}')
DEADLINE = 20.0


class Running:
    """A VMM whose `run` goes in a thread of its own."""

    def __init__(self, **options) -> None:
        self.backend = FakeBackend()
        self.reports: list[str] = []
        self.vmm = Vmm(self.backend, report=self.reports.append, **options)
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.status = self.vmm.run()

    def ended(self) -> int | None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        return self.status

    def settled(self) -> None:
        """Everything that was noticed before now has been acted on."""
        done = threading.Event()
        self.vmm._notices.put(done.set)
        assert done.wait(DEADLINE)


@pytest.fixture
def running():
    running = Running()
    yield running
    running.vmm.request_exit()
    running.ended()


def booted(running: Running) -> None:
    running.vmm.create(CONFIG)
    running.vmm.boot()


def failure(action, *arguments) -> ActionFailed:
    with pytest.raises(ActionFailed) as caught:
        action(*arguments)
    return caught.value


def test_power_off_ends_the_vmm_with_0():
    running = Running()
    booted(running)
    running.backend.machine.stop("poweroff")
    assert running.ended() == 0
    assert running.backend.machine.closed
    assert running.vmm.config is None


def test_the_guests_own_status_is_the_vmms():
    running = Running()
    booted(running)
    running.backend.machine.stop("poweroff", status=77)
    assert running.ended() == 77


def test_a_reset_ends_a_vmm_that_does_not_reboot():
    running = Running(no_reboot=True)
    booted(running)
    running.backend.machine.stop("reset")
    assert running.ended() == 0
    assert running.backend.machine.closed
    assert len(running.reports) == 1


def test_power_off_with_no_shutdown_keeps_the_vmm_and_the_configuration():
    running = Running(no_shutdown=True)
    booted(running)
    running.backend.machine.stop("poweroff")
    running.settled()
    assert running.vmm.state == "Created"
    running.vmm.boot()
    assert running.vmm.state == "Running"
    running.vmm.request_exit()
    assert running.ended() == 0


def test_a_reset_boots_again_in_place(running):
    booted(running)
    first = running.backend.machine
    first.stop("reset")
    running.settled()
    assert first.closed
    assert running.backend.machine is not first
    assert running.vmm.state == "Running"


def test_a_reset_that_cannot_boot_ends_the_vmm_with_1():
    running = Running()
    booted(running)
    running.backend.fail = Refused("the kernel is gone")
    running.backend.machine.stop("reset")
    assert running.ended() == 1
    assert "the kernel is gone" in running.reports[0]


def test_an_engine_that_cannot_go_on_ends_the_vmm_with_1():
    running = Running()
    booted(running)
    running.backend.machine.stop("failed", Damaged("memory-region-0: chunk 17 is damaged"))
    assert running.ended() == 1
    assert "memory-region-0: chunk 17 is damaged" in running.reports[0]
    assert running.backend.machine.closed


def test_the_end_of_a_machine_that_is_gone_is_nobodys_business(running):
    booted(running)
    old = running.backend.machine
    notify = old.on_stop
    running.vmm.delete()
    booted(running)
    notify(type("Stop", (), {"kind": "poweroff", "error": None, "status": None})())
    running.settled()
    assert running.vmm.state == "Running"


def test_ids_are_given_at_boot(running):
    running.vmm.create(CONFIG)
    assert running.vmm.info()["config"]["disks"][0].get("id") is None
    running.vmm.boot()
    assert running.vmm.info()["config"]["disks"][0]["id"] == "_disk0"


def test_a_boot_that_fails_leaves_the_configuration(running):
    running.vmm.create(CONFIG)
    running.backend.fail = Incompatible("no such CPU")
    assert failure(running.vmm.boot).texts == ["The VM could not boot", "no such CPU"]
    assert running.vmm.state == "Created"
    running.backend.fail = None
    running.vmm.boot()
    assert running.vmm.state == "Running"


def test_a_boot_whose_resume_fails_closes_the_machine(running):
    running.vmm.create(CONFIG)
    running.backend.fail_next_resume = EngineError("broken")
    assert failure(running.vmm.boot).texts == ["The VM could not boot", "broken"]
    assert running.backend.machine.closed
    assert running.vmm.state == "Created"


def test_a_pause_that_fails(running):
    booted(running)
    running.backend.machine.fail = EngineError("disk _disk0 cannot be synced")
    assert failure(running.vmm.pause).texts == [
        "The VM could not be paused",
        "Cannot pause VM",
        "Failed to pause migratable component",
        "disk _disk0 cannot be synced",
    ]


def test_errors_with_chs_chain_of_their_own_get_no_second_one(running, tmp_path):
    running.backend.fail = Damaged("chunk 3").chained("Memory manager error")
    (tmp_path / "vm.json").write_text(CONFIG.to_json())
    failed = failure(running.vmm.restore, RestoreConfig(source_url=f"file://{tmp_path}"))
    assert failed.texts == ["The VM could not be restored", "Memory manager error", "chunk 3"]
    assert running.vmm.config is None


def test_restore_with_a_resume_that_fails_leaves_nothing(running, tmp_path):
    (tmp_path / "vm.json").write_text(CONFIG.to_json())
    running.backend.fail_next_resume = EngineError("broken")
    failed = failure(running.vmm.restore, RestoreConfig(source_url=f"file://{tmp_path}", resume=True))
    assert failed.texts[0] == "The VM could not be restored"
    assert failed.texts[-1] == "broken"
    assert running.backend.machine.closed
    assert running.vmm.config is None


def test_restore_reports_what_it_did(running, tmp_path):
    (tmp_path / "vm.json").write_text(CONFIG.to_json())
    running.vmm.restore(RestoreConfig(source_url=f"file://{tmp_path}", clock="Freeze"))
    info = running.vmm.info()
    assert info["state"] == "Paused"
    assert info["restored"] == {
        "source_url": f"file://{tmp_path}",
        "memory_restore_mode": "OnDemand",
        "clock": "Freeze",
    }


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"prefault": True, "memory_restore_mode": "OnDemand"}, "cannot be combined"),
        ({"disks": [{"id": "a", "path": "x"}, {"id": "a", "path": "y"}]}, "Identifier a is not unique"),
        ({"net_fds": [{"id": "a"}]}, "'net_fds' is not supported"),
    ],
)
def test_refused_restores(running, tmp_path, request_, text):
    request_ = RestoreConfig.from_plain({"source_url": f"file://{tmp_path}", **request_})
    failed = failure(running.vmm.restore, request_)
    assert failed.texts[:2] == ["The VM could not be restored", "Failed to validate config"]
    assert text in failed.texts[2]


def test_what_we_lack_is_refused_when_it_is_created(running):
    failed = failure(running.vmm.create, CONFIG.replace(watchdog=True))
    assert failed.status == 400
    assert failed.texts[-1].startswith("'watchdog' is not supported")
    assert running.vmm.config is None


def test_resize_before_boot_only(running):
    running.vmm.create(CONFIG)
    running.vmm.resize(ResizeData(desired_vcpus=3, desired_ram=1 << 20))
    info = running.vmm.info()
    assert (info["config"]["cpus"]["boot_vcpus"], info["memory_actual_size"]) == (3, 1 << 20)
    running.vmm.boot()
    assert failure(running.vmm.resize, ResizeData(desired_vcpus=4)).status == 501


def test_events(tmp_path):
    path = tmp_path / "events"
    running = Running(events=EventMonitor.from_option(f"path={path}"))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    vmm = running.vmm
    booted(running)
    vmm.pause()
    vmm.snapshot(SnapshotConfig(destination_url=f"file://{snapshot}"))
    vmm.resume()
    vmm.reboot()
    vmm.delete()
    vmm.restore(RestoreConfig(source_url=f"file://{snapshot}", resume=True))
    vmm.vmm_shutdown()
    assert running.ended() == 0
    text = path.read_text()
    assert text.endswith("}\n\n")
    events = [json.loads(part) for part in text.strip().split("\n\n")]
    assert list(events[0]) == ["timestamp", "source", "event", "properties"]
    assert list(events[0]["timestamp"]) == ["secs", "nanos"]
    assert [event["event"] for event in events] == (
        [
            "starting",
            "booting",
            "booted",
            "pausing",
            "paused",
            "snapshotting",
            "snapshotted",
            "resuming",
            "resumed",
            "rebooting",
            "rebooted",
            "shutdown",
            "deleted",
            "restoring",
            "restored",
            "resuming",
            "resumed",
            "shutdown",
            "deleted",
            "shutdown",
        ]
    )
    assert [event["source"] for event in events] == ["vmm", *["vm"] * (len(events) - 2), "vmm"]


def test_an_event_reader_that_is_full_or_gone_stops_nobody():
    reading, writing = os.pipe()
    events = EventMonitor.from_option(f"fd={writing}")
    for _ in range(2000):
        events.emit("vm", "paused")
    os.close(reading)
    events.emit("vm", "paused")
    os.close(writing)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["Error parsing --event-monitor: path or fd required"]),
        ("bogus=1", ["Error parsing --event-monitor", "unknown option: bogus"]),
        ("path=/nonexistent/x", ["Error doing event monitor I/O", "No such file or directory (os error 2)"]),
        ("fd=987", ["Error doing event monitor I/O", "Bad file descriptor (os error 9)"]),
    ],
)
def test_event_monitor_options(text, expected):
    with pytest.raises(Refused) as caught:
        EventMonitor.from_option(text)
    assert chain_messages(caught.value) == expected


def test_log_lines(tmp_path):
    path = tmp_path / "log"
    log = Log(1, str(path))
    log.write(INFO, "Event: source = vm event = paused")
    log.write(2, "not this one")
    assert path.read_text().startswith("cloud-hypervisor:   0.0")
    assert path.read_text().endswith("s: <vmm> INFO:freezeframe -- Event: source = vm event = paused\n")


def test_devices_that_have_stopped_are_in_the_info(running):
    booted(running)
    assert "faults" not in running.vmm.info()
    running.backend.machine.broken["_disk0"] = "queue 0: the chain of descriptor 3 loops"
    assert running.vmm.info()["faults"] == {"_disk0": "queue 0: the chain of descriptor 3 loops"}
