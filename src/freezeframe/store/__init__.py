"""Snapshots as directories: `memory-region-0`, …, `vm.json`. It never names a device or a machine.

The names are loaded when they are asked for: a process that restores does not load the writer.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from freezeframe.store.reader import SnapshotReader
    from freezeframe.store.writer import WrittenSnapshot, write_snapshot

__all__ = ["SnapshotReader", "WrittenSnapshot", "write_snapshot"]


def __getattr__(name: str) -> object:
    if name == "SnapshotReader":
        from freezeframe.store import reader

        return reader.SnapshotReader
    if name in ("WrittenSnapshot", "write_snapshot"):
        from freezeframe.store import writer

        return getattr(writer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
