"""`freezeframe-qemu`: the few options of `qemu-system-x86_64` by which test suites start their programs.

For harnesses that know how to call QEMU and nothing else, such as kvm-unit-tests' (`QEMU=freezeframe-qemu ACCEL=tcg
./run_tests.sh`). It translates them to what `freezeframe run` does. As QEMU does, it warns of CPU features that it
lacks and goes on; all else that it does not know ends it.
"""

from __future__ import annotations

import sys

from freezeframe.config.vm import CPU_FEATURES
from freezeframe.errors import FreezeframeError, Refused, chain_messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from freezeframe.config import VmConfig

# What harnesses ask for the version of; the release whose options these are.
VERSION = "QEMU emulator version 10.0.0"
HELP = """\
usage: freezeframe-qemu [options]

-kernel FILE      multiboot 1 image, bzImage or ELF file with a PVH entry point
-initrd FILE      module or initramfs
-append TEXT      command line
-smp N            virtual CPUs (default 1)
-m SIZE           RAM in MiB, or with suffix M or G (default 128)
-cpu MODEL        any model is the same CPU; max has all that there is; then ,+NAME and ,-NAME
-accel, -machine  accel=tcg: the software engine; accel=kvm: the KVM engine
-device NAME      pc-testdev; isa-debug-exit,iobase=0xf4,iosize=0x4
-serial WHERE     stdio, null or file:PATH
-no-reboot        a reset ends the machine
-display none, -vnc none, -nographic, -nodefaults, -global kvm-pit.lost_tick_policy=discard: as it is anyhow
-device help      the devices there are
-help, -version
"""
DEVICES = """\
System bus devices:
name "isa-debug-exit", bus ISA
name "pc-testdev", bus ISA
"""
# Options that take a value, and those that do not.
WITH_VALUE = frozenset(
    (
        "accel",
        "append",
        "cpu",
        "device",
        "display",
        "global",
        "initrd",
        "kernel",
        "m",
        "machine",
        "M",
        "serial",
        "smp",
        "vnc",
    )
)
ALONE = frozenset(("no-reboot", "nodefaults", "nographic", "h", "help", "version"))
# Words for what every guest is shown: asking for them changes nothing.
ALWAYS = frozenset(("tsc-deadline", "tsc_adjust", "tsc-adjust", "smep", "nx", "host-phys-bits", "invtsc"))
MULTIBOOT_MAGIC, MULTIBOOT_WITHIN = (0x1BAD_B002).to_bytes(4, "little"), 8192
MACHINES = frozenset(("pc", "q35", "microvm"))


