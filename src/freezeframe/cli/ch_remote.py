"""`ch-remote`: Cloud Hypervisor's remote control, for its VMM and ours.

What it prints and how it exits is v53's: the raw reply on stdout, error chains on stderr, 0, 1, or 2 for usage.
"""

from __future__ import annotations

import sys

from freezeframe.cli.arguments import Command, Option, Positional
from freezeframe.cli.chain import print_chain
from freezeframe.errors import FreezeframeError, Refused, chain_messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from freezeframe.client import Connection, Response

PROGRAM = "ch-remote"
# Statuses by the names that CH's client has for them; it knows no others.
_STATUSES = {
    400: "BadRequest",
    404: "NotFound",
    429: "TooManyRequests",
    500: "InternalServerError",
    501: "NotImplemented",
}

_SIZE_HELP = "in bytes (supports K/M/G suffix)"
_RESTORE_HELP = (
    "source_url=<source_url>,prefault=on|off,memory_restore_mode=copy|ondemand,resume=on|off,"
    "clock=advance|freeze,disks=[<disk_id>@<path>,...],disk_check=on|off"
)


def _simple(name: str, about: str) -> Command:
    return Command(name, about)


def _config(name: str, about: str, argument: str) -> Command:
    return Command(name, about, positionals=(Positional(argument, "", required=False),))


COMMANDS = Command(
    PROGRAM,
    "Remotely control a cloud-hypervisor VMM.",
    (
        Option("api-socket", "HTTP API socket path (UNIX domain socket)."),
        Option("version", "Print version", values="none", short="V"),
    ),
    commands=(
        _config("add-device", "Add VFIO device", "device_config"),
        _config("add-disk", "Add block device", "disk_config"),
        _config("add-fs", "Add virtio-fs backed fs device", "fs_config"),
        _config("add-generic-vhost-user", "Add generic vhost-user device", "generic_vhost_user_config"),
        _config("add-net", "Add network device", "net_config"),
        _config("add-pmem", "Add persistent memory device", "pmem_config"),
        _config("add-user-device", "Add userspace device", "device_config"),
        _config("add-vdpa", "Add vDPA device", "vdpa_config"),
        _config("add-vsock", "Add vsock device", "vsock_config"),
        _simple("boot", "Boot a created VM"),
        _config("coredump", "Create a coredump from VM", "coredump_config"),
        _simple("counters", "Counters from the VM"),
        Command(
            "create",
            "Create VM from a JSON configuration",
            positionals=(Positional("path", "JSON file, - for stdin", required=False, default="-"),),
        ),
        _simple("delete", "Delete a VM"),
        _simple("info", "Info on the VM"),
        _simple("nmi", "Trigger NMI"),
        _simple("pause", "Pause the VM"),
        _simple("ping", "Ping the VMM to check for API server availability"),
        _simple("power-button", "Trigger a power button in the VM"),
        _simple("reboot", "Reboot the VM"),
        _config("receive-migration", "Receive a VM migration", "receive_migration_config"),
        _config("remove-device", "Remove VFIO and PCI device", "id"),
        Command(
            "resize",
            "Resize the VM",
            (
                Option("balloon", f"New balloon size {_SIZE_HELP}"),
                Option("cpus", "New vCPUs count"),
                Option("memory", f"New memory size {_SIZE_HELP}"),
            ),
        ),
        Command(
            "resize-disk",
            "Resize an attached disk",
            (Option("disk", "Disk identifier"), Option("size", "New disk size")),
        ),
        Command(
            "resize-zone",
            "Resize a memory zone",
            (Option("id", "Memory zone identifier"), Option("size", f"New memory zone size {_SIZE_HELP}")),
        ),
        Command("restore", "Restore VM from a snapshot", positionals=(Positional("restore_config", _RESTORE_HELP),)),
        _simple("resume", "Resume the VM"),
        _config("send-migration", "Initiate a VM migration", "send_migration_config"),
        _simple("shutdown", "Shutdown the VM"),
        _simple("shutdown-vmm", "Shutdown the VMM"),
        Command(
            "snapshot", "Create a snapshot from VM", positionals=(Positional("snapshot_config", "<destination_url>"),)
        ),
    ),
)


class ServerError(FreezeframeError):
    """The server refused; `texts` is its error array."""

    code = "server"

    def __init__(self, response: Response) -> None:
        name = _STATUSES.get(response.status, "Unknown")
        super().__init__(f"Server responded with {name}")
        self.texts = [self.message]
        try:
            body = response.json()
        except ValueError as error:
            self.remark: str | None = (
                f"Can't get remote's error messages from JSON response: {error}: body='{response.body!r}'"
            )
            return
        self.remark = None
        self.texts += [str(text) for text in body] if isinstance(body, list) else [str(body)]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def main() -> int:
    """Run with the process' arguments; the exit status."""
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(COMMANDS.help_text())
        return 2
    if arguments[0] in ("-V", "--version"):
        from freezeframe import __version__

        print(f"{PROGRAM} v53.0 (freezeframe {__version__})")
        return 0
    values = COMMANDS.parse(arguments)
    name, given = values["command"]
    if "api-socket" not in values:
        return _log("Please provide the API socket: --api-socket <path>")
    try:
        method, action, body = _REQUESTS.get(name, _plain)(name, given)
    except (FreezeframeError, OSError) as error:
        print_chain(PROGRAM, chain_messages(error))
        return 1
    try:
        return _perform(_socket_path(values["api-socket"]), name, (method, action, body))
    except KeyboardInterrupt:
        return 130


