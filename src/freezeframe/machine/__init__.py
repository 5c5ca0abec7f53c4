"""A machine: built paused by one of two sibling recipes, run by one thread, saved as plain values."""

from __future__ import annotations

from freezeframe.machine.build import build_for_boot, build_from_snapshot, build_repeatable
from freezeframe.machine.engine import EngineReport
from freezeframe.machine.live import Machine, StopReason
from freezeframe.machine.repeatable import RepeatableMachine

__all__ = [
    "EngineReport",
    "Machine",
    "RepeatableMachine",
    "StopReason",
    "build_for_boot",
    "build_from_snapshot",
    "build_repeatable",
]
