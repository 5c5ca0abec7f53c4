"""Machines for tiny guests inside this process: built, listened to, and moved from one to the next as by a snapshot."""

from __future__ import annotations

import json
import os

from freezeframe import _core
from freezeframe.backends.console import Console
from freezeframe.config import (
    ConsoleConfig,
    CpusConfig,
    DiskConfig,
    MemoryConfig,
    PayloadConfig,
    SerialConfig,
    VmConfig,
)
from freezeframe.machine import build_from_snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe.machine import Machine

MIB = 1 << 20
RAM = 64 * MIB

__all__ = ["MIB", "RAM", "again", "configured", "console", "copy_of", "serial"]


def configured(
    directory: str | os.PathLike[str], image: bytes, cpus: int = 1, *, ram: int = RAM, disk: str | None = None
) -> VmConfig:
    """A machine for the guest `image`, which is put into `directory`. With a `disk` (a path) it has that one and a
    virtio console as well. `ram`: bytes.
    """
    kernel = os.path.join(directory, "kernel")
    with open(kernel, "wb") as file:
        file.write(image)
    return VmConfig(
        cpus=CpusConfig(boot_vcpus=cpus, max_vcpus=cpus),
        memory=MemoryConfig(size=ram),
        payload=PayloadConfig(kernel=kernel),
        serial=SerialConfig(mode="Null"),
        console=ConsoleConfig(mode="Off" if disk is None else "Null"),
        disks=None if disk is None else (DiskConfig(path=disk, image_type="Raw"),),
    )


def serial(machine: Machine) -> Console:
    """The first serial port of a machine that was built with `capture`."""
    return Console(machine.backends.consoles["__serial"].output, machine._parts.devices["__serial"])  # noqa: SLF001


def console(machine: Machine) -> Console:
    """The virtio console of a machine that was built with `capture`."""
    return Console(machine.backends.consoles["__console"].output, machine._parts.devices["__console"])  # noqa: SLF001


def copy_of(memory: _core.Memory) -> _core.Memory:
    """Other memory with the same contents."""
    made = _core.Memory(memory.regions)
    for base, size in memory.regions:
        for at in range(base, base + size, MIB):
            data = memory.read(at, MIB)
            if data.count(0) != MIB:
                made.write(at, data)
    return made


def again(machine: Machine, **options: Any) -> Machine:
    """What a snapshot and a restore do, without files: ends the (paused) machine and gives the next one.

    `options`: those of `build_from_snapshot`.
    """
    state, memory = json.loads(json.dumps(machine.save())), copy_of(machine.memory)
    config = machine.config
    machine.close()
    return build_from_snapshot(config, state, memory, capture=MIB, **options)