def _socket_path(text: str) -> str:
    return text.removeprefix("path=")


def _perform(socket: str, name: str, request: tuple[str, str, bytes | None]) -> int:
    from freezeframe.client import Connection

    method, action, body = request

    try:
        connection = Connection(socket)
    except FreezeframeError as error:
        return _log(": ".join(chain_messages(error)))
    try:
        with connection:
            if name in _UNTRANSLATED:
                _refuse_others(connection, name)
            response = connection.request(method, f"/api/v1/{action}", body)
        if not response.ok:
            raise ServerError(response)
    except ServerError as error:
        texts = ["http client error", *error.texts]
        print_chain(PROGRAM, texts)
        if error.remark:
            sys.stderr.write(f"  {error.remark}\n")
        return 1
    except FreezeframeError as error:
        print_chain(PROGRAM, ["http client error", *chain_messages(error)])
        return 1
    return 0 if response.body is None else _print(response.body + b"\n")


def _refuse_others(connection: Connection, name: str) -> None:
    """Cloud Hypervisor would act on the empty configuration that our server refuses."""
    response = connection.get("vmm.ping")
    try:
        version = response.json()["build_version"]
    except (ValueError, TypeError, KeyError):
        version = None
    if "freezeframe" not in str(version):
        raise Refused(
            f"{name}: this client does not know its configuration and would send an empty one to {version}",
            hint="use the ch-remote of that VMM",
        )


def _print(data: bytes) -> int:
    import os

    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        print_chain(PROGRAM, ["Error writing the reply", *chain_messages(error)])
        return 1
    return 0


def _log(text: str) -> int:
    """An error before there is a connection: CH writes only a line of log."""
    import time

    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(f"[{stamp} ERROR ch_remote] {text}\n")
    return 1


# Requests: REST method, action and body of each subcommand.


def _plain(name: str, _given: dict[str, Any]) -> tuple[str, str, bytes | None]:
    if name in ("ping", "shutdown-vmm"):
        return ("GET", "vmm.ping", None) if name == "ping" else ("PUT", "vmm.shutdown", None)
    return ("GET" if name in ("info", "counters") else "PUT", f"vm.{name}", None)


def _json(name: str, value: object) -> tuple[str, str, bytes]:
    from freezeframe._core import json_line

    return "PUT", f"vm.{name}", json_line(value)


def _snapshot(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    return _json(name, {"destination_url": given["snapshot_config"]})


def _restore(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    from freezeframe.options.restore import parse_restore, restore_request

    try:
        config = parse_restore(given["restore_config"])
        if config.net_fds or config.vfio_fds:
            raise Refused("net_fds and vfio_fds are not supported: this client passes no file descriptors")
    except Refused as error:
        raise Refused("Error parsing restore syntax") from error
    return _json(name, restore_request(config))


def _create(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    path = given["path"]
    if path == "-":
        return "PUT", f"vm.{name}", sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return "PUT", f"vm.{name}", file.read()
    except OSError as error:
        raise Refused("Error reading from file") from error


def _size(text: str, what: str) -> int:
    from freezeframe.options.syntax import byte_size

    try:
        return byte_size(text)
    except ValueError:
        raise Refused(what) from Refused(f"invalid value: {text}")


def _resize(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    request: dict[str, int | None] = {"desired_vcpus": None, "desired_ram": None, "desired_balloon": None}
    if "cpus" in given:
        if not (given["cpus"].isascii() and given["cpus"].isdigit()):
            raise Refused("Error parsing CPU count") from Refused("invalid digit found in string")
        request["desired_vcpus"] = int(given["cpus"])
    if "memory" in given:
        request["desired_ram"] = _size(given["memory"], "Error parsing memory size")
    if "balloon" in given:
        request["desired_balloon"] = _size(given["balloon"], "Error parsing balloon size")
    return _json(name, request)


def _resize_disk(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    return _json(name, {"id": given.get("disk"), "desired_size": _size(given.get("size", ""), "Invalid disk size")})


def _resize_zone(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    size = _size(given.get("size", ""), "Error parsing memory size")
    return _json(name, {"id": given.get("id"), "desired_ram": size})


def _configured(name: str, given: dict[str, Any]) -> tuple[str, str, bytes]:
    """Devices and migrations that our server refuses whatever their configuration says."""
    return _json(name, {key: value for key, value in given.items() if key == "id"})


# Whose configuration is not translated, because our server refuses them all.
_UNTRANSLATED = frozenset(
    name
    for name in COMMANDS.commands
    if name.startswith("add-") or name in ("coredump", "send-migration", "receive-migration")
)
_REQUESTS: dict[str, Callable[[str, dict[str, Any]], tuple[str, str, bytes | None]]] = {
    "snapshot": _snapshot,
    "restore": _restore,
    "create": _create,
    "resize": _resize,
    "resize-disk": _resize_disk,
    "resize-zone": _resize_zone,
    **dict.fromkeys((*_UNTRANSLATED, "remove-device"), _configured),
}


if __name__ == "__main__":
    sys.exit(main())
