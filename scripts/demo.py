"""The whole trip with a stock Linux guest: boot, pause, snapshot, kill, restore, resume, and proof that it is the same machine.

Run by `make demo`. Every step is the command line that a user would type; nothing here reaches into the package but
for making the guest's kernel and disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from freezeframe.images import build_busybox_disk, cloud_kernel
from freezeframe.testing.process import Unexpected, Vmm

BIN = Path(sys.executable).parent
BOOT_DEADLINE_S = 600
STEP_DEADLINE_S = 120


class DemoFailed(Exception):
    """A step did not do what it should."""


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def command(*argv: str) -> str:
    """Runs one of our commands the way a user does; shows the line."""
    print("$ " + " ".join(argv), flush=True)
    done = subprocess.run(
        [str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, timeout=STEP_DEADLINE_S, check=False
    )
    if done.returncode != 0:
        raise DemoFailed(f"{argv[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def start(socket: Path, *argv: str, show: bool) -> Vmm:
    print(f"$ cloud-hypervisor --api-socket {socket} " + " ".join(argv) + " &", flush=True)
    return Vmm(argv, socket=socket, echo=show)


def timed(times: list[tuple[str, float]], what: str, step: Callable[[], object]) -> None:
    began = time.monotonic()
    step()
    times.append((what, time.monotonic() - began))


# One shell function in the guest: everything that has to survive, on one line. The secret lives in a shell variable, so in
# guest RAM only; fd 9 is an unlinked file, so it exists only as long as the process that holds it open.
PREPARE = (
    "SECRET=$(head -c 16 /dev/urandom | md5sum | cut -c1-32); echo $SECRET > /tmp/open; exec 9</tmp/open; rm /tmp/open; "
    "(i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done) & "
    'LOOP=$!; proof() { echo "PROOF secret=$SECRET shell=$$ loop=$LOOP alive=$(kill -0 $LOOP && echo yes) '
    "fd9=$(readlink /proc/$$/fd/9 | tr ' ' _) boot_id=$(cat /proc/sys/kernel/random/boot_id)\"; }"
)
PROOF = r"^PROOF (secret=\w{32} .*boot_id=\S+)"


def ticks(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^tick (\d+)$", text, re.MULTILINE)]


def run(scratch: Path) -> list[tuple[str, float]]:
    times: list[tuple[str, float]] = []
    say("A guest: Debian's stock cloud kernel and a disk with busybox")
    guest = cloud_kernel(lambda line: print(f"   {line}", flush=True))
    disk = scratch / "root.raw"
    build_busybox_disk(disk, progress=lambda line: print(f"   {line}", flush=True))
    print(f"   kernel {guest.version}, disk {disk.stat().st_size >> 20} MiB")

    socket, snapshot = scratch / "cloud-hypervisor.sock", scratch / "snapshot"
    remote = ("ch-remote", f"--api-socket={socket}")

    say("Boot it: 4 vCPUs, 4 GiB, console on this terminal")
    began = time.monotonic()
    vmm = start(
        socket, "--cpus", "boot=4", "--memory", "size=4G",
        "--kernel", str(guest.kernel), "--initramfs", str(guest.initramfs),
        "--cmdline", "root=/dev/vda1 console=hvc0 rw", "--disk", f"path={disk}", show=True,
    )  # fmt: skip
    try:
        vmm.console.expect(r"freezeframe guest is up", deadline_s=BOOT_DEADLINE_S)
        times.append(("boot to userland (4 vCPUs, software or KVM)", time.monotonic() - began))
        vmm.console.expect(r"guest:\S*# ")
        vmm.send(PREPARE)
        vmm.console.expect(r"^tick 5$")
        here = vmm.console.mark()
        vmm.send("proof")
        before = vmm.console.expect(PROOF, here).group(1)

        say("Pause, snapshot, look, and kill the VMM with SIGKILL")
        snapshot.mkdir()
        timed(times, "ch-remote pause", lambda: command(*remote, "pause"))
        timed(times, "ch-remote snapshot (synced to disk)", lambda: command(*remote, "snapshot", f"file://{snapshot}"))
    finally:
        vmm.kill()
    print(f"$ ls -l {snapshot}")
    print(subprocess.run(["ls", "-l", str(snapshot)], capture_output=True, text=True, check=True).stdout, end="")
    stored = sum(path.stat().st_blocks * 512 for path in snapshot.iterdir())
    last_tick = ticks(vmm.console.text)[-1]

    say("Restore it in a new VMM, and resume")
    began = time.monotonic()
    vmm = start(socket, "--restore", f"source_url=file://{snapshot}", show=False)
    try:
        vmm.wait_ready()
        times.append(("restore: new process → paused machine", time.monotonic() - began))
        timed(times, "ch-remote resume", lambda: command(*remote, "resume"))
        began = time.monotonic()
        vmm.console.expect(r"^tick \d+$")
        times.append(("resume → the guest's next output", time.monotonic() - began))
        vmm.send("proof")
        after = vmm.console.expect(PROOF).group(1)
        seen = ticks(vmm.console.text)

        say("Is it the same machine?")
        print(f"   before: {before}\n   after:  {after}")
        print(f"   counter: last tick before {last_tick}, then {seen[:4]} …")
        if before != after:
            raise DemoFailed("the machine's secrets, processes or open file changed")
        if seen != list(range(seen[0], seen[0] + len(seen))) or seen[0] not in (
            last_tick,
            last_tick + 1,
            last_tick + 2,
        ):
            raise DemoFailed("the counter was interrupted")
        print(
            "   yes: a random number held only in guest RAM, process ids, an open deleted file and an uninterrupted counter"
        )

        say("Switch it off from inside")
        vmm.send("kill $LOOP; poweroff")
        status = vmm.wait(STEP_DEADLINE_S)
        if status != 0:
            raise DemoFailed(f"the VMM ended with {status} after the guest's power-off")
    finally:
        vmm.kill()
    times.append((f"(the snapshot takes {stored / 2**20:.0f} MiB on disk for a 4 GiB guest)", 0))
    return times


def main() -> int:
    scratch = Path(tempfile.mkdtemp(prefix="freezeframe-demo-"))
    try:
        times = run(scratch)
    except (DemoFailed, Unexpected, subprocess.TimeoutExpired) as error:
        print(f"\nThe demo failed: {error}\nIts files are in {scratch}", file=sys.stderr)
        return 1
    say("What took how long")
    for what, seconds in times:
        print(f"   {what:<55} {f'{seconds * 1000:9.1f} ms' if seconds else ''}")
    say("Go on by hand")
    print(f"""   {BIN}/freezeframe image busybox disk.raw
   {BIN}/freezeframe kernel                # prints where kernel and initramfs are
   {BIN}/cloud-hypervisor --api-socket /tmp/ch.sock --cpus boot=4 --memory size=4G --kernel KERNEL --initramfs INITRAMFS \\
       --cmdline "root=/dev/vda1 console=hvc0 rw" --disk path=disk.raw
   {BIN}/ch-remote --api-socket=/tmp/ch.sock pause       # then: snapshot file:///some/empty/directory
   {BIN}/cloud-hypervisor --api-socket /tmp/ch2.sock --restore source_url=file:///some/empty/directory""")
    shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
