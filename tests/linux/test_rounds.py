"""A guest kept busy goes through many generations of snapshots and loses nothing."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from freezeframe.testing.process import Vmm

from .conftest import Frozen

pytestmark = pytest.mark.linux

ROUNDS = int(os.environ.get("FREEZEFRAME_ROUNDS", "4"))


def test_busy_guest_through_generations(frozen: Frozen, tmp_path: Path) -> None:
    """Pause → snapshot → kill -9 → restore → resume, each generation restored from the one before."""
    vmm = frozen.restore(tmp_path / "0")
    disk = tmp_path / "0" / "root.raw"
    vmm.remote("resume")
    vmm.send("sh /root/load")
    vmm.console.expect(r"^load started$")
    counts = [0, 0]
    text = ""
    try:
        for generation in range(1, ROUNDS + 1):
            here = vmm.console.mark()
            vmm.send("echo COUNT $(cat /tmp/disk.count /tmp/timer.count)")
            found = vmm.console.expect(r"^COUNT (\d+) (\d+)$", here)
            now = [int(found.group(1)), int(found.group(2))]
            assert now[0] >= counts[0]
            assert now[1] >= counts[1]
            counts = now
            snapshot = tmp_path / f"snapshot-{generation}"
            snapshot.mkdir()
            vmm.remote("pause")
            vmm.remote("snapshot", f"file://{snapshot}")
            vmm.kill()
            text += vmm.console.text
            vmm = Vmm(["--restore", f"source_url=file://{snapshot}"], socket=tmp_path / f"{generation}.sock")
            vmm.wait_ready()
            shutil.rmtree(snapshot)
            vmm.remote("resume")
        here = vmm.console.mark()
        vmm.send(
            "for i in 1 2 3 4 5; do sleep 1; cat /tmp/disk.count; done; echo COUNT $(cat /tmp/disk.count /tmp/timer.count); dmesg > /tmp/d; echo DMESG $(wc -l < /tmp/d)"
        )
        found = vmm.console.expect(r"^COUNT (\d+) (\d+)$", here)
        assert int(found.group(1)) > counts[0]
        assert int(found.group(2)) > counts[1]
        vmm.console.expect(r"^DMESG \d+$", here)
        here = vmm.console.mark()
        vmm.send("grep -iE 'lockup|unstable|stall|hung|BUG:|I/O error|lost|EXT4-fs error' /tmp/d; echo CHECKED")
        vmm.console.expect(r"^CHECKED$", here)
        complaints = re.findall(r"^\[ *\d+\.\d+\] .*$", vmm.console.text[here:], re.MULTILINE)
        assert not complaints
        text += vmm.console.text
    finally:
        vmm.kill()
    assert "BAD" not in text.replace('echo "BAD', "")
    assert disk.exists()


def test_restores_many_times_at_once(frozen: Frozen, tmp_path: Path) -> None:
    machines = [frozen.restore(tmp_path / str(number)) for number in range(3)]
    try:
        for number, vmm in enumerate(machines):
            vmm.remote("resume")
            vmm.send(f"echo machine {number} > /root/me; sync; cat /root/me")
        for number, vmm in enumerate(machines):
            vmm.console.expect(rf"^machine {number}$")
    finally:
        for vmm in machines:
            vmm.kill()


def test_restores_lazily(frozen: Frozen, tmp_path: Path) -> None:
    with Vmm([], socket=tmp_path / "empty.sock") as empty:
        while empty.remote("ping", check=False).returncode:
            assert empty.process.poll() is None
        base = empty.resident()
    with frozen.restore(tmp_path / "lazy") as vmm:
        assert vmm.resident() - base < 64 << 20
