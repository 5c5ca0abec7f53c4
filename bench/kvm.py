"""`python -m bench.kvm`: pause, snapshot, restore, resume and cold start on the KVM engine, beside other VMMs' quoted figures.

The guest is a tiny one of our own (`testing.guests.beat`): it touches 64 MiB and then prints a line at each interrupt of a
1 kHz timer; with 4 vCPUs the other three are started and stand. Nothing of this needs a KVM that can run Linux. Each
round is one whole trip with new processes: boot, pause, snapshot (to `--directory`, synced; and to /dev/shm), resume, restore
(until `vm.info` says Paused, asked again as soon as it has answered), resume until the guest's next line, and a restore with
`resume=true` from exec to the guest's next line. Milliseconds throughout, min / **median** / max.

    python -m bench.kvm                      prints the table
    python -m bench.kvm --record             and puts it into docs/measurements.md
    python -m bench.kvm --engine software    the same trip on the software engine

Wants a quiet machine; takes about a minute on one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.ours import Control
from freezeframe import _core
from freezeframe.testing.guests import beat
from freezeframe.testing.process import Vmm

TOUCHED_MIB = 64
SHAPES = [(1, "512M"), (4, "512M"), (1, "4G"), (4, "4G")]
TMPFS = Path("/dev/shm")
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "measurements.md"
HEADING = "## KVM engine, with a tiny guest"

COLD = "cold: exec → first output"
PAUSE = "pause, raw HTTP"
RESUME = "resume, raw HTTP"
SNAPSHOT = "snapshot → disk, synced"
SNAPSHOT_TMPFS = "snapshot → tmpfs"
RESTORE = "restore: exec → Paused"
NEXT = "resume → next output"
RESTORE_RUN = "restore, `resume=true`: exec → next output"
RESIDENT = "resident after that [MiB]"

# Medians for SHAPES in order, as measured once on a host of this kind with guests of this kind; another run, another day: for their order
# of magnitude only. Cloud Hypervisor 53.0: 64 MiB dirtied, snapshots to ext4 without fsync, restore mode `ondemand`.
# Firecracker 1.16.1: 32 MiB touched, full snapshots to tmpfs, "restore" until its load call has returned.
QUOTED: dict[str, dict[str, tuple[float, ...]]] = {
    COLD: {"Cloud Hypervisor": (7.1, 7.9, 10.7, 13.9), "Firecracker": (8.6, 9.3, 9.4, 9.1)},
    PAUSE: {"Cloud Hypervisor": (1.4, 1.5, 1.4, 1.4), "Firecracker": (0.26, 0.44, 0.26, 0.32)},
    RESUME: {"Cloud Hypervisor": (1.4, 1.5, 1.4, 1.4)},
    SNAPSHOT: {"Cloud Hypervisor": (153, 133, 6518, 3111)},
    SNAPSHOT_TMPFS: {"Firecracker": (505, 526, 4039, 4168)},
    RESTORE: {"Cloud Hypervisor": (9.8, 12.8, 14.8, 13.9), "Firecracker": (8.1, 13.1, 11.9, 12.7)},
    RESTORE_RUN: {"Cloud Hypervisor": (10.1, 13.4, 12.7, 14.7), "Firecracker": (8.4, 13.4, 12.4, 13.1)},
    RESIDENT: {"Cloud Hypervisor": (11, 13, 13, 12), "Firecracker": (5.3, 5.4, 5.2, 5.4)},
}
Results = dict[str, list[list[float]]]


class Trip:
    """One machine through all of it; each figure goes to `note(row, milliseconds)`."""

    def __init__(self, work: Path, engine: str, kernel: Path, cpus: int, memory: str) -> None:
        self._work, self._engine, self._number = work, engine, 0
        self._boot = ["--kernel", str(kernel), "--cpus", f"boot={cpus}", "--memory", f"size={memory}"]

    def _start(self, *argv: str) -> tuple[Vmm, Control]:
        self._number += 1
        path = self._work / f"{self._number}.sock"
        return Vmm(["--engine", self._engine, *argv], socket=path), Control(path)

    @staticmethod
    def _timed(step: Callable[..., object], *arguments: object) -> float:
        began = time.monotonic()
        step(*arguments)
        return (time.monotonic() - began) * 1e3

    def run(self, note: Callable[[str, float], None], directory: Path) -> None:
        vmm, control = self._start(*self._boot, "--serial", "tty", "--console", "off")
        with vmm:
            note(COLD, (vmm.console.arrived(vmm.console.expect(r"^UP$").end()) - vmm.started) * 1e3)
            vmm.console.expect(r"READY\n(T\n){20}")
            note(PAUSE, self._timed(control.pause))
            note(RESUME, self._timed(control.resume))
            here = vmm.console.mark()
            vmm.console.expect(r"(T\n){20}", here)
            control.pause()
            with tempfile.TemporaryDirectory(dir=TMPFS) as name:
                note(SNAPSHOT_TMPFS, self._timed(control.snapshot, Path(name)))
            note(SNAPSHOT, self._timed(control.snapshot, directory))
        source = f"source_url=file://{directory}"
        vmm, control = self._start("--restore", source)
        with vmm:
            control.wait_paused(vmm)
            note(RESTORE, (time.monotonic() - vmm.started) * 1e3)
            here, began = vmm.console.mark(), time.monotonic()
            control.resume()
            note(NEXT, (vmm.console.arrived(vmm.console.expect("T\n", here).end()) - began) * 1e3)
        vmm, control = self._start("--restore", f"{source},resume=true")
        with vmm:
            note(RESTORE_RUN, (vmm.console.arrived(vmm.console.expect("T\n").end()) - vmm.started) * 1e3)
            note(RESIDENT, vmm.resident() / 2**20)


def cell(values: list[float]) -> str:
    digits = 1 if statistics.median(values) >= 2 else 2
    return f"{min(values):.{digits}f} / **{statistics.median(values):.{digits}f}** / {max(values):.{digits}f}"


def table(results: Results) -> str:
    lines = [
        f"| | | {' | '.join(f'{cpus} vCPU {memory}' for cpus, memory in SHAPES)} |",
        "|---|---|" + "---|" * len(SHAPES),
    ]
    for row, shapes in results.items():
        lines.append(f"| {row} | freezeframe | {' | '.join(cell(values) for values in shapes)} |")
        for who, medians in QUOTED.get(row, {}).items():
            lines.append(f"| | *{who}* | {' | '.join(f'*{median:g}*' for median in medians)} |")
    return "\n".join(lines)


def section(results: Results, rounds: int, engine: str) -> str:
    _runs, why, *_ = _core.kvm_probe()
    return f"""{HEADING}
