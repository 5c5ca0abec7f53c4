"""The source of a virtio-rng."""

from __future__ import annotations

import os
import stat

from freezeframe.errors import IoFailed, NotFound, Refused


def open_entropy(path: str) -> int:
    """A descriptor to read random bytes from; the caller closes it. Raises `NotFound`, `Refused` or `IoFailed`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"the source of randomness {path} does not exist") from error
    except OSError as error:
        raise IoFailed(f"cannot open the source of randomness {path}") from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise Refused(f"the source of randomness {path} is a directory")
    return fd
