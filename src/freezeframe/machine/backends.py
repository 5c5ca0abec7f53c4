"""All host ends of one machine, opened before anything is built and kept over a guest's reset."""

from __future__ import annotations

import os

from freezeframe.backends.console import open_consoles
from freezeframe.backends.disk import open_disk, open_disk_with_overlay
from freezeframe.errors import IoFailed, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from freezeframe import _core
    from freezeframe.backends.console import HostConsole
    from freezeframe.backends.disk import DiskFile
    from freezeframe.config import VmConfig

SERIAL = "__serial"
CONSOLE = "__console"


class Backends:
    """Open disks and console ends by device id.

    Guarantees: a constructor that raises has closed all that it opened; `close` can be called again.
    """

    def __init__(self, config: VmConfig, *, restored: bool, capture: int = 0, overlays: bool = False) -> None:
        """`restored`: console files are continued, not begun anew. `capture`: bytes of output to keep for programs.

        `overlays`: what the guest writes to its disks is thrown away.
        """
        self.disks: dict[str, DiskFile] = {}
        self.consoles: dict[str, HostConsole] = {}
        self._blocks: dict[str, _core.VirtioBlk] = {}
        try:
            for disk in config.disks or ():
                if disk.id is None or disk.path is None:
                    raise Refused("a disk without id or path")
                raw = disk.image_type == "Raw"
                open_ = open_disk_with_overlay if overlays else open_disk
                opened = open_(disk.path, readonly=disk.readonly, raw=raw, granularity=disk.lock_granularity)
                self.disks[disk.id] = opened
            serial, console = config.serial, config.console
            ends = open_consoles(
                (serial.mode, serial.file), (console.mode, console.file), restored=restored, capture=capture
            )
            self.consoles = {name: end for name, end in zip((SERIAL, CONSOLE), ends, strict=True) if end is not None}
        except BaseException:
            self.close()
            raise

    def use_blocks(self, blocks: Mapping[str, _core.VirtioBlk]) -> None:
        """The devices that write to the disks from now on."""
        self._blocks = dict(blocks)

    def sync(self) -> None:
        """Writable disks are on their medium; raises `IoFailed` naming the first that is not."""
        for name, block in self._blocks.items():
            if not self.disks[name].readonly:
                try:
                    block.sync()
                except OSError as error:
                    raise IoFailed(f"disk {name}: {self.disks[name].path} cannot be synced") from error

    def identities(self) -> dict[str, dict[str, Any]]:
        """What each disk is now. The next write to it will show in its times, however soon it comes."""
        found = {name: identity(disk.fd) for name, disk in self.disks.items()}
        for block in self._blocks.values():
            block.arm_write_barrier()
        return found

    def resume(self) -> None:
        for console in self.consoles.values():
            console.resume()

    def pause(self) -> None:
        for console in self.consoles.values():
            console.pause()

    def close(self) -> None:
        for console in self.consoles.values():
            console.close()
        for disk in self.disks.values():
            disk.close()


def identity(fd: int) -> dict[str, Any]:
    """What tells whether an image is still the same: size in bytes, times in nanoseconds, device and inode."""
    status = os.fstat(fd)
    return {
        "size": os.lseek(fd, 0, os.SEEK_END),
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "dev": status.st_dev,
        "ino": status.st_ino,
    }
