"""The real backend: machines of `freezeframe.machine`, snapshots of `freezeframe.store`, loaded when needed."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from freezeframe.config import RestoreConfig, VmConfig
    from freezeframe.machine import Machine


class LiveBackend:
    """Machines on the engine that was asked for.

    `capture`: for programs: how many bytes of console output to keep for them. A console on the terminal is then the
    program's instead; the configuration, and with it every snapshot, still says what it said.
    """

    def __init__(self, engine: str | None = None, *, capture: int = 0) -> None:
        self._engine = engine
        self._capture = capture

    def boot(self, config: VmConfig) -> Machine:
        from freezeframe.machine import build_for_boot

        return build_for_boot(self._for_us(config), engine=self._engine, capture=self._capture)

    def reboot(self, machine: Machine, config: VmConfig) -> Machine:
        """Begins anew with the disks and consoles of a machine that ends here."""
        from freezeframe.machine import build_for_boot

        backends = machine.release()
        try:
            return build_for_boot(self._for_us(config), engine=self._engine, backends=backends)
        except BaseException:
            backends.close()
            raise

    def restore(self, directory: str, request: RestoreConfig) -> tuple[VmConfig, Machine]:
        from freezeframe.machine import build_from_snapshot
        from freezeframe.machine.engine import choose, memory_at_once
        from freezeframe.store import SnapshotReader

        # A processor does not ask before it reads memory: where the kernel does not tell us, all of it is taken now.
        why = memory_at_once(choose(self._engine))
        eager = request.eager or why is not None

        with SnapshotReader.open(directory) as reader:
            config = reader.read_config()
            machine = build_from_snapshot(
                self._for_us(config),
                reader.state,
                reader.open_memory("copy" if eager else "ondemand"),
                engine=self._engine,
                clock=request.clock,
                disks={disk.id: disk.path for disk in request.disks},
                disk_check=request.disk_check,
                capture=self._capture,
            )
        if why is not None and not request.eager:
            machine.engine.reason += f"; memory was restored at once: {why}"
        return machine.config.replace(console=config.console, serial=config.serial), machine

    def snapshot(self, directory: str, config: VmConfig, machine: Machine) -> None:
        from freezeframe.store import write_snapshot

        write_snapshot(
            directory,
            config=config.to_plain(),
            state=machine.save(),
            memory=machine.memory,
            engine=machine.engine.name,
        )

    def memory_mode(self, machine: Machine, request: RestoreConfig) -> str:  # noqa: ARG002
        return "Copy" if machine.memory.lazy is None else "OnDemand"

    def shown_config(self, machine: Machine, config: VmConfig) -> VmConfig:
        consoles = machine.backends.consoles
        if config.console.mode == "Pty" and "__console" in consoles:
            config = config.replace(console=config.console.replace(file=consoles["__console"].path))
        if config.serial.mode == "Pty" and "__serial" in consoles:
            config = config.replace(serial=config.serial.replace(file=consoles["__serial"].path))
        return config

    def device_tree(self, machine: Machine) -> dict[str, Any] | None:
        return machine.device_tree()

    def _for_us(self, config: VmConfig) -> VmConfig:
        if not self._capture:
            return config
        if config.console.mode == "Tty":
            config = config.replace(console=config.console.replace(mode="Null"))
        if config.serial.mode == "Tty":
            config = config.replace(serial=config.serial.replace(mode="Null"))
        return config
