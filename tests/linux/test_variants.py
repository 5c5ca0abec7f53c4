"""Kernels that do without what ours offers, and the ways in which a guest ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from freezeframe.testing.process import Vmm

from .conftest import BOOT_DEADLINE_S, PROMPT, Guest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.linux

VARIANTS = {
    # APICs by memory-mapped registers, one-shot timers instead of TSC deadlines, INTx through the I/O APIC.
    "xapic-intx-oneshot": "nox2apic lapic=notscdeadline pci=nomsi",
    # No clock but the PM timer; configuration space through ports; BARs moved.
    "pm-timer-conf1-realloc": "no-kvmclock clocksource=acpi_pm pci=conf1,nocrs,realloc",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_boots_survives_a_restore_and_reboots(guest: Guest, tmp_path: Path, name: str) -> None:
    disk, snapshot, sock = guest.copy_disk(tmp_path), tmp_path / "snapshot", tmp_path / "ch.sock"
    snapshot.mkdir()
    argv = guest.argv(disk, cpus=4, memory="512M", console=f"hvc0 {VARIANTS[name]}")
    with Vmm(argv, socket=sock) as vmm:
        vmm.console.expect(PROMPT, deadline_s=BOOT_DEADLINE_S)
        assert "4 CPUs" in vmm.console.text
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{snapshot}")
        vmm.kill()
    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=sock) as vmm:
        vmm.wait_ready()
        vmm.remote("resume")
        vmm.send("sleep 1; dmesg | grep -ciE 'lockup|stall|BUG:|I/O error'; echo COMPLAINTS counted")
        assert vmm.console.expect(r"^(\d+)\r?\n+COMPLAINTS counted$").group(1) == "0"
        here = vmm.console.mark()
        vmm.send("sync; reboot -f")
        vmm.console.expect(r"guest is up", here, deadline_s=BOOT_DEADLINE_S)
        here = vmm.console.mark()
        vmm.send(
            "(dd if=/dev/input/event0 bs=24 count=1 >/dev/null 2>&1; echo BUTTON pressed) & sleep 1; echo READY now"
        )
        vmm.console.expect(r"^READY now$", here)
        vmm.remote("power-button")
        vmm.console.expect(r"^BUTTON pressed$", here)
        vmm.send("poweroff -f")
        assert vmm.process.wait(60) == 0
