"""`--restore` and `ch-remote restore`: CH's keys, and ours: `clock`, `disks`, `disk_check`."""

from __future__ import annotations

from freezeframe.config.restore import RestoreConfig, RestoredDisk, RestoredNetConfig, RestoredVfioConfig, ZoneUpdate
from freezeframe.errors import Refused
from freezeframe.options.syntax import OptionError, Options, integer, integer_list, pairs, variant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KEYS = (
    "source_url",
    "prefault",
    "memory_restore_mode",
    "net_fds",
    "vfio_fds",
    "iommufd_fd",
    "resume",
    "zone_updates",
    "clock",
    "disks",
    "disk_check",
)
_MODES = {"copy": "Copy", "ondemand": "OnDemand"}


def _mode(text: str) -> Any:
    mode = _MODES.get(text.lower())
    if mode is None:
        raise ValueError(text)
    return mode


def parse_restore(text: str) -> RestoreConfig:
    """`Refused` with CH's chain of texts for what it does not understand."""
    try:
        options = Options(text, _KEYS)
        source_url = options.text("source_url")
        if source_url is None:
            raise Refused("Error parsing --restore: source_url missing")
        net = options.maybe("net_fds", lambda value: [(i, integer_list(fds)) for i, fds in pairs(value)]) or []
        zones = options.maybe("zone_updates", lambda value: [(i, integer(node, 32)) for i, node in pairs(value)]) or []
        vfio = options.maybe("vfio_fds", lambda value: [(i, integer(fd, 31)) for i, fd in pairs(value)]) or []
        return RestoreConfig(
            source_url=source_url,
            prefault=options.toggle("prefault", default=False),
            memory_restore_mode=options.maybe("memory_restore_mode", _mode),
            net_fds=tuple(RestoredNetConfig(id=i, num_fds=len(fds), fds=fds) for i, fds in net) or None,
            vfio_fds=tuple(RestoredVfioConfig(id=i) for i, _ in vfio) or None,
            iommufd_fd=options.maybe("iommufd_fd", lambda value: integer(value, 31)),
            resume=options.toggle("resume", default=False),
            zone_updates=tuple(ZoneUpdate(id=i, host_numa_node=node) for i, node in zones),
            clock=options.convert("clock", variant("advance", "freeze"), "Advance"),
            disks=tuple(RestoredDisk(id=i, path=path) for i, path in options.maybe("disks", pairs) or ()),
            disk_check=options.toggle("disk_check", default=True),
        )
    except OptionError as error:
        raise Refused("Error parsing --restore") from error


def restore_request(config: RestoreConfig) -> dict[str, object]:
    """The REST body: only what differs from the defaults, so that CH's own server takes it too."""
    plain = config.to_plain()
    return {name: value for name, value in plain.items() if value != config.fields[name].default and value != []}
