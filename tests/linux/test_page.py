"""The commands of the page, as a user types them, with a stock Linux guest."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from freezeframe.testing.process import Vmm

from .conftest import BOOT_DEADLINE_S, PROMPT, Frozen, Guest

pytestmark = pytest.mark.linux

# The secret is only in guest RAM; fd 9 is a deleted file, open in the shell.
PREPARE = (
    "SECRET=$(head -c 16 /dev/urandom | md5sum | cut -c1-32); echo $SECRET > /tmp/open; exec 9</tmp/open; rm /tmp/open; "
    "(i=0; while :; do i=$((i+1)); echo tick $i; usleep 100000; done) & LOOP=$!"
)
PROOF = 'echo "PROOF $SECRET $$ $LOOP $(kill -0 $LOOP && echo alive) $(cat /proc/sys/kernel/random/boot_id)"'


def ticks(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^tick (\d+)$", text, re.MULTILINE)]


def test_the_page(guest: Guest, tmp_path: Path) -> None:
    disk, snapshot, sock = guest.copy_disk(tmp_path), tmp_path / "snapshot", tmp_path / "ch.sock"
    snapshot.mkdir()
    with Vmm(guest.argv(disk, cpus=4, memory="4G"), socket=sock) as vmm:
        vmm.console.expect(PROMPT, deadline_s=BOOT_DEADLINE_S)
        assert re.search(r"guest is up: .* 4 CPUs", vmm.console.text)
        vmm.send(PREPARE)
        vmm.console.expect(r"^tick 3$")
        here = vmm.console.mark()
        vmm.send(PROOF)
        before = vmm.console.expect(r"^PROOF (\w{32} \d+ \d+ alive \S+)$", here).group(1)
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{snapshot}")
        vmm.kill()
        last = ticks(vmm.console.text)[-1]

    sizes = {path.name: path.stat() for path in snapshot.iterdir()}
    assert {name: at.st_size for name, at in sizes.items() if name != "vm.json"} == {
        "memory-region-0": 3221225472,
        "memory-region-1": 1073741824,
    }
    assert set(sizes) == {"memory-region-0", "memory-region-1", "vm.json"}
    assert {stat.S_IMODE(at.st_mode) for at in sizes.values()} == {0o600}

    with Vmm(["--restore", f"source_url=file://{snapshot}"], socket=sock) as vmm:
        vmm.wait_ready()
        vmm.remote("resume")
        first = int(vmm.console.expect(r"^tick (\d+)$").group(1))
        assert last <= first <= last + 2
        vmm.send(PROOF)
        assert vmm.console.expect(r"^PROOF (\w{32} \d+ \d+ alive \S+)$").group(1) == before
        vmm.send("kill $LOOP; dmesg | grep -iE 'lockup|unstable|stall|BUG:|I/O error' ; echo DMESG done")
        vmm.console.expect(r"^DMESG done$")
        assert not re.findall(r"^\[ *\d+\.\d+\] .*$", vmm.console.text, re.MULTILINE)
        vmm.send("poweroff")
        assert vmm.wait() == 0


def test_from_two_terminals(frozen: Frozen, tmp_path: Path) -> None:
    """The page's other way: an empty VMM, then `ch-remote restore`."""
    disk = tmp_path / "root.raw"
    disk.write_bytes(frozen.disk.read_bytes())
    with Vmm([], socket=tmp_path / "ch.sock") as vmm:
        end = 0
        while vmm.remote("ping", check=False).returncode and end < 1000:
            end += 1
        vmm.remote("restore", f"source_url=file://{frozen.snapshot},disks=[_disk0@{disk}]")
        assert '"state":"Paused"' in vmm.remote("info").stdout
        vmm.remote("resume")
        vmm.send("echo alive $((40+2))")
        vmm.console.expect(r"^alive 42$")
        vmm.send("poweroff")
        assert vmm.wait() == 0
