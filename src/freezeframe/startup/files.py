"""Kernel and ramdisk files, with errors that say which file and what about it."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Self

from freezeframe.errors import IoFailed, NotFound, Refused

if TYPE_CHECKING:
    from freezeframe._core import Memory

PIECE = 4 << 20


class BootFile:
    """An open regular file of known size; reads are exact."""

    def __init__(self, what: str, path: str | os.PathLike[str]) -> None:
        """`what`: "kernel" or "initramfs", for messages."""
        self.what = what
        self.path = os.fspath(path)
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{what} {self.path} does not exist") from error
        except OSError as error:
            raise IoFailed(f"cannot open {what} {self.path}") from error
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise Refused(f"{what} {self.path} is {kind}")
        self.size = status.st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`."""
        parts: list[bytes] = []
        while size:
            try:
                part = os.pread(self.fd, min(size, PIECE), offset)
            except OSError as error:
                raise IoFailed(f"cannot read {self.what} {self.path}") from error
            if not part:
                raise Refused(f"{self.what} {self.path} is cut short: nothing at byte {offset}")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def copy(self, memory: Memory, gpa: int, offset: int, size: int) -> None:
        """Copies a part of the file to guest memory; the caller has checked that it is RAM."""
        done = 0
        while done < size:
            piece = min(PIECE, size - done)
            memory.write(gpa + done, self.read(offset + done, piece))
            done += piece
