"""The whole trip with a stock Linux guest: boot, pause, snapshot, kill, restore, resume, and proof that it is the same machine.

Run by `make demo`. Every step is the command line that a user would type; nothing here reaches into the package but
for making the guest's kernel and disk.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
BOOT_DEADLINE_S = 600
STEP_DEADLINE_S = 120


class DemoFailed(Exception):
    """A step did not do what it should."""


class Console:
    """The guest's console on a VMM's stdin and stdout: everything that was printed, and waiting for text in it."""

    def __init__(self, process: subprocess.Popen[bytes], *, show: bool) -> None:
        self._process = process
        self._show = show
        self._text = ""
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := os.read(self._process.stdout.fileno(), 65536):
            text = chunk.decode(errors="replace").replace("\r", "")
            if self._show:
                sys.stdout.write(text)
                sys.stdout.flush()
            with self._changed:
                self._text += text
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        with self._changed:
            return self._text

    def mark(self) -> int:
        """Where the output ends now: pass it to `expect` to look only at what comes later."""
        return len(self.text)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, pattern: str, since: int = 0, deadline_s: float = STEP_DEADLINE_S) -> re.Match[str]:
        """Waits until `pattern` appears after position `since`."""
        end = time.monotonic() + deadline_s
        with self._changed:
            while True:
                found = re.compile(pattern, re.MULTILINE).search(self._text, since)
                if found:
                    return found
                left = end - time.monotonic()
                if self._ended or left <= 0:
                    why = "the VMM ended" if self._ended else f"{deadline_s:.0f} s passed"
                    raise DemoFailed(f"{why} while waiting for {pattern!r}; the console's end:\n{self._text[-2000:]}")
                self._changed.wait(left)


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def command(*argv: str) -> str:
    """Runs one of our commands the way a user does; shows the line."""
    print("$ " + " ".join(argv), flush=True)
    done = subprocess.run([str(BIN / argv[0]), *argv[1:]], capture_output=True, text=True, timeout=STEP_DEADLINE_S, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"{argv[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def start(*argv: str, show: bool) -> tuple[subprocess.Popen[bytes], Console]:
    print("$ " + " ".join(argv) + " &", flush=True)
    process = subprocess.Popen([str(BIN / argv[0]), *argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, Console(process, show=show)


def wait_for_socket(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the VMM answers (a restore is done when it does)."""
    end = time.monotonic() + STEP_DEADLINE_S
    while subprocess.run([str(BIN / "ch-remote"), f"--api-socket={path}", "info"], capture_output=True, check=False).returncode:
        if process.poll() is not None or time.monotonic() > end:
            raise DemoFailed(f"the VMM did not answer on {path} (exit status {process.poll()})")


def timed(times: list[tuple[str, float]], what: str, step: Callable[[], object]) -> None:
    began = time.monotonic()
    step()
    times.append((what, time.monotonic() - began))


# One shell function in the guest: everything that has to survive, on one line. The secret lives in a shell variable, so in
# guest RAM only; fd 9 is an unlinked file, so it exists only as long as the process that holds it open.
PREPARE = (
    "SECRET=$(head -c 16 /dev/urandom | md5sum | cut -c1-32); echo $SECRET > /tmp/open; exec 9</tmp/open; rm /tmp/open; "
    "(i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done) & "
    "LOOP=$!; proof() { echo \"PROOF secret=$SECRET shell=$$ loop=$LOOP alive=$(kill -0 $LOOP && echo yes) "
    "fd9=$(readlink /proc/$$/fd/9 | tr ' ' _) boot_id=$(cat /proc/sys/kernel/random/boot_id)\"; }"
)
PROOF = r"^PROOF (secret=\w{32} .*boot_id=\S+)"


def ticks(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"^tick (\d+)$", text, re.MULTILINE)]


def run(scratch: Path) -> list[tuple[str, float]]:
    # Imported late: the package may be several versions away from this script's user.
    from freezeframe.images import build_busybox_disk, cloud_kernel

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
    vmm, console = start(
        "cloud-hypervisor", "--api-socket", str(socket), "--cpus", "boot=4", "--memory", "size=4G",
        "--kernel", str(guest.kernel), "--initramfs", str(guest.initramfs),
        "--cmdline", "root=/dev/vda1 console=hvc0 rw", "--disk", f"path={disk}", show=True,
    )  # fmt: skip
    try:
        console.expect(r"freezeframe guest is up", deadline_s=BOOT_DEADLINE_S)
        times.append(("boot to userland (4 vCPUs, software or KVM)", time.monotonic() - began))
        console.expect(r"guest:\S*# ")
        console.send(PREPARE)
        console.expect(r"^tick 5$")
        here = console.mark()
        console.send("proof")
        before = console.expect(PROOF, here).group(1)

        say("Pause, snapshot, look, and kill the VMM with SIGKILL")
        snapshot.mkdir()
        timed(times, "ch-remote pause", lambda: command(*remote, "pause"))
        timed(times, "ch-remote snapshot (synced to disk)", lambda: command(*remote, "snapshot", f"file://{snapshot}"))
    finally:
        vmm.send_signal(signal.SIGKILL)
        vmm.wait()
    print(f"$ ls -l {snapshot}")
    print(subprocess.run(["ls", "-l", str(snapshot)], capture_output=True, text=True, check=True).stdout, end="")
    stored = sum(path.stat().st_blocks * 512 for path in snapshot.iterdir())
    last_tick = ticks(console.text)[-1]

    say("Restore it in a new VMM, and resume")
    began = time.monotonic()
    vmm, console = start("cloud-hypervisor", "--api-socket", str(socket), "--restore", f"source_url=file://{snapshot}", show=False)
    try:
        wait_for_socket(socket, vmm)
        times.append(("restore: new process → paused machine", time.monotonic() - began))
        timed(times, "ch-remote resume", lambda: command(*remote, "resume"))
        began = time.monotonic()
        console.expect(r"^tick \d+$")
        times.append(("resume → the guest's next output", time.monotonic() - began))
        console.send("proof")
        after = console.expect(PROOF).group(1)
        seen = ticks(console.text)

        say("Is it the same machine?")
        print(f"   before: {before}\n   after:  {after}")
        print(f"   counter: last tick before {last_tick}, then {seen[:4]} …")
        if before != after:
            raise DemoFailed("the machine's secrets, processes or open file changed")
        if seen != list(range(seen[0], seen[0] + len(seen))) or seen[0] not in (last_tick, last_tick + 1, last_tick + 2):
            raise DemoFailed("the counter was interrupted")
        print("   yes: a random number held only in guest RAM, process ids, an open deleted file and an uninterrupted counter")

        say("Switch it off from inside")
        console.send("kill $LOOP; poweroff")
        status = vmm.wait(STEP_DEADLINE_S)
        if status != 0:
            raise DemoFailed(f"the VMM ended with {status} after the guest's power-off")
    finally:
        vmm.kill()
        vmm.wait()
    times.append((f"(the snapshot takes {stored / 2**20:.0f} MiB on disk for a 4 GiB guest)", 0))
    return times


def main() -> int:
    scratch = Path(tempfile.mkdtemp(prefix="freezeframe-demo-"))
    try:
        times = run(scratch)
    except (DemoFailed, subprocess.TimeoutExpired) as error:
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
