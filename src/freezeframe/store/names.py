"""The names of a snapshot's files and what is said about its directory."""

from __future__ import annotations

import os

from freezeframe._core import debug_text
from freezeframe.errors import IoFailed, NotFound, os_error_text
from freezeframe.state.document import DOCUMENT_NAME

REGION_PREFIX = "memory-region-"

# Cloud Hypervisor's texts below "The VM could not be snapshotted" and "The VM could not be restored".
SENDING = ("Cannot send VM snapshot", "Failed to send migratable component snapshot")
SOURCE_MISSING = ("Cannot restore VM", "Failed to send migratable component snapshot")
RECEIVING = ("Cannot restore VM", "Failed to receive migratable component snapshot")
MEMORY = ("Memory manager error",)


def region_name(index: int) -> str:
    return f"{REGION_PREFIX}{index}"


def is_region(name: str) -> bool:
    return name.startswith(REGION_PREFIX) and name.removeprefix(REGION_PREFIX).isdecimal()


def is_ours(name: str) -> bool:
    return name == DOCUMENT_NAME or is_region(name)


def not_a_directory(path: str) -> str:
    """Cloud Hypervisor's text for a destination or source that is missing or no directory."""
    return f"Destination is not a directory: {debug_text(path)}"


def path_text(directory: str | os.PathLike[str]) -> str:
    return os.fsdecode(directory)


def open_directory(path: str, *, hint: str, chain: tuple[str, ...], step: tuple[str, ...] = ()) -> int:
    """A descriptor of the directory of a snapshot.

    Raises `NotFound` with `hint` or `IoFailed`, with Cloud Hypervisor's texts: `chain`, and `step` for the latter.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = isinstance(error, FileNotFoundError)
        raise NotFound(f"{path!r} does not exist" if missing else f"{path!r} is not a directory", hint=hint).chained(
            *chain, not_a_directory(path)
        ) from error
    except OSError as error:
        raise IoFailed(f"{path!r} cannot be opened: {error.strerror}").chained(
            *chain, *step, os_error_text(error)
        ) from error
