"""Linux guests for the tests: Debian's cloud kernel, a busybox disk, and one machine that is booted once and then only restored."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from freezeframe import _core
from freezeframe.errors import FreezeframeError
from freezeframe.images import CloudKernel, build_busybox_disk, cloud_kernel
from freezeframe.testing.process import Vmm

PROMPT = r"guest:\S*# "
BOOT_DEADLINE_S = 300.0

# A load for every CPU, the disk and timers, with its own checks. Whatever it prints with BAD in it is a failure.
LOAD = """\
#!/bin/sh
mkdir -p /mnt/load; echo 4 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/kernel/printk
cpus=$(grep -c ^processor /proc/cpuinfo)
echo 'want=$(echo $1 | sha256sum); while :; do [ "$(echo $1 | sha256sum)" = "$want" ] || echo "BAD sum $1"; done' > /tmp/spin
cat > /tmp/disk << 'EOF'
n=0
while :; do
    n=$((n+1)); f=/mnt/load/$((n % 4))
    head -c 262144 /dev/urandom > $f; want=$(md5sum < $f); sync
    echo 3 > /proc/sys/vm/drop_caches
    [ "$(md5sum < $f)" = "$want" ] || echo "BAD disk $n"
    echo $n > /tmp/disk.count
done
EOF
echo 'n=0; while :; do usleep 20000; n=$((n+1)); echo $n > /tmp/timer.count; done' > /tmp/timer
for cpu in $(seq $cpus); do taskset -c $((cpu-1)) sh /tmp/spin $cpu & done
echo 0 > /tmp/disk.count; echo 0 > /tmp/timer.count; sh /tmp/disk & sh /tmp/timer &
echo load started
"""


@dataclasses.dataclass(frozen=True)
class Guest:
    kernel: CloudKernel
    disk: Path

    def copy_disk(self, into: Path) -> Path:
        return Path(shutil.copy(self.disk, into / "root.raw"))

    def argv(self, disk: Path, *, cpus: int = 2, memory: str = "1G", console: str = "hvc0") -> list[str]:
        return [
            "--cpus", f"boot={cpus}", "--memory", f"size={memory}", "--kernel", str(self.kernel.kernel), "--initramfs", str(self.kernel.initramfs),
            "--cmdline", f"root=/dev/vda1 console={console} rw", "--disk", f"path={disk}",
        ]  # fmt: skip


def why_not_kvm() -> str | None:
    """Why Linux cannot run on this host's KVM; None where it can."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm cannot be opened here"
    runs, found, *_ = _core.kvm_probe()
    return None if runs else f"Linux does not run on this host's KVM: {found}"


@pytest.fixture(scope="session", params=["software", "kvm"], autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on both engines; where one cannot, it says so. The commands take it from their environment."""
    if request.param == "kvm" and (why := why_not_kvm()):
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEZEFRAME_ENGINE", request.param)
        yield request.param


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Guest:
    disk = tmp_path_factory.mktemp("master") / "root.raw"
    try:
        build_busybox_disk(disk, extra={"root/load": LOAD.encode()})
        return Guest(cloud_kernel(), disk)
    except FreezeframeError as error:
        pytest.skip(f"no guest can be made here: {error}")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A snapshot of a booted machine at its shell, and the disk that belongs to it (never written again: use copies)."""

    snapshot: Path
    disk: Path
    cpus: int

    def restore(self, work: Path, *more: str, engine: str = "auto") -> Vmm:
        """A restored, paused machine on a copy of the disk. `engine`: "auto" is the one that the test runs on."""
        work.mkdir(parents=True, exist_ok=True)
        disk = Path(shutil.copy(self.disk, work / "root.raw"))
        options = ",".join([f"source_url=file://{self.snapshot}", f"disks=[_disk0@{disk}]", *more])
        vmm = Vmm(["--engine", engine, "--restore", options], socket=work / "vmm.sock")
        vmm.wait_ready()
        return vmm


@pytest.fixture(scope="session")
def frozen(engine: str, guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frozen]:
    work = tmp_path_factory.mktemp("frozen")
    disk = guest.copy_disk(work)
    snapshot = work / "snapshot"
    snapshot.mkdir()
    with Vmm(guest.argv(disk, cpus=2), socket=work / "vmm.sock") as vmm:
        vmm.console.expect(PROMPT, deadline_s=BOOT_DEADLINE_S)
        vmm.remote("pause")
        vmm.remote("snapshot", f"file://{snapshot}")
    yield Frozen(snapshot, disk, 2)
    shutil.rmtree(work, ignore_errors=True)
