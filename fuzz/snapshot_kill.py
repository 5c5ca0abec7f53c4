"""SIGKILL at random moments of real snapshots: whatever the directory then holds is judged by a restore.

    python fuzz/snapshot_kill.py [--count N] [--seed N]

Each round restores a machine in a VMM process of its own, asks it for a snapshot and kills it after a random time
between nothing and a little more than an undisturbed snapshot takes. `tests/conformance/test_snapshot_kill.py` kills
at every system call instead, and always the same way.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

from freezeframe.errors import FreezeframeError, NotFound
from freezeframe.store import SnapshotReader
from freezeframe.testing.guests import tick
from freezeframe.testing.process import Vmm, installed


def restored(source: Path, socket: Path) -> Vmm:
    vmm = Vmm(["--restore", f"source_url=file://{source}"], socket=socket)
    vmm.wait_ready()
    return vmm


def judge(directory: Path) -> str:
    """`nothing`, `refused: …` or `whole`; a whole one has every byte verified."""
    names = sorted(os.listdir(directory))
    try:
        with SnapshotReader.open(directory) as reader:
            reader.open_memory("copy")
    except NotFound:
        if names:
            raise AssertionError(f"nothing there, but {names}") from None
        return "nothing"
    except FreezeframeError as error:
        return f"refused: {type(error).__name__} with {', '.join(names)}"
    return "whole"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=50)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    dice = random.Random(options.seed)
    seen: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "tick.elf").write_bytes(tick(size=64 << 20))
        source = work / "source"
        source.mkdir()
        machine = ["--kernel", str(work / "tick.elf"), "--memory", "size=256M", "--console", "off", "--serial", "tty"]
        with Vmm(machine, socket=work / "s.sock") as vmm:
            vmm.console.expect(r"^T 1$")
            vmm.remote("pause")
            vmm.remote("snapshot", f"file://{source}")
        (work / "timing").mkdir()
        with restored(source, work / "s.sock") as vmm:
            start = time.monotonic()
            vmm.remote("snapshot", f"file://{work}/timing")
            whole = time.monotonic() - start
        for number in range(options.count):
            target = work / str(number)
            target.mkdir()
            with restored(source, work / "s.sock") as vmm:
                command = [installed("ch-remote"), f"--api-socket={vmm.socket}", "snapshot", f"file://{target}"]
                asked = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                time.sleep(dice.random() * whole * 1.3)
                vmm.kill()
                returned = asked.wait() == 0
            verdict = judge(target)
            if returned and verdict != "whole":
                raise AssertionError(f"the snapshot was reported done, but: {verdict}")
            seen[verdict] += 1
            for file in target.iterdir():
                file.unlink()
    for verdict, count in seen.most_common():
        print(f"{count:5}  {verdict}")


if __name__ == "__main__":
    main()
