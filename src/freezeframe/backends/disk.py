"""Disk images: opened, locked against a second writer, and never closed while a machine uses them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from freezeframe.errors import Busy, IoFailed, NotFound, NotSupported, Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Granularity = Literal["ByteRange", "Full"]

# struct flock: type, whence, start, length, pid
_FLOCK = "hhqqi"
_SERIAL_BYTES = 20
_MAGIC = {b"QFI\xfb": "a qcow2", b"vhdxfile": "a VHDX", b"KDMV": "a VMDK", b"conectix": "a VHD"}


class DiskFile:
    """An open image, locked as long as it (or a duplicate of `fd`) is open.

    `serial`: what the guest sees as the disk's name when the configuration gives none. `scratch`: an empty unnamed file
    for all changes, where the image is to stay as it is; `fd` can only be read then.
    """

    __slots__ = ("fd", "path", "readonly", "scratch", "serial")

    def __init__(self, path: str, fd: int, *, readonly: bool, scratch: int | None = None) -> None:
        self.path = path
        self.fd = fd
        self.readonly = readonly
        self.scratch = scratch
        found = os.fstat(fd)
        # As Cloud Hypervisor makes it (block/src/lib.rs, build_serial).
        self.serial = f"{found.st_dev}{found.st_rdev}{found.st_ino}"[:_SERIAL_BYTES]

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        if self.scratch is not None:
            os.close(self.scratch)
            self.scratch = None


def open_disk(path: str, *, readonly: bool, raw: bool = False, granularity: Granularity = "ByteRange") -> DiskFile:
    """Opens and locks an image: many readers or one writer, over all processes that lock as Cloud Hypervisor does.

    `raw`: the configuration says that it is raw, whatever its first bytes look like. Raises `NotFound`, `Refused`
    (not a disk), `NotSupported` (another format), `Busy` (locked; names the process) or `IoFailed`.
    """
    fd = _open(path, readonly=readonly)
    try:
        _check_kind(path, fd, raw=raw)
        _lock(path, fd, readonly=readonly, granularity=granularity)
        return DiskFile(path, fd, readonly=readonly)
    except BaseException:
        os.close(fd)
        raise


def open_disk_with_overlay(
    path: str, *, readonly: bool, raw: bool = False, granularity: Granularity = "ByteRange"
) -> DiskFile:
    """As `open_disk`, for a guest whose changes are thrown away: the image is opened and locked as for reading.

    `readonly`: what the guest's device is, as the configuration has it. The changes go into an unnamed file in the
    directory for temporary files.
    """
    import tempfile

    disk = open_disk(path, readonly=True, raw=raw, granularity=granularity)
    try:
        with tempfile.TemporaryFile() as scratch:
            disk.scratch = os.dup(scratch.fileno())
    except OSError as error:
        disk.close()
        raise IoFailed(f"cannot make a file for the changes to the disk {path} in {tempfile.gettempdir()}") from error
    disk.readonly = readonly
    return disk


def _open(path: str, *, readonly: bool) -> int:
    try:
        # O_NONBLOCK: a FIFO must be refused, not waited for. It means nothing to files and block devices.
        return os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"the disk {path} does not exist") from error
    except IsADirectoryError as error:
        raise Refused(f"the disk {path} is a directory") from error
    except OSError as error:
        may = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not readonly and os.access(path, os.R_OK)
        hint = "it may be read: readonly=on opens it so" if may else None
        raise IoFailed(f"cannot open the disk {path}", hint=hint) from error


def _check_kind(path: str, fd: int, *, raw: bool) -> None:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise Refused(f"the disk {path} is {what}")
    if raw:
        return
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        head = os.pread(fd, 16, 0) + os.pread(fd, 16, max(0, size - 512))
    except OSError as error:
        raise IoFailed(f"cannot read the disk {path}") from error
    for magic, name in _MAGIC.items():
        if head.startswith(magic) or head[16:].startswith(magic):
            raise NotSupported(
                f"the disk {path} is {name} image: only raw ones can be used",
                hint=f"convert it (qemu-img convert -O raw {path} {path}.raw), or say image_type=raw if it is raw",
            )


def _lock(path: str, fd: int, *, readonly: bool, granularity: Granularity) -> None:
    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    # A lock of length 0 reaches to the end, wherever that will be.
    length = os.lseek(fd, 0, os.SEEK_END) if granularity == "ByteRange" else 0
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, length, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise IoFailed(f"cannot lock the disk {path}") from error
        who, how = _describe(lock_holders(fd))
        use = "in use" if not readonly else "open for writing"
        raise Busy(
            f"the disk {path} is {use} by {who}",
            hint=f"{how}; or use a copy of the disk: for a restore, disks=[_disk0@/path/to/copy]",
        ) from error


def _describe(holders: list[int]) -> tuple[str, str]:
    """Who holds a lock, and what to do about it."""
    if not holders:
        return "a process that this one may not see", "end that process"
    names: list[str] = []
    ways: list[str] = []
    for pid in holders:
        if pid == os.getpid():
            names.append(f"another machine of this process ({pid})")
            ways.append("shut that machine down")
            continue
        words = _words(pid)
        names.append(f"process {pid} ({os.path.basename(words[0]) if words else 'unknown'})")
        socket = next((new for new in map(_socket_of, words, [*words[1:], ""]) if new), None)
        ways.append(f"ch-remote --api-socket={socket} shutdown-vmm" if socket else f"kill {pid}")
    return " and ".join(names), " and ".join(ways)


def _socket_of(word: str, following: str) -> str | None:
    if word == "--api-socket":
        return following.removeprefix("path=")
    return word.removeprefix("--api-socket=").removeprefix("path=") if word.startswith("--api-socket=") else None


def _words(pid: int) -> list[str]:
    """Command line of a process; a script counts under its own name, not its interpreter's."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = [word.decode(errors="replace") for word in file.read().split(b"\0")[:-1]]
    except OSError:
        return []
    if len(words) > 1 and os.path.basename(words[0]).startswith("python") and not words[1].startswith("-"):
        return words[1:]
    return words


def lock_holders(fd: int) -> list[int]:
    """Processes that hold a lock on this file through a description other than `fd`'s, as far as /proc shows.

    The kernel says "-1" for the owner of an open-file-description lock, so the owners are found by looking for who has
    the file open with a lock in its `fdinfo`.
    """
    wanted = os.fstat(fd)
    own = f"{os.getpid()}/fd/{fd}"
    found: list[int] = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            if f"{pid}/fd/{name}" != own and _locks(pid, name, wanted):
                found.append(pid)
                break
    return found


def _locks(pid: int, name: str, wanted: os.stat_result) -> bool:
    try:
        there = os.stat(f"/proc/{pid}/fd/{name}")
        if (there.st_dev, there.st_ino) != (wanted.st_dev, wanted.st_ino):
            return False
        with open(f"/proc/{pid}/fdinfo/{name}") as file:
            return any(line.startswith("lock:") for line in file)
    except OSError:
        return False
