"""The real backend: machines of `freezeframe.machine`, snapshots of `freezeframe.store`, loaded when needed."""

from __future__ import annotations

from freezeframe.errors import Damaged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from freezeframe.backends.console import HostConsole
    from freezeframe.config import RestoreConfig, VmConfig
    from freezeframe.machine import Machine


class LiveBackend:
    """Machines on the engine that was asked for. `consoles`: host ends instead of the configured ones, by device id."""

    def __init__(self, engine: str | None = None, consoles: Mapping[str, HostConsole] | None = None) -> None:
        self._engine = engine
        self._consoles = consoles

    def boot(self, config: VmConfig) -> Machine:
        from freezeframe.machine import build_for_boot

        return build_for_boot(config, engine=self._engine, consoles=self._consoles)

    def reboot(self, machine: Machine, config: VmConfig) -> Machine:
        """Begins anew with the disks and consoles of a machine that ends here."""
        from freezeframe.machine import build_for_boot

        backends = machine.release()
        try:
            return build_for_boot(config, engine=self._engine, backends=backends)
        except BaseException:
            backends.close()
            raise

    def restore(self, directory: str, request: RestoreConfig) -> tuple[VmConfig, Machine]:
        from freezeframe.config.vm import VmConfig
        from freezeframe.machine import build_from_snapshot
        from freezeframe.store import SnapshotReader

        with SnapshotReader.open(directory) as reader:
            try:
                config = VmConfig.from_plain(reader.config)
            except ValueError as error:
                raise Damaged(f"{directory}/vm.json: the configuration: {error}", file=f"{directory}/vm.json") from None
            machine = build_from_snapshot(
                config,
                reader.state,
                reader.open_memory("copy" if request.eager else "ondemand"),
                engine=self._engine,
                clock=request.clock,
                disks={disk.id: disk.path for disk in request.disks},
                disk_check=request.disk_check,
                consoles=self._consoles,
            )
        return machine.config, machine

    def snapshot(self, directory: str, config: VmConfig, machine: Machine) -> None:
        from freezeframe.store import write_snapshot

        write_snapshot(
            directory,
            config=config.to_plain(),
            state=machine.save(),
            memory=machine.memory,
            engine=machine.engine.name,
        )

    def device_tree(self, machine: Machine) -> dict[str, Any] | None:
        return machine.device_tree()
