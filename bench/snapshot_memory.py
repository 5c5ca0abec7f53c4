"""Guest memory to and from snapshot files, by chunk size: what `docs/design/memory.md` rests on.

    python bench/snapshot_memory.py [--directory DIR] [--runs N]

A machine of 4 GiB with 64 MiB in use, in three shapes: dense (one run), scattered (1024 runs of 64 KiB), pages (16384
single pages). Milliseconds, the best of N runs: the machine is shared, and the least disturbed run says most.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from functools import partial

from freezeframe import _core

REGIONS = [(0, 3 << 30), (4 << 30, 1 << 30)]
USED = 64 << 20
CHUNKS = (64 << 10, 256 << 10, 2 << 20)


def filled(shape: str) -> tuple[_core.Memory, list[int]]:
    """A machine and the addresses of its runs."""
    memory = _core.Memory(REGIONS)
    run = {"dense": USED, "scattered": 64 << 10, "pages": 4096}[shape]
    order = random.Random(4)
    slots = order.sample(range((3 << 30) // run), USED // run)
    data = order.randbytes(run)
    for slot in slots:
        memory.write(slot * run, data)
    return memory, [slot * run for slot in slots]


def timed(work, runs: int, after=lambda _: None) -> float:
    """`after` is not timed: to delete a file of many extents takes longer than to write it."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        made = work()
        best = min(best, time.perf_counter() - start)
        after(made)
    return best * 1000


def write(memory: _core.Memory, directory: str, chunk: int, sync: bool, threads: int) -> list[tuple]:
    images = []
    for index, (address, size) in enumerate(memory.regions):
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        got = _core.write_region(memory, index, fd, threads, chunk)
        images.append((address, size, fd, f"memory-region-{index}", *got[:3]))
    if sync:
        for image in images:
            os.fsync(image[2])
    return images


def close(images: list[tuple]) -> None:
    for image in images:
        os.close(image[2])


def touch(images: list[tuple], addresses: list[int]) -> None:
    memory = _core.restore_memory(images, False, 1)
    for address in addresses:
        memory.read(address, 1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--directory", default=tempfile.gettempdir())
    arguments.add_argument("--runs", type=int, default=7)
    options = arguments.parse_args()
    print(f"core: {_core.build_profile()}, directory {options.directory}, best of {options.runs}, ms")
    columns = [
        "shape",
        "chunk",
        "write",
        "1 thread",
        "+ fsync",
        "stored MiB",
        "table KiB",
        "open",
        "copy",
        "touch 256",
        "touched MiB",
    ]
    print(" ".join(f"{column:>11}" for column in columns))
    for shape in ("dense", "scattered", "pages"):
        memory, addresses = filled(shape)
        if shape == "dense":
            addresses = [addresses[0] + at for at in range(0, USED, USED // 256)]
        picked = random.Random(5).sample(addresses, 256)
        for chunk in CHUNKS:
            directory = options.directory
            plain = timed(partial(write, memory, directory, chunk, False, 2), options.runs, close)
            single = timed(partial(write, memory, directory, chunk, False, 1), options.runs, close)
            synced = timed(partial(write, memory, directory, chunk, True, 2), options.runs, close)
            images = write(memory, directory, chunk, True, 2)
            stored = sum(os.fstat(image[2]).st_blocks for image in images) * 512 / 2**20
            table = sum(len(image[5]) + len(image[6]) for image in images) * 4 / 3 / 1024
            opened = timed(partial(_core.restore_memory, images, False, 1), options.runs)
            copied = timed(partial(_core.restore_memory, images, True, 2), options.runs)
            touched = timed(partial(touch, images, picked), options.runs)
            lazy = _core.restore_memory(images, False, 1)
            for address in picked:
                lazy.read(address, 1)
            loaded = sum(pair[1] for pair in lazy.lazy or []) * chunk / 2**20
            close(images)
            row = [shape, f"{chunk >> 10}K"] + [
                f"{v:.2f}" for v in (plain, single, synced, stored, table, opened, copied, touched, loaded)
            ]
            print(" ".join(f"{cell:>11}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
