"""Mutates configuration and state of a real `vm.json`, sealed again; a restore must refuse it properly or run.

    python fuzz/snapshot_state.py [--seed N] [--count N] [--resume]

What restores is thrown away, or with `--resume` runs for a moment first: a guest with odd registers may stop, but the
process must not. A finding prints its seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import Any

from snapshot_document import ODD, places, sealed

import freezeframe as ff
from freezeframe.errors import FreezeframeError
from freezeframe.testing.guests import smp, tick


def taken(work: Path, number: int) -> Path:
    """A snapshot of a small machine with a disk: one CPU that counts, or four that interrupt one another."""
    kernel = work / f"{number}.elf"
    kernel.write_bytes(tick() if number == 0 else smp(4))
    disk = work / f"{number}.raw"
    disk.write_bytes(bytes(1 << 20))
    source = work / f"source-{number}"
    with ff.boot(kernel=kernel, memory="32M", cpus=1 if number == 0 else 4, disks=[disk]) as vm:
        vm.serial.expect(r"T 2\n")
        vm.snapshot(source)
    return source


def mutate(document: dict[str, Any], dice: random.Random) -> str:
    """One change below `config` or `state`; says which."""
    part = dice.choice(("config", "state", "state", "state", "state"))
    container, key = dice.choice(places(document[part]))
    old = container[key]
    action = dice.randrange(6)
    if action == 0:
        del container[key]
        return f"{part}: {key!r} removed"
    if action == 1 and isinstance(container, dict):
        container["extra"] = dice.choice(ODD)
        return f"{part}: 'extra' beside {key!r}"
    if action == 2 and isinstance(container, list):
        container.append(old)
        return f"{part}: one more after {key!r}"
    if action <= 4 and isinstance(old, int) and not isinstance(old, bool):
        container[key] = (old ^ 1 << dice.randrange(64)) & 2**64 - 1
    else:
        container[key] = dice.choice(ODD)
    return f"{part}: {key!r}: {str(old)[:60]!r} -> {str(container[key])[:60]!r}"


def attempt(directory: Path, run: bool) -> str:
    """`refused`, or `ran`. Anything but a proper error comes out as it is."""
    try:
        vm = ff.restore(directory, resume=False, disk_check=False)
    except FreezeframeError as error:
        if not str(error):
            raise AssertionError("an error without a word") from error
        return "refused"
    try:
        if run:
            vm.resume()
            vm.serial.expect(r"T \d+\n", timeout=0.2)
    except FreezeframeError:
        pass
    finally:
        vm.kill()
    return "ran"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--count", type=int, default=1000)
    arguments.add_argument("--resume", action="store_true")
    arguments.add_argument("--accepted", action="store_true", help="say which changes were not refused")
    options = arguments.parse_args()
    seen: collections.Counter[str] = collections.Counter()
    findings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sources = [taken(work, 0), taken(work, 1)]
        originals = [json.loads((source / "vm.json").read_text()) for source in sources]
        target = work / "mutated"
        for seed in range(options.seed, options.seed + options.count):
            dice = random.Random(seed)
            number = dice.randrange(2)
            document = json.loads(json.dumps(originals[number]))
            what = mutate(document, dice)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            os.link(sources[number] / "memory-region-0", target / "memory-region-0")
            (target / "vm.json").write_bytes(sealed(document))
            try:
                verdict = attempt(target, options.resume)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                verdict = f"FINDING {type(error).__name__}: {str(error)[:200]}"
                if verdict not in findings:
                    findings[verdict] = f"seed {seed}: {what}\n{traceback.format_exc()}"
            seen[verdict] += 1
            if options.accepted and verdict == "ran":
                print(what)
    for finding in findings.values():
        print(finding)
    for verdict, count in seen.most_common():
        print(f"{count:6}  {verdict}")
    if findings:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
