"""What control needs of the layers below it: a machine, and a way to make one. Tests put fakes in their place."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Protocol

    from freezeframe.config import RestoreConfig, VmConfig
    from freezeframe.errors import FreezeframeError

    class EngineReport(Protocol):
        """Which CPU engine runs a machine, and why that one."""

        @property
        def name(self) -> str: ...
        @property
        def reason(self) -> str: ...
        @property
        def warning(self) -> str | None: ...

    class StopReason(Protocol):
        """Why the vCPUs stopped by themselves: `poweroff`, `reset`, or `failed` with an error."""

        @property
        def kind(self) -> Literal["poweroff", "reset", "failed"]: ...
        @property
        def error(self) -> FreezeframeError | None: ...
        @property
        def status(self) -> int | None: ...

    class Machine(Protocol):
        """A live machine, built paused. (A backend only ever gets machines that it made.)

        It also has an attribute `on_stop: Callable[[StopReason], None]`, called once from the vCPU thread.
        """

        @property
        def state(self) -> Literal["created", "running", "paused", "shutdown"]: ...
        @property
        def engine(self) -> EngineReport: ...
        @property
        def start_note(self) -> str: ...
        def resume(self) -> None: ...
        def pause(self) -> None: ...
        def power_button(self) -> None: ...
        def counters(self) -> dict[str, dict[str, int]]: ...
        def faults(self) -> dict[str, str]: ...
        def close(self) -> None: ...

    class Backend(Protocol):
        """Makes machines and snapshots of them."""

        def boot(self, config: VmConfig) -> Machine:
            """A machine with its kernel loaded, paused before the first instruction."""
            ...

        def reboot(self, machine: Any, config: VmConfig) -> Machine:
            """Close a machine and give a new one with the same disks and consoles, as `boot` does."""
            ...

        def restore(self, directory: str, request: RestoreConfig) -> tuple[VmConfig, Machine]:
            """The machine of a snapshot, paused, and its configuration as it now is."""
            ...

        def snapshot(self, directory: str, config: VmConfig, machine: Any) -> None:
            """Write a paused machine into an existing directory."""
            ...

        def memory_mode(self, machine: Any, request: RestoreConfig) -> str:
            """How memory was really restored: `Copy` or `OnDemand`."""
            ...

        def shown_config(self, machine: Any, config: VmConfig) -> VmConfig:
            """The configuration as `vm.info` shows it: with the names of pseudo terminals."""
            ...

        def device_tree(self, machine: Any) -> dict[str, Any] | None:
            """CH's `device_tree`, where the machine knows one."""
            ...
