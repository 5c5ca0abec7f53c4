"""Whether `freezeframe-tiers` finds faults: plants some in a copy of the engine, looks for one after the other.

Run it from a checkout with a Rust toolchain: `python fuzz/planted.py [--seconds 60] [--target DIR] [NUMBER...]`. The
faults are in `planted.txt`. One build holds all of them; the environment variable PLANTED chooses. A text that is not
found exactly once ends the script: the code has moved on, and so must the list. Exit status 1: a fault was not found,
or the engine without one differs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CHOICE = """
/// Which fault this copy has.
pub fn planted(n: u32) -> bool {
    static CHOSEN: std::sync::LazyLock<u32> =
        std::sync::LazyLock::new(|| std::env::var("PLANTED").ok().and_then(|n| n.parse().ok()).unwrap_or(0));
    *CHOSEN == n
}
"""


class Fault(NamedTuple):
    what: str
    file: str
    was: str
    now: str


def read(text: str) -> list[Fault]:
    """The faults of `planted.txt`."""
    faults = []
    for part in text.split("\n\n")[1:]:
        what, file, *lines = part.strip("\n").split("\n")
        was, now = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        faults.append(Fault(what, file, was, now))
    return faults


def plant(tree: Path, faults: list[Fault]) -> None:
    """Puts all faults into the copy at `tree`."""
    source = tree / "rust/x86/src"
    with (source / "lib.rs").open("a") as lib:
        lib.write(CHOICE)
    for number, fault in enumerate(faults, 1):
        path = source / fault.file
        text = path.read_text()
        if text.count(fault.was) != 1:
            sys.exit(f"fault {number} ({fault.what}): its lines are {text.count(fault.was)} times in {fault.file}")
        now = re.sub(r"\bYES\b", f"crate::planted({number})", fault.now)
        path.write_text(text.replace(fault.was, re.sub(r"\bNO\b", f"!crate::planted({number})", now)))


def build(tree: Path, target: Path, faults: list[Fault]) -> Path:
    """The program, with all faults."""
    for name in ("Cargo.toml", "Cargo.lock"):
        shutil.copy(ROOT / name, tree / name)
    shutil.copytree(ROOT / "rust", tree / "rust", ignore=shutil.ignore_patterns("target"))
    plant(tree, faults)
    command = ["cargo", "build", "--release", "-p", "freezeframe-diff", "--bin", "freezeframe-tiers"]
    subprocess.run([*command, "--target-dir", str(target)], cwd=tree, check=True)
    return target / "release/freezeframe-tiers"


def look(program: Path, number: int, seconds: int, seed: int) -> str | None:
    """How the fault was found; `None`: not at all."""
    began = monotonic()
    command = [program, "--seconds", str(seconds), "--examples", "1", "--seed", str(seed)]
    environment = os.environ | {"PLANTED": str(number)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=seconds + 30
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    case = re.search(r"seed \d+ case (\d+)", done.stdout)
    how = f"case {case[1]}" if case else f"status {done.returncode}"
    return f"{how}, {monotonic() - began:.1f} s"


def main() -> int:
    """Looks for each fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=int, default=60, help="how long to look for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", type=Path, help="where cargo builds (default: a directory that goes with the copy)")
    parser.add_argument("numbers", nargs="*", type=int, help="which faults (default: all, and none)")
    arguments = parser.parse_args()
    faults = read((ROOT / "fuzz/planted.txt").read_text())
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        program = build(tree, arguments.target or tree / "target", faults)
        for number in arguments.numbers or range(len(faults) + 1):
            what = faults[number - 1].what if number else "no fault"
            found = look(program, number, arguments.seconds, arguments.seed)
            bad += (found is None) == bool(number)
            sys.stdout.write(f"{number:2} {what}: {found or 'nothing found'}\n")
            sys.stdout.flush()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
