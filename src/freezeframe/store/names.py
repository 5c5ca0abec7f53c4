"""The names of a snapshot's files and what is said about its directory."""

from __future__ import annotations

import os

from freezeframe._core import debug_text
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
