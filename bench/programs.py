"""`python -m bench.programs`: programs in a booted guest, ours beside QEMU's TCG, alternating in the same run.

Three groups, in order of weight: programs that fork, start others and make system calls; programs that compute with integers
(compression, hashing, awk, Python); floating-point ones (SSE and x87). A fourth, two programs that compute at the same time, is run when
it is asked for (`parallel --cpus 2`). Each round boots Debian's cloud kernel (or --kernel) on a fresh copy of one busybox disk, on one VMM
and then on the other, and runs every program once, after a warm-up of the files. Time is taken three times: by the guest's own clock, on
the host between the arrivals of two lines on the console, and as CPU time of the VMM's threads between them, which says most on a machine
that does other things as well. A group's time is the sum of its rows.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.ours import DEADLINE_S, Ours
from bench.qemu import Qemu

SOURCES = Path(__file__).parent / "guest"
PROMPT = r"guest:[^#]*# "
AIM = 0.7
DISK_SIZE = 256 << 20
TEXT = "/tmp/text"


@dataclass(frozen=True, slots=True)
class Program:
    """A row: what is typed at the guest's shell behind `/bench/run NAME`."""

    group: str
    name: str
    command: str


PROGRAMS = (
    Program("calls", "exec", "/bench/calls exec 600"),
    Program("calls", "shell", "/bench/shell.sh 60"),
    Program("calls", "fork", "/bench/calls fork 1000"),
    Program("calls", "pipe", "/bench/calls pipe 15000"),
    Program("calls", "files", "/bench/calls files 40000"),
    Program("calls", "pages", "/bench/calls pages 3000"),
    Program("integer", "gzip", f"busybox gzip -c {TEXT}"),
    Program("integer", "sha256sum", f"busybox sha256sum {TEXT} {TEXT} {TEXT} {TEXT}"),
    Program("integer", "awk", "busybox awk '{ for (n = 1; n <= NF; n++) count[$n]++ } END { for (w in count) print w, count[w] }' /tmp/part"),
    Program("integer", "python", "python3 -S -E /bench/interpreted.py 24"),
    Program("floating", "bodies", "/bench/floating bodies 500000"),
    Program("floating", "matrix", "/bench/floating matrix 120"),
    Program("floating", "set", "/bench/floating set 100"),
    Program("floating", "long", "/bench/floating long 16000"),
    Program("parallel", "two", f"sh -c 'busybox gzip -c {TEXT} & busybox gzip -c {TEXT}; wait'"),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(program.group for program in PROGRAMS))

# Everything that a program reads lies in memory before the clock starts.
WARM_UP = f"/bench/text 8 >{TEXT}; head -c 1500000 {TEXT} >/tmp/part; cat /bench/* /usr/bin/python3 >/dev/null; python3 -S -E /bench/interpreted.py 0"

Triple = tuple[float, float, float]
"""Seconds by the guest's clock, by the host's, and of CPU time."""
Times = dict[tuple[str, str], list[Triple]]
"""(program, side) → one a round."""


def _cpu_time(pid: int) -> float:
    """Seconds that the living threads of a process have run (fs/proc/base.c: the first field of schedstat is ns)."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _compile(work: Path) -> dict[str, bytes]:
    """Our C programs, static, so that both VMMs run the very same instructions."""
    files = {}
    for source in sorted(SOURCES.glob("*.c")):
        out = work / source.stem
        command = ["gcc", "-O2", "-static", "-o", str(out), str(source), "-lm"]
        subprocess.run(command, check=True)
        files[f"bench/{source.stem}"] = out.read_bytes()
    for name in ("shell.sh", "interpreted.py"):
        files[f"bench/{name}"] = (SOURCES / name).read_bytes()
    return files


def _python(work: Path) -> dict[str, bytes]:
    """Debian's smallest Python with the libraries that it needs."""
    from freezeframe.images.debian import dependency, package, unpack

    minimal = dependency("python3-minimal", "python3.")
    name = minimal.removesuffix("-minimal")
    tree = work / "python"
    for deb in (minimal, f"lib{name}-minimal", "libc6", "libexpat1", "zlib1g"):
        unpack(package(deb), tree)
    files = {}
    for path in (tree / "usr" / "lib" / name).rglob("*"):
        if path.is_file():
            files[str(path.relative_to(tree))] = path.read_bytes()
    files["usr/bin/python3"] = (tree / "usr" / "bin" / name).read_bytes()
    for library in ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "ld-linux-x86-64.so.2"):
        found = next(iter(sorted(tree.rglob(library))), None)
        if found is None:
            raise SystemExit(f"bench: Debian's packages have no {library}")
        where = "lib64" if library.startswith("ld-") else "lib/x86_64-linux-gnu"
        files[f"{where}/{library}"] = found.read_bytes()
    return files


