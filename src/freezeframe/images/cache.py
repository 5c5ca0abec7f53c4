"""Where downloaded and built things are kept between runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path

Progress = Callable[[str], None]
"""Told in one short line what is being done now."""


def silent(_line: str) -> None:
    """The progress of callers who do not want any."""


def cache_dir(*parts: str) -> Path:
    """The user's cache directory for this project (``$XDG_CACHE_HOME`` or ``~/.cache``), made if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base, "freezeframe", *parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Holds an exclusive lock on ``path`` (a lock file), so that two processes do not build the same thing at once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
