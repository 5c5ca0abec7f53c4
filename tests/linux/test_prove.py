"""A busy Linux guest runs the same twice, and reads the same random numbers and the same time."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from freezeframe.cli.prove_cmd import report
from freezeframe.proof import prove, replay

from .conftest import Frozen

pytestmark = pytest.mark.linux


@pytest.fixture(scope="module")
def busy(frozen: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """The machine in the middle of its load."""
    work = tmp_path_factory.mktemp("busy")
    with frozen.restore(work) as vmm:
        vmm.remote("resume")
        vmm.send("sh /root/load")
        vmm.console.expect(r"^load started$")
        here = vmm.console.mark()
        vmm.send("while [ $(cat /tmp/disk.count) -lt 2 ]; do sleep 0.1; done; echo BUSY")
        vmm.console.expect(r"^BUSY$", here)
        snapshot = work / "snapshot"
        snapshot.mkdir()
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{snapshot}")
    return Frozen(snapshot, work / "root.raw", frozen.cpus)


def test_a_busy_guest_runs_the_same_on_both_tiers(busy: Frozen) -> None:
    files = [busy.disk, *sorted(busy.snapshot.iterdir())]
    before = [(f.stat().st_mtime_ns, f.stat().st_ctime_ns, f.stat().st_size) for f in files]
    proof = prove(busy.snapshot, 100_000_000, every=20_000_000)
    assert proof.same, report(proof)
    assert proof.instructions == 100_000_000
    assert len({c.digests.devices for c in proof.checkpoints}) > 1, "no device did anything"
    assert [(f.stat().st_mtime_ns, f.stat().st_ctime_ns, f.stat().st_size) for f in files] == before


def test_typed_commands_give_the_same_answers(frozen: Frozen, tmp_path: Path) -> None:
    """Random numbers of the kernel, the date, a file on the disk; with another seed others."""
    disk = Path(shutil.copy(frozen.disk, tmp_path / "root.raw"))
    commands = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | md5sum; head -c 16 /dev/urandom | md5sum; date; md5sum /bin/busybox > /root/sum; sync; echo EN''D\n"
    runs = []
    for tier, seed in (("interpreter", 1), ("translator", 1), ("interpreter", 2)):
        with replay(frozen.snapshot, tier=tier, seed=seed, disks={"_disk0": disk}) as run:
            run.advance(1_000_000)
            run.send(commands)
            while "END" not in run.output() and run.instructions < 2_000_000_000:
                run.advance(20_000_000)
            assert "END" in run.output(), run.output()[-500:]
            assert run.ended is None
            runs.append((run.output(), run.instructions, run.digests(), run.inputs))
    assert runs[0] == runs[1]
    sums = [re.findall(r"^(\w{32})  -\r?$", text, re.MULTILINE) for text, *_ in runs]
    assert len(sums[0]) == 2
    assert sums[2][0] != sums[0][0], "the hardware's random numbers do not follow the seed"
    assert re.findall(r"^\w+ \w+ +\d+ .*\d{4}\r?$", runs[0][0], re.MULTILINE)
