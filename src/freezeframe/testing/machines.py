"""Machines without CPUs, for tests of everything above them: states, errors and files, and no guest."""

from __future__ import annotations

import os

from freezeframe.errors import FreezeframeError, IoFailed, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from freezeframe.config import RestoreConfig, VmConfig

    Kind = Literal["poweroff", "reset", "failed"]


class FakeEngine:
    name = "fake"
    reason = "tests asked for it"
    warning = None


class FakeStop:
    """What a machine hands to `on_stop`."""

    def __init__(self, kind: Kind, error: FreezeframeError | None = None, status: int | None = None) -> None:
        self.kind: Kind = kind
        self.error = error
        self.status = status


def _ignore(_reason: object) -> None:
    """For a machine that nobody watches."""


class FakeMachine:
    """Keeps a state, counts what was asked of it, and stops when told to."""

    def __init__(self, config: VmConfig, state: Literal["created", "paused"]) -> None:
        self.config = config
        self.state: Literal["created", "running", "paused", "shutdown"] = state
        self.engine = FakeEngine()
        self.start_note = "nothing was loaded"
        self.on_stop: Callable[[Any], None] = _ignore
        self.closed = False
        self.buttons = 0
        self.broken: dict[str, str] = {}
        self.fail: FreezeframeError | None = None

    def resume(self) -> None:
        self._maybe_fail()
        self.state = "running"

    def pause(self) -> None:
        self._maybe_fail()
        self.state = "paused"

    def power_button(self) -> None:
        self.buttons += 1

    def counters(self) -> dict[str, dict[str, int]]:
        return {"_disk0": {"read_bytes": 0}}

    def faults(self) -> dict[str, str]:
        return dict(self.broken)

    def close(self) -> None:
        self.closed = True

    def stop(self, kind: Kind, error: FreezeframeError | None = None, status: int | None = None) -> None:
        """What the vCPU thread does when the guest, or the engine, ends."""
        self.state = "shutdown"
        self.on_stop(FakeStop(kind, error, status))

    def _maybe_fail(self) -> None:
        if self.fail is not None:
            raise self.fail


class FakeBackend:
    """Snapshots are directories with a `vm.json` that holds the configuration."""

    def __init__(self) -> None:
        self.machines: list[FakeMachine] = []
        self.fail: FreezeframeError | None = None
        self.fail_next_resume: FreezeframeError | None = None

    @property
    def machine(self) -> FakeMachine:
        """The youngest."""
        return self.machines[-1]

    def boot(self, config: VmConfig) -> FakeMachine:
        return self._make(config, "created")

    def reboot(self, machine: FakeMachine, config: VmConfig) -> FakeMachine:
        machine.close()
        return self._make(config, "created")

    def restore(self, directory: str, request: RestoreConfig) -> tuple[VmConfig, FakeMachine]:  # noqa: ARG002
        from freezeframe.config import VmConfig

        path = os.path.join(directory, "vm.json")
        try:
            with open(path, "rb") as file:
                config = VmConfig.from_json(file.read())
        except FileNotFoundError as error:
            raise NotFound(f'Error opening VM config snapshot file "{path}"') from error
        return config, self._make(config, "paused")

    def snapshot(self, directory: str, config: VmConfig, machine: FakeMachine) -> None:  # noqa: ARG002
        try:
            with open(os.path.join(directory, "vm.json"), "x", encoding="ascii") as file:
                file.write(config.to_json())
        except OSError as error:
            raise IoFailed("Error creating VM config snapshot file") from error

    def memory_mode(self, machine: FakeMachine, request: RestoreConfig) -> str:  # noqa: ARG002
        return "Copy" if request.eager else "OnDemand"

    def shown_config(self, machine: FakeMachine, config: VmConfig) -> VmConfig:  # noqa: ARG002
        return config

    def device_tree(self, machine: FakeMachine) -> dict[str, Any] | None:  # noqa: ARG002
        return None

    def _make(self, config: VmConfig, state: Literal["created", "paused"]) -> FakeMachine:
        if self.fail is not None:
            raise self.fail
        machine = FakeMachine(config, state)
        machine.fail, self.fail_next_resume = self.fail_next_resume, None
        self.machines.append(machine)
        return machine
