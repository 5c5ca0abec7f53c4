"""The closed list of actions, by Cloud Hypervisor's names. REST, `ch-remote` and the Python API all make these."""

from __future__ import annotations

from freezeframe.control.vmm import Vmm, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    from freezeframe.config.record import Record


class Action:
    """One action: its REST name and method, the record that its body holds, and what it does.

    `run` takes the VMM (and the record) and gives the reply's plain value, or None for an empty reply.
    """

    __slots__ = ("_body", "empty_reply", "method", "name", "run")

    def __init__(
        self,
        name: str,
        method: Literal["GET", "PUT"],
        run: Callable[..., Any],
        body: Callable[[], type[Record]] | None = None,
        *,
        empty_reply: bool = False,
    ) -> None:
        self.name = name
        self.method = method
        self.run = run
        self._body = body
        self.empty_reply = empty_reply

    @property
    def takes_body(self) -> bool:
        return self._body is not None

    def read_body(self, document: bytes) -> Record:
        """The record of a body; `ValueError` with serde_json's text."""
        assert self._body is not None
        return self._body().from_json(document)


def _vm_config() -> type[Record]:
    from freezeframe.config import VmConfig

    return VmConfig


def _restore_config() -> type[Record]:
    from freezeframe.config import RestoreConfig

    return RestoreConfig


def _snapshot_config() -> type[Record]:
    from freezeframe.config import SnapshotConfig

    return SnapshotConfig


def _resize_data() -> type[Record]:
    from freezeframe.config import ResizeData

    return ResizeData


def _any() -> type[Record]:
    from freezeframe.config import AnyBody

    return AnyBody


def _lacking(name: str, top: str) -> Action:
    def refuse(_vmm: Vmm, _body: Record) -> None:
        unsupported(top, name)

    return Action(name, "PUT", refuse, _any)


ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        Action("vmm.ping", "GET", Vmm.ping),
        Action("vmm.shutdown", "PUT", Vmm.vmm_shutdown, empty_reply=True),
        Action("vm.info", "GET", Vmm.info),
        Action("vm.counters", "GET", Vmm.counters),
        Action("vm.create", "PUT", Vmm.create, _vm_config),
        Action("vm.delete", "PUT", Vmm.delete),
        Action("vm.boot", "PUT", Vmm.boot),
        Action("vm.pause", "PUT", Vmm.pause),
        Action("vm.resume", "PUT", Vmm.resume),
        Action("vm.snapshot", "PUT", Vmm.snapshot, _snapshot_config),
        Action("vm.restore", "PUT", Vmm.restore, _restore_config),
        Action("vm.shutdown", "PUT", Vmm.shutdown),
        Action("vm.reboot", "PUT", Vmm.reboot),
        Action("vm.power-button", "PUT", Vmm.power_button),
        Action("vm.nmi", "PUT", Vmm.nmi),
        Action("vm.resize", "PUT", Vmm.resize, _resize_data),
        _lacking("vm.resize-disk", "The disk could not be resized"),
        _lacking("vm.resize-zone", "The memory zone could not be resized"),
        _lacking("vm.add-device", "The device could not be added to the VM"),
        _lacking("vm.add-disk", "The disk could not be added to the VM"),
        _lacking("vm.add-fs", "The fs could not be added to the VM"),
        _lacking("vm.add-generic-vhost-user", "The generic vhost-user device could not be added to the VM"),
        _lacking("vm.add-net", "The network device could not be added to the VM"),
        _lacking("vm.add-pmem", "The pmem device could not be added to the VM"),
        _lacking("vm.add-user-device", "The user device could not be added to the VM"),
        _lacking("vm.add-vdpa", "The vDPA device could not be added to the VM"),
        _lacking("vm.add-vsock", "The vsock device could not be added to the VM"),
        _lacking("vm.remove-device", "The device could not be removed from the VM"),
        _lacking("vm.coredump", "The VM could not be coredumped"),
        _lacking("vm.send-migration", "Error dispatching the migration worker"),
        _lacking("vm.receive-migration", "Error receiving migration"),
    )
}
