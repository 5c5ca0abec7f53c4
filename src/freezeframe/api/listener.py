"""Who may answer on a socket path: the holder of `<socket>.lock`, as in Cloud Hypervisor (vmm/src/api/http/mod.rs)."""

from __future__ import annotations

import fcntl
import os
import stat
from _socket import AF_UNIX, SO_PEERCRED, SOCK_STREAM, SOL_SOCKET, socket
from struct import calcsize, pack, unpack

from freezeframe.errors import Busy, IoFailed, Refused

_FLOCK = "hhqqi0q"  # struct flock of <fcntl.h>: type, whence, start, length, pid
BACKLOG = 128
PATH_MAX = 107  # sockaddr_un


class Listener:
    """A listening unix socket, for its owner only. `close` removes it from the file system; the lock file stays."""

    def __init__(self, sock: socket, path: str | None, lock: int | None) -> None:
        self.socket = sock
        self._path = path
        self._lock = lock

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """A socket that the caller opened, bound and passed on; it stays where it is."""
        try:
            return cls(socket(fileno=fd), None, None)
        except OSError as error:
            raise IoFailed(f"Cannot use file descriptor {fd} as API socket") from error

    @classmethod
    def bind(cls, path: str) -> Listener:
        """Bind and listen. `Busy` naming the owner when another process holds the path; a stale socket is replaced."""
        if len(os.fsencode(path)) > PATH_MAX:
            raise Refused(f"the path of the API socket is too long ({PATH_MAX} bytes at most): {path!r}")
        lock = _take_lock(path)
        sock: socket | None = None
        try:
            _remove_stale(path)
            sock = socket(AF_UNIX, SOCK_STREAM)
            umask = os.umask(0o077)
            try:
                sock.bind(path)
                sock.listen(BACKLOG)
            finally:
                os.umask(umask)
        except OSError as error:
            if sock is not None:
                sock.close()
            os.close(lock)
            raise IoFailed(f"Cannot create API socket {path!r}") from error
        except (Refused, Busy):
            os.close(lock)
            raise
        return cls(sock, path, lock)

    def close(self) -> None:
        self.socket.close()
        if self._path is not None:
            try:
                os.unlink(self._path)
            except OSError:
                pass
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _take_lock(path: str) -> int:
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise IoFailed(f"Cannot open the lock of API socket {path!r}") from error
    try:
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        os.truncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
    except BlockingIOError as error:
        owner = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise in_use(path, owner) from error
    except OSError as error:
        os.close(lock)
        raise IoFailed(f"Cannot lock API socket {path!r}") from error
    return lock


def in_use(path: str, owner: str) -> Busy:
    """CH's words for a socket that somebody answers on, and who that is."""
    text = path.replace("\\", "\\\\").replace('"', '\\"')
    what = f"process {owner}" if owner.isdigit() else "another process"
    command = _command(owner)
    message = f"it belongs to {what}{command}: end that VMM, or choose another --api-socket"
    return Busy(message, detail={"pid": owner}).chained(
        "Failed to start the VMM thread", f'API socket "{text}" is already in use by another running instance'
    )


def _command(pid: str) -> str:
    if not pid.isdigit():
        return ""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f" ({file.read().strip()})"
    except OSError:
        return ""


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Refused(f"API socket {path!r} exists and is not a socket: remove it, or choose another path")
    probe = socket(AF_UNIX, SOCK_STREAM)
    try:
        probe.connect(path)
        pid, _, _ = unpack("3i", probe.getsockopt(SOL_SOCKET, SO_PEERCRED, calcsize("3i")))
        raise in_use(path, str(pid))
    except ConnectionRefusedError:
        os.unlink(path)
    finally:
        probe.close()
