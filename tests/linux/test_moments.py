"""Snapshots at random moments of a boot (entry, decompression, SMP bring-up, drivers) restore and reach userland."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from freezeframe.testing.process import DEADLINE_S, Vmm

from .conftest import BOOT_DEADLINE_S, Guest

pytestmark = pytest.mark.linux

MOMENTS = int(os.environ.get("FREEZEFRAME_MOMENTS", "4"))
SEED = int(os.environ.get("FREEZEFRAME_SEED", "1"))
# CPU seconds that a whole boot takes, roughly: moments are spread over it. CPU time, unlike wall time, is progress of the guest.
BOOT_CPU_S = 1.5


def _moments() -> list[float]:
    """Early ones more often: that is where the modes change."""
    chance = random.Random(SEED)
    return sorted(round(BOOT_CPU_S * chance.random() ** 2, 3) for _ in range(MOMENTS))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run_for(vmm: Vmm, cpu_seconds: float) -> None:
    """Until the VMM has used that much CPU since its first machine existed, or the boot is over."""
    vmm.wait_ready()
    start, tick = _cpu_seconds(vmm.process.pid), threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if _cpu_seconds(vmm.process.pid) - start >= cpu_seconds or "guest is up" in vmm.console.text:
            return
        tick.wait(0.005)
    pytest.fail("the guest does not use its CPU")


@pytest.mark.parametrize("moment", _moments())
def test_a_boot_goes_on_after_a_snapshot_in_the_middle(guest: Guest, tmp_path: Path, moment: float) -> None:
    disk, snapshot = guest.copy_disk(tmp_path), tmp_path / "snapshot"
    snapshot.mkdir()
    with Vmm(guest.argv(disk, cpus=4), socket=tmp_path / "first.sock") as vmm:
        _run_for(vmm, moment)
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{snapshot}")
        vmm.kill()
        early = vmm.console.text
    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=tmp_path / "second.sock") as vmm:
        vmm.wait_ready()
        vmm.remote("resume")
        if "guest is up" not in early:
            found = vmm.console.expect(r"guest is up: .*, (\d+) CPUs", deadline_s=BOOT_DEADLINE_S)
            assert found.group(1) == "4"
        vmm.send("dmesg | grep -ciE 'lockup|unstable|stall|BUG:|Oops|panic:'; echo MOMENT done")
        vmm.console.expect(r"^0\nMOMENT done$", deadline_s=BOOT_DEADLINE_S)
