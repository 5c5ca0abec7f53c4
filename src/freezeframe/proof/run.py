"""One repeatable run of a snapshot."""

from __future__ import annotations

import os
from itertools import pairwise

from freezeframe import _core
from freezeframe.errors import InvalidState, Refused
from freezeframe.proof.inputs import POWER_BUTTON, Input

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal, Self

    from freezeframe.machine import RepeatableMachine

    AnyPath = str | os.PathLike[str]
    Tier = Literal["interpreter", "translator"]

CAPTURE = 1 << 20
SEED_MAX = (1 << 64) - 1


class Digests:
    """BLAKE3 of a machine's three parts, as hexadecimal digits."""

    __slots__ = ("cpu", "devices", "memory")

    def __init__(self, cpu: str, devices: str, memory: str) -> None:
        self.cpu = cpu
        self.devices = devices
        self.memory = memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digests) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.cpu, self.devices, self.memory))

    def __repr__(self) -> str:
        return f"<Digests cpu {self.cpu[:12]} devices {self.devices[:12]} memory {self.memory[:12]}>"

    def to_json(self) -> dict[str, str]:
        return {"cpu": self.cpu, "devices": self.devices, "memory": self.memory}


class Replay:
    """A machine from a snapshot that does the same each time; made by `freezeframe.replay`.

    It moves only in `advance`. Time is the count of instructions, `seed` stands for everything random, the disks are
    not changed. What is sent to it is logged in `inputs`, and another replay that is given these does the same at the
    same instruction. A context manager: the machine ends with the block.
    """

    def __init__(self, machine: RepeatableMachine, inputs: Sequence[Input] = ()) -> None:
        self._machine: RepeatableMachine | None = machine
        self._due = list(inputs)
        self.inputs: list[Input] = []
        """What it was given so far."""

    @property
    def machine(self) -> RepeatableMachine:
        """`InvalidState` after `close`."""
        if self._machine is None:
            raise InvalidState("this replay is closed: its machine has ended")
        return self._machine

    @property
    def instructions(self) -> int:
        """What all vCPUs together have executed since the snapshot."""
        return self.machine.instructions

    @property
    def ended(self) -> str | None:
        """`poweroff` or `reset` when the guest ended, `asleep` when only input would wake it, None while it can run."""
        if self.machine.stopped is not None:
            return self.machine.stopped.kind
        return "asleep" if self.machine.asleep else None

    def advance(self, instructions: int) -> None:
        """Executes so many instructions more; fewer when the guest ends or sleeps for ever.

        Raises `Damaged` for memory of the snapshot that is not what was written, `EngineError` when the engine cannot
        go on; the machine then stands before that instruction.
        """
        if instructions < 0:
            raise Refused(f"{instructions} instructions: a replay does not go back; make another one")
        self.run_to(self.instructions + instructions)

    def run_to(self, count: int) -> None:
        """As `advance`, to a count since the snapshot."""
        while self._due and self._due[0].at <= count:
            if self.instructions < self._due[0].at:
                self._run(self._due[0].at)
            if self.instructions < self._due[0].at and not self.machine.asleep:
                return
            # One that sleeps takes its input early: nothing happens to it until then.
            self._give(self._due.pop(0))
        self._run(count)

    def send(self, data: str | bytes, console: str = "__console") -> None:
        """Types on a console (`__console` or `__serial`), now; it is logged."""
        self._give(Input(self.instructions, console, data.encode() if isinstance(data, str) else data))

    def press_power_button(self) -> None:
        """Now; it is logged."""
        self._give(Input(self.instructions, POWER_BUTTON))

    def output(self, console: str = "__console") -> str:
        """What the guest printed since the snapshot, the last MiB of it."""
        return self.machine.output(console).decode(errors="replace")

    def state(self) -> dict[str, Any]:
        """Everything but memory."""
        return self.machine.state()

    def digests(self, *, afresh: bool = False) -> Digests:
        """Of the machine as it stands. Memory that was written is followed; `afresh` looks at all of it instead."""
        state = self.machine.state()
        memory = self.machine.memory_digest(afresh=afresh)
        return Digests(_digest(state["cpu"]), _digest(state["devices"]), memory.hex())

    def interrupt(self) -> None:
        """Makes an `advance` on another thread come back soon."""
        self.machine.interrupt()

    def close(self) -> None:
        """Ends the machine; nothing happens when it has ended."""
        machine, self._machine = self._machine, None
        if machine is not None:
            machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, count: int) -> None:
        self.machine.run_to(count)
        stopped = self.machine.stopped
        if stopped is not None and stopped.error is not None:
            raise stopped.error

    def _give(self, given: Input) -> None:
        if given.device == POWER_BUTTON:
            self.machine.press_power_button()
        else:
            self.machine.receive(given.device, given.data)
        self.inputs.append(given)


def _digest(value: object) -> str:
    from json import dumps

    return _core.blake3(dumps(value, sort_keys=True, separators=(",", ":")).encode()).hex()


def replay(
    snapshot: AnyPath,
    *,
    seed: int = 0,
    tier: Tier | None = None,
    inputs: Sequence[Input] = (),
    disks: Mapping[str, AnyPath] | None = None,
    disk_check: bool = True,
) -> Replay:
    """A machine from a snapshot directory whose runs are the same each time, at its first instruction.

    `seed`: what stands for random numbers, and for how far the wall clock has moved on. `tier`: what executes, the
    translator by default; it makes no difference but in speed. `inputs`: what comes from outside, in the order of
    counts (`Replay.inputs` of another one, `read_inputs`). `disks`, `disk_check`: as for `freezeframe.restore`; no disk
    is changed.
    """
    from freezeframe.machine import build_repeatable
    from freezeframe.store import SnapshotReader

    if any(later.at < earlier.at for earlier, later in pairwise(inputs)):
        raise Refused("the inputs are not in the order of their counts")
    if not 0 <= seed <= SEED_MAX:
        raise Refused(f"a seed of {seed}: 0 to {SEED_MAX}")
    directory = os.fspath(snapshot).removeprefix("file://")
    with SnapshotReader.open(directory) as reader:
        machine = build_repeatable(
            reader.read_config(),
            reader.state,
            reader.open_memory("ondemand"),
            tier=tier,
            seed=seed,
            disks={name: os.fspath(path) for name, path in (disks or {}).items()},
            disk_check=disk_check,
            capture=CAPTURE,
        )
    return Replay(machine, inputs)