class Call:
    """What a command line asks for."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.devices: list[str] = []
        self.accel = "tcg"
        self.no_reboot = False
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(f"freezeframe-qemu: warning: {text}")


def main() -> int:
    """Run with the process' arguments; the exit status."""
    try:
        return _run(sys.argv[1:])
    except (FreezeframeError, OSError) as error:
        for text in chain_messages(error):
            print(f"freezeframe-qemu: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(words: Sequence[str]) -> int:
    call = Call()
    for name, value in _options(words):
        if name in ("h", "help", "version"):
            from freezeframe import __version__

            print(f"{VERSION} (its options, by freezeframe {__version__})")
            if name != "version":
                print(HELP, end="")
            return 0
        if name == "device" and value in ("?", "help"):
            print(DEVICES, end="")
            return 0
        _take(call, name, value)
    config = _config(call)
    for text in call.warnings:
        print(text, file=sys.stderr)
    from freezeframe.cli.run_cmd import execute

    return execute(config, engine="kvm" if call.accel == "kvm" else "software", no_reboot=call.no_reboot)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name without dashes, value or ""), in order."""
    given = iter(words)
    for word in given:
        name = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or name not in WITH_VALUE | ALONE:
            raise Refused(f"{word}: not an option that is known here", hint="freezeframe-qemu -help")
        if name in ALONE:
            yield name, ""
            continue
        value = next(given, None)
        if value is None:
            raise Refused(f"{word}: it needs a value")
        yield name, value


def _take(call: Call, name: str, value: str) -> None:
    if name == "device":
        call.devices.append(_device(value))
    elif name == "accel":
        call.accel = value.split(",", maxsplit=1)[0]
    elif name in ("machine", "M"):
        for part in value.split(","):
            key, equals, what = part.partition("=")
            if key == "accel":
                call.accel = what
            elif equals and key == "pit":
                call.warn(f"-machine {part}: there is a PIT all the same")
            elif part not in MACHINES and not (key == "type" and what in MACHINES):
                raise Refused(f"-machine {part}: not known here")
    elif name == "no-reboot":
        call.no_reboot = True
    elif name == "global":
        if value != "kvm-pit.lost_tick_policy=discard":
            raise Refused(f"-global {value}: not known here")
    elif name in ("display", "vnc"):
        if value != "none":
            raise Refused(f"-{name} {value}: there is no display, only none")
    elif name == "nographic":
        call.values.setdefault("serial", "stdio")
    elif name != "nodefaults":
        call.values[name] = value


def _device(text: str) -> str:
    name, *properties = text.split(",")
    if name == "pc-testdev" and not properties:
        return "Testdev"
    if name == "isa-debug-exit":
        numbers = {key: value for key, _, value in (part.partition("=") for part in properties)}
        try:
            where = int(numbers.pop("iobase", "0x501"), 0), int(numbers.pop("iosize", "2"), 0)
        except ValueError:
            raise Refused(f"-device {text}: not a number") from None
        if where == (0xF4, 4) and not numbers:
            return "DebugExit"
        raise Refused(f"-device {text}: only at iobase=0xf4,iosize=0x4")
    raise Refused(f"-device {text}: '{name}' is not a valid device model name here")


def _config(call: Call) -> VmConfig:
    from freezeframe.config import refuse_unsupported, validate
    from freezeframe.options.vm import parse_vm

    if call.accel not in ("tcg", "kvm"):
        raise Refused(f"accel={call.accel}: tcg or kvm")
    values = call.values
    kernel = values.get("kernel")
    if kernel is None:
        raise Refused("no -kernel is given")
    multiboot = _is_multiboot(kernel)
    wanted: dict[str, Any] = {
        "kernel": kernel,
        "initramfs": values.get("initrd"),
        "cmdline": values.get("append"),
        "cpus": f"boot={_cpus(values.get('smp', '1'))}",
        "memory": f"size={_memory(values.get('m', '128'))}",
        "serial": _serial(values.get("serial", "null")),
        "console": "off",
    }
    config = parse_vm(wanted)
    assert config.payload is not None
    config = config.replace(
        payload=config.payload.replace(multiboot=multiboot),
        cpus=config.cpus.replace(changes=_changes(call, values.get("cpu", "max")) or None),
        test_devices=(*dict.fromkeys(call.devices), "FwCfg", "PicPit"),
    )
    validate(config)
    refuse_unsupported(config)
    return config


def _is_multiboot(path: str) -> bool:
    """Whether the magic number is where a header may be; the loader looks closer.

    Harnesses try a file that is not there, and look for QEMU's words.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(MULTIBOOT_WITHIN)
    except OSError as error:
        raise Refused(f"could not load kernel '{path}': {error.strerror}") from None
    return any(head[at : at + 4] == MULTIBOOT_MAGIC for at in range(0, len(head), 4))


def _cpus(text: str) -> int:
    number = text.split(",", maxsplit=1)[0].removeprefix("cpus=")
    if not number.isdigit() or "," in text:
        raise Refused(f"-smp {text}: only a number of CPUs")
    return int(number)


def _memory(text: str) -> str:
    size = text.removeprefix("size=").upper()
    return f"{size}M" if size.isdigit() else size


def _serial(text: str) -> str:
    if text.startswith("file:"):
        return f"file={text.removeprefix('file:')}"
    names = {"stdio": "tty", "mon:stdio": "tty", "null": "null", "none": "off"}
    if text not in names:
        raise Refused(f"-serial {text}: stdio, null, none or file:PATH")
    return names[text]


def _changes(call: Call, text: str) -> tuple[str, ...]:
    """Of the CPU profile. A feature that there is not is a warning, as QEMU's TCG gives."""
    model, *parts = text.split(",")
    changes = [f"+{name}" for name in CPU_FEATURES if name != "x2apic"] if model in ("max", "host") else []
    for part in parts:
        name = part[1:]
        if part[:1] in ("+", "-") and name in CPU_FEATURES:
            changes.append(part)
        elif part[:1] == "+" and name not in ALWAYS:
            call.warn(f"this CPU does not have the requested feature {name}")
        elif part == "vendor=AuthenticAMD" or (part[:1] == "-" and name not in ALWAYS) or part in ALWAYS:
            continue
        elif part[:1] != "+":
            call.warn(f"-cpu {part}: this CPU cannot be changed so")
    return tuple(changes)


if __name__ == "__main__":
    sys.exit(main())
