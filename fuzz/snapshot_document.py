"""Mutates `vm.json` (bytes, and values sealed again); the reader must refuse or read, never anything else.

    python fuzz/snapshot_document.py [--seed N] [--count N]      count 0: until interrupted

A finding prints its seed, which reproduces it. `tests/unit/store/test_fuzz.py` runs a few thousand.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import tempfile
from typing import Any

from freezeframe import _core
from freezeframe.errors import FreezeframeError
from freezeframe.store import SnapshotReader
from freezeframe.testing import small_snapshot as small

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 4096, 65536, 2**31, 2**32, 2**52, 2**63, 2**64 - 1, 2**64, -(2**63), 0.5, 1e300,
    "", "A", "AAAA",
    "memory-region-0", "memory-region-1", "../vm.json", "\u0000", "é", "x" * 5000, [], {}, [[]], {"": {}}, [None] * 100,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found.extend(places(inner))
    return found


def sealed(document: dict[str, Any]) -> bytes:
    document.pop("seal", None)
    text = (json.dumps(document, indent=1).removesuffix("\n}") + ",\n").encode()
    return text + b' "seal": "' + _core.blake3(text).hex().encode() + b'"\n}\n'


def mutate_values(data: bytes, dice: random.Random) -> bytes:
    document = json.loads(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        container, key = dice.choice(places(document))
        action = dice.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[dice.choice(("extra", "", str(key) + "_", "format"))] = copy.deepcopy(dice.choice(ODD))
        elif action == 2 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(dice.choice(ODD))
    return sealed(document)


def mutate_bytes(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at = dice.randrange(len(changed) or 1)
        action = dice.randrange(4)
        if action == 0 and changed:
            changed[at] = dice.randrange(256)
        elif action == 1:
            del changed[at : at + dice.choice((1, 2, 40, 10**6))]
        elif action == 2:
            changed[at:at] = dice.choice((b"{", b"[" * 500, b'"', b"\\u0000", b"\xff", b"0", b"-", data[:100]))
        else:
            changed += data[at:]
    if dice.randrange(2) and b' "seal": "' in changed:  # past the seal, into the parser
        text = bytes(changed[: changed.index(b' "seal": "')])
        return text + b' "seal": "' + _core.blake3(text).hex().encode() + b'"\n}\n'
    return bytes(changed)


def attempt(directory: str, original: bytes, wanted: list[bytes], seed: int) -> bool:
    """One mutation; whether it was accepted. Raises what should not happen."""
    dice = random.Random(seed)
    data = dice.choice((mutate_values, mutate_bytes))(original, dice)
    with open(os.path.join(directory, "vm.json"), "wb") as file:
        file.write(data)
    try:
        with SnapshotReader.open(directory) as reader:
            regions, state = reader.regions, reader.state
            memory = reader.open_memory(dice.choice(("copy", "ondemand")))
            found = small.contents(memory)
    except FreezeframeError as error:
        if not str(error):
            raise AssertionError("an error without a word") from error
        return False
    # What is accepted may differ in what only others can judge (config, state), never in guest memory where the
    # table still says the same; an address may have been moved on purpose.
    if not isinstance(state, dict) or [size for _, size in regions] != [size for _, size in small.REGIONS]:
        raise AssertionError(f"accepted {regions}")
    for bytes_found, bytes_wanted in zip(found, wanted, strict=True):
        for at in range(0, len(bytes_wanted), small.CHUNK):
            chunk = bytes_found[at : at + small.CHUNK]
            if chunk != bytes_wanted[at : at + small.CHUNK] and any(chunk):
                raise AssertionError("accepted other bytes than were saved")
    return True


def run(first: int, count: int) -> tuple[int, int]:
    """(accepted, refused) of `count` mutations; 0 means for ever."""
    accepted = done = 0
    with tempfile.TemporaryDirectory() as directory:
        small.snapshot(directory)
        with open(os.path.join(directory, "vm.json"), "rb") as file:
            original = file.read()
        wanted = small.contents(small.memory())
        seed = first
        while count == 0 or done < count:
            try:
                accepted += attempt(directory, original, wanted, seed)
            except BaseException:
                print(f"seed {seed}")
                raise
            seed += 1
            done += 1
    return accepted, done - accepted


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--count", type=int, default=0)
    options = arguments.parse_args()
    accepted, refused = run(options.seed, options.count)
    print(f"accepted {accepted}, refused {refused}")
