"""All host ends of one machine, opened before anything is built and kept over a guest's reset."""

from __future__ import annotations

from freezeframe.backends.console import ConsoleEnd
from freezeframe.backends.disk import DiskFile
from freezeframe.errors import IoFailed, Refused
from freezeframe.machine import disk_check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from freezeframe import _core
    from freezeframe.config import ConsoleConfig, SerialConfig, VmConfig

SERIAL = "__serial"
CONSOLE = "__console"


class Backends:
    """Open disks by device id and console ends by device id.

    Guarantees: a constructor that raises has closed all that it opened; `close` can be called again.
    """

    def __init__(self, config: VmConfig, *, restored: bool, consoles: Mapping[str, ConsoleEnd] | None = None) -> None:
        """`restored`: console files are continued, not begun anew. `consoles`: ends to use instead of the configured ones."""
        self.disks: dict[str, DiskFile] = {}
        self.consoles: dict[str, ConsoleEnd] = dict(consoles or {})
        self._blocks: dict[str, _core.VirtioBlk] = {}
        try:
            for disk in config.disks or ():
                if disk.id is None or disk.path is None:
                    raise Refused("a disk without id or path")
                self.disks[disk.id] = DiskFile(disk.id, disk.path, readonly=disk.readonly)
            console_reads = config.console.mode == "Tty"
            self._open_console(CONSOLE, config.console, restored=restored, take_input=True)
            self._open_console(SERIAL, config.serial, restored=restored, take_input=not console_reads)
        except BaseException:
            self.close()
            raise

    def _open_console(
        self, name: str, config: ConsoleConfig | SerialConfig, *, restored: bool, take_input: bool
    ) -> None:
        if name in self.consoles or config.mode == "Off":
            return
        if config.mode == "Null":
            self.consoles[name] = ConsoleEnd.null()
        elif config.mode == "Tty":
            self.consoles[name] = ConsoleEnd.stdio(take_input=take_input)
        elif config.mode == "File" and config.file is not None:
            self.consoles[name] = ConsoleEnd.file(config.file, keep=restored)
        else:
            raise Refused(f"the console mode {config.mode} is not supported", hint="use tty, file=…, null or off")

    def check_disks(self, saved: Mapping[str, Any], substitutes: Mapping[str, str]) -> None:
        """Refuses disks that are not as the snapshot left them; `substitutes` (by id) only have to have the right size."""
        disk_check.check(self.disks, saved, substitutes)

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
        found: dict[str, dict[str, Any]] = {}
        for name, disk in self.disks.items():
            found[name] = disk.identity()
            if name in self._blocks and not disk.readonly:
                self._blocks[name].arm_write_barrier()
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

