"""A Linux guest at work moves from one engine to the other and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from freezeframe.testing.process import Vmm

from .conftest import Frozen, why_not_kvm

pytestmark = pytest.mark.linux

MOVES = 6


def other(engine: str) -> str:
    return "kvm" if engine == "software" else "software"


def count(vmm: Vmm) -> tuple[int, int]:
    """Rounds of the load's disk and timer loops."""
    here = vmm.console.mark()
    vmm.send("echo COUNT $(cat /tmp/disk.count /tmp/timer.count)")
    found = vmm.console.expect(r"^COUNT (\d+) (\d+)$", here)
    return int(found.group(1)), int(found.group(2))


def test_a_busy_guest_moves_between_the_engines(frozen: Frozen, tmp_path: Path, engine: str) -> None:
    """Frozen on one engine, it goes on on the other one, and so on; nothing that it checks itself is wrong."""
    if why := why_not_kvm():
        pytest.skip(why)
    here = other(engine)
    vmm = frozen.restore(tmp_path / "0", engine=here)
    vmm.remote("resume")
    vmm.send("sh /root/load")
    vmm.console.expect(r"^load started$")
    counts, text = (0, 0), ""
    try:
        for move in range(1, MOVES + 1):
            assert json.loads(vmm.remote("info").stdout)["state"] == "Running"
            now = count(vmm)
            assert now >= counts
            counts = now
            snapshot = tmp_path / f"snapshot-{move}"
            snapshot.mkdir()
            vmm.remote("pause")
            vmm.remote("snapshot", f"file://{snapshot}")
            vmm.kill()
            text += vmm.console.text
            here = other(here)
            restore = ["--engine", here, "--restore", f"source_url=file://{snapshot}"]
            vmm = Vmm(restore, socket=tmp_path / f"{move}.sock")
            vmm.wait_ready()
            shutil.rmtree(snapshot)
            vmm.remote("resume")
        mark = vmm.console.mark()
        vmm.send("dmesg | grep -iE 'lockup|unstable|stall|hung|BUG:|I/O error|lost'; echo CHECKED")
        vmm.console.expect(r"^CHECKED$", mark)
        assert not re.findall(r"^\[ *\d+\.\d+\] .*$", vmm.console.text[mark:], re.MULTILINE)
        text += vmm.console.text
    finally:
        vmm.kill()
    assert "BAD" not in text.replace('echo "BAD', "")
