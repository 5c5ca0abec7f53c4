"""The options of `cloud-hypervisor`: all of Cloud Hypervisor v53's (cloud-hypervisor/src/main.rs), and `--engine`."""

from __future__ import annotations

from freezeframe.cli.arguments import Command, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_VM = "vm-config"
_VMM = "vmm-config"
_PAYLOAD = "vm-payload"
_LOGGING = "logging"
_NOT_YET = "Not supported by this VMM; refused"
_DISK = (
    "path=<disk_image_path>,readonly=on|off,queue_size=<size_of_each_queue>,id=<device_id>,serial=<serial_number>,"
    "image_type=raw"
)
_RESTORE = (
    "source_url=file://<directory>,memory_restore_mode=copy|ondemand,prefault=on|off,resume=on|off,"
    "clock=advance|freeze,disks=[<disk_id>@<path>,...],disk_check=on|off"
)


def _many(name: str, help_text: str = _NOT_YET) -> Option:
    return Option(name, help_text, values="many", group=_VM)


def _flag(name: str, help_text: str, group: str) -> Option:
    return Option(name, help_text, values="none", group=group)


COMMAND = Command(
    "cloud-hypervisor",
    "Launch a cloud-hypervisor VMM.",
    (
        Option("api-socket", "HTTP API socket (UNIX domain socket): path=<path> or fd=<fd>.", group=_VMM),
        Option("balloon", _NOT_YET, group=_VM),
        Option("cmdline", "Kernel command line", group=_VM),
        Option("console", "Control (virtio) console: off|null|pty|tty|file=<path>", default="tty", group=_VM),
        Option(
            "cpus",
            "boot=<boot_vcpus>,profile=portable|host: portable, the default, is the same CPU on every host",
            default="boot=1,max_phys_bits=46",
            group=_VM,
        ),
        Option("dbus-object-path", _NOT_YET, group=_VMM),
        Option("dbus-service-name", _NOT_YET, group=_VMM),
        _flag("dbus-system-bus", _NOT_YET, _VMM),
        Option("debug-console", "Debug console: off", default="off,iobase=0xe9", group=_VM),
        _many("device"),
        _many("disk", _DISK),
        Option(
            "engine",
            "CPU engine; auto takes the best that this host can run (also by the variable FREEZEFRAME_ENGINE)",
            choices=("auto", "kvm", "software"),
            default="auto",
            group=_VMM,
        ),
        Option("event-monitor", "Path to report events on: path=<path> or fd=<fd>", group=_VMM),
        Option("firmware", _NOT_YET, group=_PAYLOAD),
        _many("fs"),
        Option("gdb", _NOT_YET, group=_VMM),
        _many("generic-vhost-user"),
        Option("initramfs", "Path to initramfs image", group=_VM),
        Option("kernel", "Path to kernel to load: a bzImage, or an ELF file with a PVH entry point", group=_PAYLOAD),
        _flag("landlock", _NOT_YET, _VM),
        _many("landlock-rules"),
        Option("log-file", "Log file. Standard error is used if not specified", group=_LOGGING),
        Option("log-format", _NOT_YET, group=_LOGGING),
        Option("memory", "size=<guest_memory_size>", default="size=512M", group=_VM),
        _many("memory-zone"),
        _many("net"),
        _flag("no-shutdown", "Do not exit the VMM when the guest shuts down", _VMM),
        _many("numa"),
        _many("pci-segment"),
        Option("platform", "Only its defaults are supported", group=_VM),
        _many("pmem"),
        _flag("pvpanic", _NOT_YET, _VM),
        _many("rate-limit-group"),
        Option("restore", f"Restore from a VM snapshot: {_RESTORE}", group=_VMM),
        Option("rng", "Random number generator parameters: src=/dev/urandom", default="src=/dev/urandom", group=_VM),
        Option("rtc", _NOT_YET, values="maybe", group=_VM),
        Option(
            "seccomp",
            "true, the default, is accepted; there is no filter yet",
            choices=("true", "false", "log", "errno"),
            default="true",
        ),
        Option("serial", "Control serial port: off|null|pty|tty|file=<path>", default="null", group=_VM),
        Option("tpm", _NOT_YET, group=_VM),
        _many("user-device"),
        Option("v", "Sets the level of debugging output", values="count", short="v", group=_LOGGING),
        _many("vdpa"),
        Option("version", "Print version", values="none", short="V"),
        Option("vsock", _NOT_YET, group=_VM),
        _flag("watchdog", _NOT_YET, _VM),
    ),
)


def check_groups(values: dict[str, Any]) -> None:
    """Options of a machine need a payload; CH's clap groups say the same."""
    of_machine = [option for option in COMMAND.options if option.group == _VM and option.name in values]
    if not of_machine or any(option.name in values for option in COMMAND.options if option.group == _PAYLOAD):
        return
    if "restore" in values:
        given = of_machine[0].display
        COMMAND.fail(f"the argument '{given}' cannot be used with '--restore <restore>': the snapshot says what it is")
    COMMAND.fail("the following required arguments were not provided:\n  <--firmware <firmware>|--kernel <kernel>>")