def one_boot(
    side_class: type[Ours] | type[Qemu], scratch: Path, args: argparse.Namespace, guest: tuple[Path, Path, Path]
) -> list[tuple[str, Triple]]:
    """Runs every chosen program in a fresh guest."""
    kernel, initramfs, master = guest
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        disk = Path(name, "disk.raw")
        shutil.copy(master, disk)
        side = side_class(Path(name), args.cpus, args.memory, kernel, initramfs, "root=/dev/vda1 rw", disk)
        vmm = side.boot()
        found = []
        try:
            vmm.console.expect(PROMPT, 0, DEADLINE_S)
            here = vmm.console.mark()
            vmm.send(f"{WARM_UP}; echo warmed'-'up")
            vmm.console.expect("warmed-up", here, DEADLINE_S)
            for program in args.programs:
                here = vmm.console.mark()
                vmm.send(f"/bench/run {program.name} {program.command}")
                began = vmm.console.expect(f"^=begin {program.name}=", here, DEADLINE_S)
                cpu = _cpu_time(vmm.process.pid)
                ended = vmm.console.expect(rf"^=end {program.name} (\d+) ns, status (-?\d+)=", began.end(), DEADLINE_S)
                if ended[2] != "0":
                    raise SystemExit(f"bench: {program.command} ended with status {ended[2]} on {side.name}")
                cpu = _cpu_time(vmm.process.pid) - cpu
                host = vmm.console.arrived(ended.end()) - vmm.console.arrived(began.end())
                found.append((program.name, (int(ended[1]) / 1e9, host, cpu)))
                cells = " ".join(f"{value:9.3f}" for value in found[-1][1])
                print(f"  {side.name:<12} {program.name:<10} {cells}", file=sys.stderr, flush=True)
        finally:
            vmm.kill()
    return found


def _median(times: Times, names: Sequence[str], side: str, which: int) -> float:
    """Median over the rounds of the sum of these programs."""
    rounds = zip(*(times.get((name, side), []) for name in names), strict=True)
    sums = [sum(triple[which] for triple in one) for one in rounds]
    return statistics.median(sums) if sums else float("nan")


def table(times: Times, chosen: Sequence[Program]) -> str:
    """Rows of programs, and in bold the groups: ours / QEMU's = ratio."""
    lines = ["| program | guest's clock [s] | host's clock [s] | CPU time [s] |", "|---|---|---|---|"]
    for group in GROUPS:
        names = [program.name for program in chosen if program.group == group]
        rows = [(name, [name]) for name in names] + ([(f"**{group}**", names)] if names else [])
        for label, members in rows:
            pairs = [[_median(times, members, side.name, which) for side in (Ours, Qemu)] for which in range(3)]
            cells = [f"{ours:.2f} / {theirs:.2f} = **{ours / theirs:.2f}**" for ours, theirs in pairs]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _chosen(words: Sequence[str]) -> list[Program]:
    unknown = set(words) - {p.name for p in PROGRAMS} - set(GROUPS)
    if unknown:
        raise SystemExit(f"bench: no program or group {', '.join(sorted(unknown))}")
    return [p for p in PROGRAMS if p.name in words or p.group in words or (not words and p.group != "parallel")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.programs", description=__doc__)
    parser.add_argument(
        "programs",
        nargs="*",
        help=f"programs or groups (default: all): {', '.join([*GROUPS, *(p.name for p in PROGRAMS)])}",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--memory", default="512M")
    parser.add_argument(
        "--kernel", type=Path, help="a bzImage, with what it needs in --initramfs (default: Debian's cloud kernel)"
    )
    parser.add_argument("--initramfs", type=Path)
    parser.add_argument("--no-qemu", action="store_true")
    parser.add_argument("--no-ours", action="store_true")
    args = parser.parse_args()
    args.programs = _chosen(args.programs)
    for tool in ("gcc", *([] if args.no_qemu else ["qemu-system-x86_64"])):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is missing (Debian's packages gcc and qemu-system-x86)")
    from freezeframe.images import build_busybox_disk, cloud_kernel

    times: Times = {}
    sides: list[type[Ours] | type[Qemu]] = [*([] if args.no_ours else [Ours]), *([] if args.no_qemu else [Qemu])]
    with tempfile.TemporaryDirectory(prefix="freezeframe-bench-") as name:
        scratch = Path(name)
        disk = scratch / "master.raw"
        build_busybox_disk(disk, size=DISK_SIZE, extra=_compile(scratch) | _python(scratch))
        stock = cloud_kernel()
        guest = (args.kernel or stock.kernel, args.initramfs or stock.initramfs, disk)
        for number in range(args.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                for program, taken in one_boot(side, scratch, args, guest):
                    times.setdefault((program, side.name), []).append(taken)
    uname = subprocess.run(["uname", "-srm"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{args.rounds} rounds, {args.cpus} vCPU, host {uname}; the aim is {AIM} for each group\n")
    print(table(times, args.programs))


if __name__ == "__main__":
    main()