`python -m bench.kvm --record` puts this here: {rounds} rounds, engine {engine}, Linux {platform.release()}, {os.cpu_count()} CPUs, whose KVM was tried: {why}.
The guest touches {TOUCHED_MIB} MiB and prints at each interrupt of a 1 kHz timer. Milliseconds, min / **median** / max. In italics: medians *quoted* from another day on
a host of this kind, with guests of this kind (Cloud Hypervisor 53.0: snapshots not synced, restore `ondemand`; Firecracker 1.16.1: 32 MiB touched): for
their order of magnitude, not for a comparison in percent. Neither checks what it restores; here each chunk of memory is verified before the guest sees it.

{table(results)}
"""


def record(text: str) -> None:
    """Replaces the section of the document, or adds it at its end."""
    document = DOCUMENT.read_text()
    before, found, after = document.partition(HEADING)
    rest = after[after.index("\n## ") + 1 :] if found and "\n## " in after else ""
    DOCUMENT.write_text(before.rstrip() + "\n\n" + text + (f"\n{rest}" if rest else ""))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kvm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", default="kvm", choices=["kvm", "software"])
    parser.add_argument("--directory", type=Path, help="where disk snapshots go (default: the temporary directory)")
    parser.add_argument("--record", action="store_true", help="write the table into docs/measurements.md")
    args = parser.parse_args()
    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="freezeframe-bench-", dir=args.directory) as name:
        scratch = Path(name)
        for number in range(args.rounds):
            for index, (cpus, memory) in enumerate(SHAPES):
                kernel = scratch / f"beat-{cpus}"
                if not kernel.exists():
                    kernel.write_bytes(beat(cpus, size=TOUCHED_MIB << 20))
                work = scratch / f"{number}-{index}"
                work.mkdir()

                def note(row: str, value: float, index: int = index) -> None:
                    results.setdefault(row, [[] for _ in SHAPES])[index].append(value)

                Trip(work, args.engine, kernel, cpus, memory).run(note, _made(work / "snapshot"))
                shutil.rmtree(work)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    text = section(results, args.rounds, args.engine)
    print(text)
    if args.record:
        record(text)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


if __name__ == "__main__":
    main()
