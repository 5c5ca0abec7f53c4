"""`freezeframe run`: a machine in the foreground, its serial port on the terminal, gone when it ends.

With `--multiboot` and `--test-devices` it is what small system programs and CPU test suites expect of QEMU.
"""

from __future__ import annotations

import sys

from freezeframe.config.vm import CPU_FEATURES
from freezeframe.errors import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from threading import Timer
    from typing import Any

    from freezeframe.config import VmConfig
    from freezeframe.control.vmm import Vmm

TIMED_OUT = 124  # as timeout(1)
DEVICES = {"testdev": "Testdev", "debug-exit": "DebugExit", "fw-cfg": "FwCfg", "pic-pit": "PicPit"}


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs a machine until it ends. Exit status: what the guest wrote to isa-debug-exit (value << 1 | 1), else 0 "
        "for a guest that powered off; 1 when it could not start or go on; 124 when its time was up."
    )
    add = parser.add_argument
    add("--kernel", required=True, metavar="FILE", help="a bzImage, or an ELF file with a PVH entry point")
    add("--multiboot", action="store_true", help="the kernel is a multiboot 1 image (ELF, or with a.out addresses)")
    add("--initramfs", "--initrd", metavar="FILE", help="initramfs; the one module of a multiboot image")
    add("--cmdline", metavar="TEXT", help="command line of the kernel")
    add("--cpus", type=int, default=1, metavar="N", help="virtual CPUs (default: %(default)s)")
    add("--cpu", metavar="LIST", help=f"change what the CPUs show: +NAME or -NAME of {', '.join(CPU_FEATURES)}")
    add("--memory", default="512M", metavar="SIZE", help="RAM, with suffix K, M or G (default: %(default)s)")
    add(
        "--disk",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="as cloud-hypervisor's: path=FILE,readonly=on|off…",
    )
    add("--serial", default="tty", metavar="WHERE", help="off, null, tty, pty or file=PATH (default: %(default)s)")
    add("--console", default="off", metavar="WHERE", help="virtio console, likewise (default: %(default)s)")
    add("--engine", choices=("auto", "kvm", "software"), default="auto", help="CPU engine (default: %(default)s)")
    add(
        "--test-devices",
        nargs="?",
        const="all",
        metavar="LIST",
        help=f"devices for test programs: all, or some of {', '.join(DEVICES)}, with commas between (default: none)",
    )
    add(
        "--no-reboot",
        action="store_true",
        help="a reset, or a triple fault, ends the machine (exit status 0, as QEMU's)",
    )
    add("--timeout", type=float, metavar="SECONDS", help="end the machine after this time, exit status 124")
    add("--api-socket", metavar="PATH", help="answer ch-remote on this socket: pause, snapshot, …")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = _config(args)
    return execute(
        config, engine=args.engine, no_reboot=args.no_reboot, timeout=args.timeout, api_socket=args.api_socket
    )


def execute(
    config: VmConfig,
    *,
    engine: str | None = None,
    no_reboot: bool = False,
    timeout: float | None = None,
    api_socket: str | None = None,
) -> int:
    """Runs a machine in this process until it ends; the exit status. `timeout` in seconds."""
    from freezeframe.cli.cloud_hypervisor import catch_signals, ensure_standard_descriptors
    from freezeframe.control.live import LiveBackend
    from freezeframe.control.vmm import Vmm

    ensure_standard_descriptors()
    vmm = Vmm(LiveBackend(engine), no_reboot=no_reboot)
    catch_signals(vmm)
    listener = server = timer = None
    try:
        if api_socket:
            from freezeframe.api.listener import Listener

            listener = Listener.bind(api_socket)
        _start(vmm, config)
        if listener is not None:
            from freezeframe.api.server import ApiServer

            server = ApiServer(vmm, listener)
            server.start()
        if timeout is not None:
            timer = _end_after(timeout, vmm)
        return vmm.run()
    finally:
        if timer is not None:
            timer.cancel()
        vmm.close()
        if server is not None:
            server.close()
        elif listener is not None:
            listener.close()


def _end_after(seconds: float, vmm: Vmm) -> Timer:
    from threading import Timer

    def end() -> None:
        print(f"freezeframe run: the machine did not end within {seconds:g} s", file=sys.stderr)
        vmm.request_exit(TIMED_OUT)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _start(vmm: Vmm, config: VmConfig) -> None:
    from freezeframe.control.failures import ActionFailed, bottom

    try:
        vmm.create(config)
        vmm.boot()
    except ActionFailed as failure:
        error = bottom(failure)
        raise error from error.__cause__


def _config(args: argparse.Namespace) -> VmConfig:
    from freezeframe.config import refuse_unsupported, validate
    from freezeframe.options.vm import parse_vm

    values: dict[str, Any] = {
        "kernel": args.kernel,
        "initramfs": args.initramfs,
        "cmdline": args.cmdline,
        "cpus": f"boot={args.cpus}",
        "memory": f"size={args.memory}",
        "disk": args.disk,
        "serial": args.serial,
        "console": args.console,
    }
    config = parse_vm(values)
    if args.multiboot:
        assert config.payload is not None
        config = config.replace(payload=config.payload.replace(multiboot=True))
    if args.cpu:
        config = config.replace(cpus=config.cpus.replace(changes=_changes(args.cpu)))
    config = config.replace(test_devices=_devices(args.test_devices))
    validate(config)
    refuse_unsupported(config)
    return config


def _changes(text: str) -> tuple[str, ...]:
    changes = tuple(text.split(","))
    for change in changes:
        if change[:1] not in ("+", "-") or change[1:] not in CPU_FEATURES:
            raise Refused(f"no change of the CPU {change!r}", hint=f"+ or - and one of {', '.join(CPU_FEATURES)}")
    return changes


def _devices(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    if text == "all":
        return tuple(DEVICES.values())
    names = text.split(",")
    for name in names:
        if name not in DEVICES:
            raise Refused(f"no test device {name!r}", hint=f"all, or some of {', '.join(DEVICES)}")
    return tuple(DEVICES[name] for name in names)
