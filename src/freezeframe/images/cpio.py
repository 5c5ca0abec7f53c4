"""The initramfs archive format ("newc"): the kernel's Documentation/driver-api/early-userspace/buffer-format.rst."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive. ``mode`` includes the file type; ``data`` is a link's target for symbolic links."""

    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def directory() -> Entry:
    return Entry(stat.S_IFDIR | 0o755)


def file(data: bytes, mode: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | mode, data)


def symlink(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def char_device(major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(stat.S_IFCHR | mode, rdev=(major, minor))


def archive(entries: Mapping[str, Entry]) -> bytes:
    """The archive of ``entries`` (path without leading slash → entry). The same entries always give the same bytes."""
    out = bytearray()
    for number, (path, entry) in enumerate(entries.items(), start=1):
        _append(out, number, path, entry)
    _append(out, 0, "TRAILER!!!", Entry(0))
    out.extend(bytes(-len(out) % 512))
    return bytes(out)


def _append(out: bytearray, inode: int, path: str, entry: Entry) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.rdev, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out.extend(bytes(-len(out) % 4))
    out += entry.data
    out.extend(bytes(-len(out) % 4))
