"""Guests at random moments, run the same twice: on both tiers, with random seeds, stopped at random counts.

    python fuzz/same_twice.py [--count N] [--seed N] [--instructions N] [SNAPSHOT ...]

Each round takes a snapshot (one that is given, or of a tiny guest that has not begun),
runs it on the interpreter at one go and on the translator with random stops, and compares everything. The first
difference ends it, with what `prove` finds about it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from freezeframe.cli.prove_cmd import report
from freezeframe.machine import build_for_boot
from freezeframe.proof import prove, replay
from freezeframe.store import write_snapshot
from freezeframe.testing import guests
from freezeframe.testing.tiny import configured

KINDS = {
    "tick": (lambda: guests.tick(size=0x8000), 1),
    "entropy": (guests.entropy, 1),
    "paging": (guests.paging, 1),
    "timers": (guests.timers, 1),
    "smp-2": (lambda: guests.smp(2), 2),
    "smp-3-deadline": (lambda: guests.smp(3, x2apic=True, deadline=True), 3),
    "smp-8": (lambda: guests.smp(8, period=50_000), 8),
    "virtio": (guests.virtio, 1),
}


def frozen(work: Path, name: str) -> Path:
    """A snapshot of a guest that has not begun."""
    image, cpus = KINDS[name]
    disk = work / "disk.raw"
    disk.write_bytes(bytes(range(256)) * 1024)
    directory = work / "snapshot"
    directory.mkdir()
    config = configured(work, image(), cpus, disk=str(disk) if name == "virtio" else None)
    with build_for_boot(config, engine="software") as machine:
        plain = machine.config.to_plain()
        write_snapshot(str(directory), config=plain, state=machine.save(), memory=machine.memory, engine="software")
    return directory


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--instructions", type=int, default=5_000_000)
    arguments.add_argument("snapshots", nargs="*", type=Path)
    options = arguments.parse_args()
    dice = random.Random(options.seed)
    began, executed = time.monotonic(), 0
    for number in range(options.count):
        with tempfile.TemporaryDirectory() as name:
            what = dice.choice([*options.snapshots] or [*KINDS])
            snapshot = what if isinstance(what, Path) else frozen(Path(name), what)
            seed, length = dice.randrange(1 << 64), dice.randrange(1, options.instructions)
            stops = sorted(dice.sample(range(length), min(length, dice.choice((0, 3, 100)))))
            with replay(snapshot, seed=seed, tier="interpreter") as run:
                run.run_to(length)
                wanted, ended = run.digests(), run.ended
            with replay(snapshot, seed=seed, tier="translator") as run:
                for stop in stops:
                    run.run_to(stop)
                    if dice.random() < 0.1:
                        run.digests()
                run.run_to(length)
                executed += 2 * run.instructions
                if (run.digests(), run.ended) != (wanted, ended):
                    print(f"round {number}: {what}, seed {seed}, {length} instructions, stops {stops}: DIFFERENT")
                    print(report(prove(snapshot, length, seed=seed)))
                    raise SystemExit(1)
    print(f"{options.count} rounds, {executed} instructions, {time.monotonic() - began:.0f} s: all the same")


if __name__ == "__main__":
    main()
