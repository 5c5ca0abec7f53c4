"""The commands as processes, with a tiny guest that counts: the trip, signals, sockets, exit statuses, events."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import threading
import time

import pytest

from freezeframe.client import Connection
from freezeframe.testing.guests import tick
from freezeframe.testing.process import Vmm, installed

pytestmark = pytest.mark.guest

DEADLINE = 60.0


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "tick.elf"
    path.write_bytes(tick(size=0x4000, spin=20_000))
    return path


def machine(kernel) -> list[str]:
    return ["--kernel", str(kernel), "--memory", "size=64M", "--console", "off", "--serial", "tty"]


def ticks(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^T (\d+)\n", text, re.MULTILINE)]


@pytest.fixture
def vmm(kernel, tmp_path):
    with Vmm(machine(kernel), socket=tmp_path / "s.sock") as vmm:
        vmm.console.expect(r"^T 3$")
        yield vmm


def snapshot(vmm: Vmm, directory) -> None:
    directory.mkdir()
    vmm.remote("pause")
    assert vmm.remote("snapshot", f"file://{directory}").stdout == ""


def test_the_trip_from_the_command_line(vmm, tmp_path):
    snapshot(vmm, tmp_path / "one")
    vmm.kill()
    before = ticks(vmm.console.text)
    assert sorted(os.listdir(tmp_path / "one")) == ["memory-region-0", "vm.json"]
    assert {stat.S_IMODE(os.stat(tmp_path / "one" / name).st_mode) for name in os.listdir(tmp_path / "one")} == {0o600}
    restored = Vmm(["--restore", f"source_url=file://{tmp_path}/one"], socket=tmp_path / "s.sock")
    with restored:
        restored.wait_ready()
        assert json.loads(restored.remote("info").stdout)["state"] == "Paused"
        assert restored.console.text == ""
        restored.remote("resume")
        restored.console.expect(rf"T {before[-1] + 5}\n")
        snapshot(restored, tmp_path / "two")
        assert restored.remote("shutdown-vmm").stdout == "\n"
        assert restored.wait() == 0
        assert not (tmp_path / "s.sock").exists()
    # Nothing was printed twice, nothing is missing: the two consoles are one sequence.
    sequence = re.findall(r"T (\d+)\n", vmm.console.text + restored.console.text)
    assert [int(number) for number in sequence] == list(range(1, len(sequence) + 1))
    with Vmm([], socket=tmp_path / "s.sock") as empty:
        while not (tmp_path / "s.sock").exists():
            time.sleep(0.001)
        empty.remote("restore", f"source_url=file://{tmp_path}/two")
        empty.remote("resume")
        empty.console.expect(rf"T {int(sequence[-1]) + 5}\n")
        assert "BAD" not in empty.console.text


def test_the_command_line_answers_only_when_the_machine_exists(vmm, tmp_path):
    snapshot(vmm, tmp_path / "one")
    with Vmm(["--restore", f"source_url=file://{tmp_path}/one"], socket=tmp_path / "two.sock") as restored:
        end = time.monotonic() + DEADLINE
        while True:
            try:
                client = Connection(str(tmp_path / "two.sock"), timeout=DEADLINE)
                break
            except OSError:
                assert time.monotonic() < end
        with client:
            assert client.get("vm.info").json()["state"] == "Paused"
        assert restored.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_with_0(vmm, tmp_path, number):
    os.kill(vmm.process.pid, number)
    assert vmm.wait() == 0
    assert vmm.errors.text == ""
    assert not (tmp_path / "s.sock").exists()


def test_a_second_vmm_on_the_socket(vmm, tmp_path):
    with Vmm([], socket=tmp_path / "s.sock") as second:
        assert second.wait() == 1
        second.errors.expect(
            r"^Error: Cloud Hypervisor exited with the following chain of errors:\n"
            r"  0: Failed to start the VMM thread\n"
            r'  1: API socket ".*s\.sock" is already in use by another running instance\n'
            rf"  2: it belongs to process {vmm.process.pid} .*choose another --api-socket"
        )
    assert json.loads(vmm.remote("ping").stdout)["pid"] == vmm.process.pid


def test_a_socket_left_by_kill_9_is_replaced(vmm, tmp_path):
    vmm.kill()
    assert (tmp_path / "s.sock").exists()
    with Vmm([], socket=tmp_path / "s.sock") as second:
        end = time.monotonic() + DEADLINE
        while second.remote("ping", check=False).returncode != 0:
            assert time.monotonic() < end
        assert json.loads(second.remote("ping").stdout)["pid"] == second.process.pid


def test_errors_of_ch_remote(vmm, tmp_path):
    failed = vmm.remote("resume", check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "Error: ch-remote exited with the following chain of errors:\n  0: http client error\n"
        "  1: Server responded with InternalServerError\n  2: Error from API\n  3: The VM could not resume\n"
        "  4: Cannot resume VM\n  5: Failed to resume migratable component\n"
        "  6: Invalid transition: InvalidStateTransition(Running, Running)\n"
    )
    refused = vmm.remote("add-disk", "path=x", check=False)
    assert "Server responded with NotImplemented" in refused.stderr
    assert "vm.add-disk is not supported by this VMM" in refused.stderr


def test_create_and_boot_over_the_socket(kernel, tmp_path):
    config = tmp_path / "vm.json"
    config.write_text(
        json.dumps(
            {
                "payload": {"kernel": str(kernel)},
                "memory": {"size": 64 << 20},
                "console": {"mode": "Off"},
                "serial": {"mode": "Tty"},
            }
        )
    )
    with Vmm([], socket=tmp_path / "s.sock") as vmm:
        end = time.monotonic() + DEADLINE
        while vmm.remote("ping", check=False).returncode != 0:
            assert time.monotonic() < end
        vmm.remote("create", str(config))
        vmm.remote("boot")
        vmm.console.expect(r"^T 3$")
        mark = vmm.console.mark()
        vmm.remote("reboot")
        vmm.console.expect(r"READY\nT 1\nT 2", since=mark)
        vmm.remote("delete")
        assert vmm.remote("info", check=False).returncode == 1


def test_events_of_a_restore(vmm, tmp_path):
    snapshot(vmm, tmp_path / "one")
    vmm.kill()
    argv = ["--restore", f"source_url=file://{tmp_path}/one,resume=on", "--event-monitor", f"path={tmp_path}/events"]
    with Vmm(argv, socket=tmp_path / "s.sock") as restored:
        restored.console.expect(r"T \d+\n")
        os.kill(restored.process.pid, signal.SIGTERM)
        assert restored.wait() == 0
    events = [json.loads(part)["event"] for part in (tmp_path / "events").read_text().strip().split("\n\n")]
    assert events[:5] == ["starting", "restoring", "restored", "resuming", "resumed"]


def test_a_damaged_chunk_ends_the_vmm_with_1(vmm, tmp_path):
    snapshot(vmm, tmp_path / "one")
    vmm.kill()
    path = tmp_path / "one" / "memory-region-0"
    with open(path, "r+b") as file:
        file.seek(0x40_0100)  # in the memory that the guest checks each round
        byte = file.read(1)
        file.seek(0x40_0100)
        file.write(bytes([byte[0] ^ 1]))
    with Vmm(["--restore", f"source_url=file://{tmp_path}/one"], socket=tmp_path / "s.sock") as restored:
        restored.wait_ready()
        restored.remote("resume")
        assert restored.wait() == 1
        restored.errors.expect(r"memory-region-0.*chunk")
        assert "BAD" not in restored.console.text
    assert not (tmp_path / "s.sock").exists()


def test_pseudo_terminals_are_named_by_info(kernel, tmp_path):
    argv = ["--kernel", str(kernel), "--memory", "size=64M", "--console", "off", "--serial", "pty"]
    with Vmm(argv, socket=tmp_path / "s.sock") as vmm:
        vmm.wait_ready()
        path = json.loads(vmm.remote("info").stdout)["config"]["serial"]["file"]
        terminal = os.open(path, os.O_RDONLY | os.O_NOCTTY)
        data = b""
        while b"T 2\r" not in data and b"T 2\n" not in data:
            data += os.read(terminal, 4096)
        os.close(terminal)


def test_standard_descriptors_may_be_closed(kernel, tmp_path):
    words = [installed("cloud-hypervisor"), "--api-socket", str(tmp_path / "s.sock"), *machine(kernel)]
    process = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words])
    end = time.monotonic() + DEADLINE
    while subprocess.run(
        [installed("ch-remote"), "--api-socket", words[2], "info"], capture_output=True, check=False
    ).returncode:
        assert process.poll() is None
        assert time.monotonic() < end
    assert (
        subprocess.run([installed("ch-remote"), "--api-socket", words[2], "shutdown-vmm"], check=False).returncode == 0
    )
    assert process.wait(DEADLINE) == 0


def test_a_reply_that_cannot_be_written_is_a_failure(vmm):
    with open("/dev/full", "wb") as full:
        words = [installed("ch-remote"), "--api-socket", str(vmm.socket), "info"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_many_clients_at_once(vmm, tmp_path):
    """Actions from several connections at the same time: each gets an answer, and the machine is whole afterwards."""
    bodies = {
        "vm.snapshot": {"destination_url": f"file://{tmp_path}"},
        "vm.restore": {"source_url": f"file://{tmp_path}"},
    }
    names = ["vm.pause", "vm.resume", "vm.snapshot", "vm.restore", "vm.power-button", "vm.nope", "vm.boot"]
    statuses: list[int] = []

    def client(number: int) -> None:
        with Connection(str(vmm.socket), timeout=DEADLINE) as connection:
            for step in range(25):
                name = names[(number * 3 + step) % len(names)]
                statuses.append(connection.put(name, bodies.get(name)).status)
                statuses.append(connection.get("vm.info").status)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert len(statuses) == 6 * 25 * 2
    assert set(statuses) <= {200, 204, 404, 500}
    vmm.remote("resume", check=False)
    mark = vmm.console.mark()
    vmm.console.expect(r"T \d+\n", since=mark)
    assert "BAD" not in vmm.console.text
