"""What was found out about this host and holds until it boots anew: a small file for each answer.

Guarantees: an answer is given only to the user, the boot of the host, the kernel and the build of the core that it was
found by, and with the very facts it was found with. Whatever is wrong with a file or its directory (damaged, cut,
somebody else's, not writable), it is as if nothing were known: the caller finds out again. A file is whole or absent.
"""

from __future__ import annotations

import os
import stat

from freezeframe import _core

BOOT_ID = "/proc/sys/kernel/random/boot_id"
_VERSION = 1
# Of a whole file, in bytes; answers are a sentence.
_LIMIT = 4096
_FOLDER = "freezeframe"


def recall(name: str, *facts: object) -> str | None:
    """The answer that `remember` was given for `name` and these `facts`; None where there is none to be trusted."""
    line = _first_line(name, facts)
    folder = _open_folder(make=False)
    if line is None or folder is None:
        return None
    try:
        text = _read_own(folder, name).decode()
    except (OSError, ValueError):
        return None
    finally:
        os.close(folder)
    first, _, answer = text.partition("\n")
    # The end of line is the sign that the file is whole.
    return answer[:-1] if first == line and answer[-1:] == "\n" and answer.count("\n") == 1 else None


def remember(name: str, answer: str, *facts: object) -> None:
    """Keeps `answer`, one line, for the next `recall`; does nothing where there is no place to keep it.

    `name`: a file name. `facts`: what the answer relies on besides boot, kernel and core; their text is compared.
    """
    line = _first_line(name, facts)
    data = f"{line}\n{answer}\n".encode()
    if line is None or "\n" in answer or len(data) > _LIMIT:
        return
    folder = _open_folder(make=True)
    if folder is None:
        return
    try:
        _replace(folder, name, data)
    except OSError:
        pass
    finally:
        os.close(folder)


def _replace(folder: int, name: str, data: bytes) -> None:
    temporary = f".{name}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            if os.write(fd, data) != len(data):
                raise OSError("no room")
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(temporary, dir_fd=folder)
        raise


def _first_line(name: str, facts: tuple[object, ...]) -> str | None:
    """All that an answer holds for; None on a host that does not say which of its boots this is."""
    try:
        with open(BOOT_ID, encoding="ascii") as file:
            boot = file.read().strip()
        core = os.stat(_core.__file__)
    except (OSError, ValueError):
        return None
    build = (core.st_dev, core.st_ino, core.st_size, core.st_mtime_ns)
    line = " ".join(map(str, (_FOLDER, name, _VERSION, boot, os.uname().release, *build, *facts)))
    return None if not boot or "\n" in line else line


def _folders() -> list[str]:
    """The best first: what is there for as long as the user is logged in, and what stays."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isdir(runtime):
        runtime = ""  # that one is made at login, not by programs
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):
        cache = os.path.expanduser("~/.cache")
    # Relative ones are to be ignored (XDG Base Directory Specification).
    return [base for base in (runtime, cache) if os.path.isabs(base)]


def _open_folder(*, make: bool) -> int | None:
    """A descriptor of the first directory that is this user's alone to write to."""
    for base in _folders():
        path = os.path.join(base, _FOLDER)
        try:
            if make:
                _make(path)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        if _ours(os.fstat(fd)):
            return fd
        os.close(fd)
    return None


def _make(path: str) -> None:
    """Makes a missing directory, and the one that it is in: nothing in the home of another user (as under sudo)."""
    for missing in (os.path.dirname(path), path):
        if not os.path.exists(missing) and _ours(os.stat(os.path.dirname(missing))):
            os.mkdir(missing, 0o700)


def _ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


def _read_own(folder: int, name: str) -> bytes:
    """A file's bytes. Raises `OSError` or `ValueError` for one that somebody else may have written."""
    # O_NONBLOCK: a FIFO must not be waited for.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _ours(found) or found.st_mode & stat.S_IWGRP:
            raise ValueError("not a file of this user's alone")
        data = os.read(fd, _LIMIT + 1)
    finally:
        os.close(fd)
    if len(data) > _LIMIT:
        raise ValueError("longer than any answer")
    return data
