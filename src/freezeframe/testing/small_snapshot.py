"""A machine's worth of memory and state, small enough to try every bit of its snapshot."""

from __future__ import annotations

from freezeframe import _core
from freezeframe.store import SnapshotReader, write_snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any, Literal

    from freezeframe.store import WrittenSnapshot

CHUNK = 65536
REGIONS = [(0, 4 * CHUNK), (1 << 20, 2 * CHUNK)]
SIZE = 6 * CHUNK
CONFIG: dict[str, Any] = {
    "cpus": {"boot_vcpus": 1},
    "memory": {"size": SIZE},
    "payload": {"cmdline": 'quoted "ü" \\ text'},
}
STATE: dict[str, Any] = {
    "clock": {"tsc": 2**64 - 1, "drift": -5},
    "vcpus": [{"rip": 4096, "halted": False, "none": None}],
}


def memory() -> _core.Memory:
    """Chunk 0 of region 0 full, its chunk 2 with one page, chunk 1 of region 1 with its last byte."""
    made = _core.Memory(REGIONS)
    made.write(0, bytes(i * 7 % 251 + 1 for i in range(CHUNK)))
    made.write(2 * CHUNK + 4096 * 3 + 5, b"page")
    made.write((1 << 20) + 2 * CHUNK - 1, b"z")
    return made


def contents(made: _core.Memory) -> list[bytes]:
    """All bytes of each region."""
    return [made.read(address, size) for address, size in made.regions]


def snapshot(directory: str | os.PathLike[str], made: _core.Memory | None = None) -> WrittenSnapshot:
    """Writes the machine into an existing directory."""
    return write_snapshot(directory, config=CONFIG, state=STATE, memory=made or memory(), engine="software")


def restore(directory: str | os.PathLike[str], mode: Literal["ondemand", "copy"] = "ondemand") -> _core.Memory:
    """The memory of a snapshot."""
    with SnapshotReader.open(directory) as reader:
        return reader.open_memory(mode)
