"""`make bench`: one table, ours beside QEMU's TCG, alternating in the same run.

Rows: boot to userland (1 and 4 vCPUs), pause, snapshot (both synced to disk) and its bytes, exec → restored and paused, resume →
the guest's next output, resident memory before resume. The guest is the same for both: Debian's cloud kernel (or --kernel) and a busybox disk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.ours import DEADLINE_S, Ours
from bench.qemu import Qemu
from freezeframe.testing.process import Vmm

UP = r"freezeframe guest is up"
PROMPT = r"guest:[^#]*# "
AIMS = {"boot": 1.5, "pause": 2.0, "snapshot": 1.0, "exec to restored": 0.3}
Results = dict[str, dict[str, list[float]]]


def note(results: Results, row: str, who: str, value: float) -> None:
    results.setdefault(row, {}).setdefault(who, []).append(value)
    print(f"  {who:<12} {row:<32} {value:12.4f}", file=sys.stderr, flush=True)


def arrival(vmm: Vmm, pattern: str, since: int = 0) -> float:
    """When the end of `pattern` was printed."""
    return vmm.console.arrived(vmm.console.expect(pattern, since, DEADLINE_S).end())


def stored_bytes(path: Path) -> int:
    """Bytes that a file or the files of a directory take on disk."""
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_blocks * 512 for file in files)


def trip(
    vmm_class: type[Ours] | type[Qemu],
    results: Results,
    scratch: Path,
    args: argparse.Namespace,
    cpus: int,
    guest: tuple[Path, Path, Path],
) -> None:
    """One whole trip on a fresh copy of the disk."""
    kernel, initramfs, master = guest
    work = Path(tempfile.mkdtemp(dir=scratch))
    disk = work / "disk.raw"
    shutil.copy(master, disk)
    side = vmm_class(work, cpus, args.memory, kernel, initramfs, "root=/dev/vda1 rw", disk)
    who = side.name
    vmm = side.boot()
    try:
        note(results, f"boot, {cpus} vCPU [s]", who, arrival(vmm, UP) - vmm.started)
        vmm.console.expect(PROMPT)
        here = vmm.console.mark()
        vmm.send("while :; do echo tick; usleep 1000; done")
        vmm.console.expect(r"(tick\n){20}", here)
        note(results, f"pause, {cpus} vCPU [ms]", who, side.pause() * 1e3)
        saved = work / "saved"
        note(results, f"snapshot, {cpus} vCPU [ms]", who, side.snapshot(saved) * 1e3)
        note(results, f"snapshot bytes, {cpus} vCPU [MiB]", who, stored_bytes(saved) / 2**20)
        note(results, f"resident at snapshot, {cpus} vCPU [MiB]", who, vmm.resident() / 2**20)
    finally:
        vmm.kill()
    vmm, took = side.restore(saved)
    try:
        note(results, f"exec to restored, {cpus} vCPU [ms]", who, took * 1e3)
        note(results, f"resident before resume, {cpus} vCPU [MiB]", who, vmm.resident() / 2**20)
        here = vmm.console.mark()
        began = time.monotonic()
        side.resume()
        note(results, f"resume to output, {cpus} vCPU [ms]", who, (arrival(vmm, "tick", here) - began) * 1e3)
    finally:
        vmm.kill()
    shutil.rmtree(work)


def table(results: Results) -> str:
    lines = [
        "| row | freezeframe min / median / max | QEMU TCG min / median / max | ratio of medians |",
        "|---|---|---|---|",
    ]
    for row, sides in results.items():
        cells = [
            f"{min(v):.2f} / **{statistics.median(v):.2f}** / {max(v):.2f}" if (v := sides.get(who)) else "–"
            for who in (Ours.name, Qemu.name)
        ]
        ours, theirs = sides.get(Ours.name), sides.get(Qemu.name)
        ratio = f"{statistics.median(ours) / statistics.median(theirs):.2f}" if ours and theirs else "–"
        lines.append(f"| {row} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--memory", default="4G")
    parser.add_argument(
        "--kernel",
        type=Path,
        help="a bzImage with virtio built in or modules in --initramfs (default: Debian's cloud kernel)",
    )
    parser.add_argument("--initramfs", type=Path)
    parser.add_argument("--no-qemu", action="store_true")
    args = parser.parse_args()
    if not args.no_qemu and shutil.which("qemu-system-x86_64") is None:
        parser.error("qemu-system-x86_64 is missing (apt-get install qemu-system-x86), or say --no-qemu")
    from freezeframe.images import build_busybox_disk, cloud_kernel

    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="freezeframe-bench-") as name:
        scratch = Path(name)
        disk = scratch / "master.raw"
        build_busybox_disk(disk)
        stock = cloud_kernel()
        guest = (args.kernel or stock.kernel, args.initramfs or stock.initramfs, disk)
        for number in range(args.rounds):
            for cpus in args.cpus:
                sides: list[type[Ours] | type[Qemu]] = [Ours] if args.no_qemu else [Ours, Qemu]
                for side in sides if number % 2 == 0 else reversed(sides):
                    trip(side, results, scratch, args, cpus, guest)
    uname = subprocess.run(["uname", "-srm"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{args.rounds} rounds, {args.memory}, host {uname}\n\n{table(results)}")


if __name__ == "__main__":
    main()
