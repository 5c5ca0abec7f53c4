"""Damage to a snapshot, from the outside: it is refused, or the machine stops before the guest sees a wrong byte."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from freezeframe import _core
from freezeframe.testing.guests import tick
from freezeframe.testing.process import Vmm

pytestmark = pytest.mark.guest

BASE, SIZE = 0x40_0000, 0x10_0000
CHUNK = 0x1_0000


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """A snapshot of a guest that checks and rewrites 1 MiB between two lines."""
    directory = tmp_path_factory.mktemp("taken")
    (directory / "tick.elf").write_bytes(tick(base=BASE, size=SIZE))
    (directory / "s").mkdir()
    arguments = ["--kernel", str(directory / "tick.elf"), "--memory", "size=64M", "--console", "off", "--serial", "tty"]
    with Vmm(arguments, socket=directory / "s.sock") as vmm:
        vmm.console.expect(r"^T 3$")
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{directory}/s")
    return directory / "s"


@pytest.fixture
def snapshot(taken, tmp_path):
    return shutil.copytree(taken, tmp_path / "copy")


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def wait_empty(vmm: Vmm) -> None:
    """Until a VMM without a machine answers."""
    while vmm.remote("ping", check=False).returncode:
        assert vmm.process.poll() is None, vmm.errors.text


ENGINES = [
    "software",
    pytest.param(
        "kvm",
        marks=pytest.mark.skipif(
            not os.access("/dev/kvm", os.R_OK | os.W_OK) or _core.faults_unavailable() is not None,
            reason="no /dev/kvm, or no userfaultfd",
        ),
    ),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_bit_stops_the_machine_at_first_touch(snapshot, tmp_path, engine):
    at = BASE + SIZE - 5000
    flip(snapshot / "memory-region-0", at)
    arguments = ["--engine", engine, "--restore", f"source_url=file://{snapshot}"]
    with Vmm(arguments, socket=tmp_path / "s.sock") as vmm:
        vmm.wait_ready()
        vmm.remote("resume")
        assert vmm.wait() == 1
        vmm.errors.expect(
            rf"{snapshot}/memory-region-0, chunk {at // CHUNK}: its bytes are not the ones that were saved"
        )
        assert "BAD" not in vmm.console.text
        # The round that would have read it never ended; the one that the snapshot was taken in may have.
        assert vmm.console.text.count("T ") <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flipped_bit_is_found_at_once_by_copy(taken, snapshot, tmp_path, engine):
    flip(snapshot / "memory-region-0", BASE)
    with Vmm(["--engine", engine], socket=tmp_path / "s.sock") as vmm:
        wait_empty(vmm)
        refused = vmm.remote("restore", f"source_url=file://{snapshot},memory_restore_mode=copy", check=False)
        assert refused.returncode == 1
        assert f"{snapshot}/memory-region-0, chunk {BASE // CHUNK}" in refused.stderr
        assert vmm.remote("info", check=False).returncode == 1
        vmm.remote("restore", f"source_url=file://{taken}")
        info = json.loads(vmm.remote("info").stdout)
        assert info["engine"]["name"] == engine
        assert info["restored"]["memory_restore_mode"] == "OnDemand"
        vmm.remote("resume")
        vmm.console.expect(r"^T \d+\nT \d+\n")


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing", "edited", "document"])
def test_the_vmm_stays_empty_and_usable(taken, snapshot, tmp_path, damage):
    memory, document = snapshot / "memory-region-0", snapshot / "vm.json"
    if damage == "flip":
        flip(document, document.stat().st_size // 2)
    elif damage == "cut":
        with memory.open("r+b") as file:
            file.truncate(memory.stat().st_size // 2)
    elif damage == "longer":
        with memory.open("r+b") as file:
            file.truncate(memory.stat().st_size + 4096)
    elif damage == "missing":
        memory.unlink()
    elif damage == "edited":
        document.write_text(document.read_text().replace('"boot_vcpus": 1', '"boot_vcpus": 2'))
    else:
        document.unlink()
    with Vmm([], socket=tmp_path / "s.sock") as vmm:
        wait_empty(vmm)
        refused = vmm.remote("restore", f"source_url=file://{snapshot}", check=False)
        assert refused.returncode == 1
        assert ("vm.json" if damage in ("flip", "edited", "document") else "memory-region-0") in refused.stderr
        assert vmm.remote("info", check=False).returncode == 1
        vmm.remote("restore", f"source_url=file://{taken}")
        vmm.remote("resume")
        vmm.console.expect(r"^T \d+\nT \d+\n")
    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=tmp_path / "t.sock") as vmm:
        assert vmm.wait() == 1


def test_a_snapshot_over_a_damaged_source_is_refused_and_the_machine_stays(snapshot, tmp_path):
    """The damaged chunk was never touched: the machine could go on for long, but no snapshot may claim that it is whole."""
    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=tmp_path / "s.sock") as vmm:
        vmm.wait_ready()
        flip(snapshot / "memory-region-0", BASE + 3 * CHUNK)
        target = tmp_path / "second"
        target.mkdir()
        refused = vmm.remote("snapshot", f"file://{target}", check=False)
        assert refused.returncode == 1
        assert f"memory-region-0, chunk {BASE // CHUNK + 3}" in refused.stderr
        assert list(target.iterdir()) == []
        assert json.loads(vmm.remote("info").stdout)["state"] == "Paused"


def test_the_directory_may_go_and_little_is_read(snapshot, tmp_path):
    with Vmm([], socket=tmp_path / "empty.sock") as empty:
        wait_empty(empty)
        floor = empty.resident()
    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=tmp_path / "s.sock") as vmm:
        vmm.wait_ready()
        assert vmm.resident() < floor + (64 << 20)
        shutil.rmtree(snapshot)
        vmm.remote("resume")
        vmm.console.expect(r"^T \d+\nT \d+\n")
        assert "BAD" not in vmm.console.text
