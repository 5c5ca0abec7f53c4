"""Bodies of the requests that are not a whole machine: restore, snapshot, resize, remove."""

from __future__ import annotations

from freezeframe.config.record import Record
from freezeframe.errors import NotSupported, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Literal

    from freezeframe.config.record import I32, U32, U64, Usize

    MemoryRestoreMode = Literal["Copy", "OnDemand"]
    RestoreClock = Literal["Advance", "Freeze"]


class RestoredNetConfig(Record):
    id: str
    num_fds: Usize = 0
    fds: tuple[I32, ...] | None = None


class RestoredVfioConfig(Record):
    id: str


class ZoneUpdate(Record):
    id: str
    host_numa_node: U32


class RestoredDisk(Record):
    """Another file in place of a disk of the snapshot: the copy that a clone may write to."""

    id: str
    path: str


class RestoreConfig(Record):
    """CH's `RestoreConfig` and what is ours: `clock`, `disks`, `disk_check`.

    `memory_restore_mode` None means on demand, each chunk verified when it is first touched. `clock` Advance moves the
    guest's clocks on by the time that passed, Freeze goes on where they were.
    """

    source_url: str
    prefault: bool = False
    memory_restore_mode: MemoryRestoreMode | None = None
    net_fds: tuple[RestoredNetConfig, ...] | None = None
    vfio_fds: tuple[RestoredVfioConfig, ...] | None = None
    iommufd_fd: I32 | None = None
    resume: bool = False
    zone_updates: tuple[ZoneUpdate, ...] = ()
    clock: RestoreClock = "Advance"
    disks: tuple[RestoredDisk, ...] = ()
    disk_check: bool = True

    @property
    def eager(self) -> bool:
        """Whether all memory is read and verified before the machine is reported as Paused."""
        return self.memory_restore_mode == "Copy" or self.prefault

    def validate(self) -> None:
        """`Refused` or `NotSupported` for what can be said without looking at the snapshot."""
        if self.prefault and self.memory_restore_mode == "OnDemand":
            raise Refused("'prefault' cannot be combined with 'memory_restore_mode=ondemand'")
        for name in ("net_fds", "vfio_fds", "zone_updates"):
            if getattr(self, name):
                raise NotSupported(f"{name!r} is not supported: there is no network, VFIO device or memory zone yet")
        if self.iommufd_fd is not None:
            raise NotSupported("'iommufd_fd' is not supported: there is no VFIO device yet")
        ids = [disk.id for disk in self.disks]
        for name in ids:
            if ids.count(name) > 1:
                raise Refused(f"Identifier {name} is not unique")


class SnapshotConfig(Record):
    # CH takes a request with other fields in it; so do its users' scripts.
    STRICT: ClassVar = False

    destination_url: str


class ResizeData(Record):
    desired_vcpus: U32 | None = None
    desired_ram: U64 | None = None
    desired_balloon: U64 | None = None


class AnyBody(Record):
    """The body of an action that is refused whatever it says; it must still be a JSON object."""

    STRICT: ClassVar = False
