"""Whether the disks are still those that a snapshot's memory knows."""

from __future__ import annotations

from freezeframe.devices import saved
from freezeframe.errors import Incompatible
from freezeframe.machine.backends import identity as identity_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from freezeframe.backends.disk import DiskFile

FIELDS = ("size", "mtime_ns", "ctime_ns", "dev", "ino")
NUMBER_MAX = (1 << 64) - 1


def check(disks: Mapping[str, DiskFile], states: object, substitutes: Mapping[str, str]) -> None:
    """Compares each disk with what the snapshot recorded.

    A changed disk is refused, because the guest's memory holds parts of what was there: caches, directories, journals.
    It would go on from them and destroy both. `substitutes` are disks that the caller vouches for: only their size is
    checked.
    """
    recorded = saved.keys("disks", states, dict.fromkeys(disks, 0))
    for name, disk in disks.items():
        identity = saved.fields(f"disk {name}", recorded[name], dict.fromkeys(FIELDS, NUMBER_MAX))
        now = identity_of(disk.fd)
        if now["size"] != identity["size"]:
            raise Incompatible(
                f"disk {name}: {disk.path} has {now['size']} bytes, the snapshot's disk had {identity['size']}",
                hint=f"give the disk that belongs to the snapshot: disks=[{name}@/path/to/copy]",
            )
        if name not in substitutes:
            why = _difference(identity, now, readonly=disk.readonly)
            if why:
                raise Incompatible(
                    f"disk {name}: {disk.path} is not as it was when the snapshot was taken: {why}. The guest's memory "
                    f"and the disk would disagree, and the guest would damage its file systems",
                    hint=f"give a copy that was made at the time of the snapshot, disks=[{name}@/path/to/copy], "
                    f"or say that you know better, disk_check=off",
                    detail={"disk": name, "path": disk.path, "snapshot": identity, "now": now},
                )


def _difference(then: Mapping[str, Any], now: Mapping[str, Any], *, readonly: bool) -> str:
    """What is not the same, for people; empty when nothing. What is only read may be linked or renamed (ctime)."""
    if (then["dev"], then["ino"]) != (now["dev"], now["ino"]):
        return "it is another file (copied, moved between file systems or made anew)"
    if then["mtime_ns"] != now["mtime_ns"]:
        return "it was written since, most often by the machine itself, which ran on after the snapshot"
    if not readonly and then["ctime_ns"] != now["ctime_ns"]:
        return "it was changed since (its times, owner, mode or links at least)"
    return ""
