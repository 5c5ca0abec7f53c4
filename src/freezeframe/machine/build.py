"""The two recipes. Nothing else differs between a machine that was booted and one that was restored."""

from __future__ import annotations

from freezeframe import _core
from freezeframe.devices import saved
from freezeframe.errors import Incompatible, NotSupported, Refused
from freezeframe.machine import board, tsc
from freezeframe.machine import engine as engines
from freezeframe.machine.backends import Backends
from freezeframe.machine.disk_check import check as check_disks
from freezeframe.machine.live import Machine
from freezeframe.machine.parts import ROWS, Parts, States, component_ids
from freezeframe.machine.repeatable import RepeatableMachine
from freezeframe.startup import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from freezeframe.config import PayloadConfig, VmConfig
    from freezeframe.machine.engine import EngineReport
    from freezeframe.startup.entry import Entry

YEAR_NS = 365 * 86_400 * 1_000_000_000
CLOCK_FIELDS = ("tsc_khz", "tsc", "boot_ns", "wall_ns", "host_wall_ns")


def build_for_boot(
    config: VmConfig,
    *,
    engine: str | None = None,
    capture: int = 0,
    backends: Backends | None = None,
) -> Machine:
    """Allocate memory → create devices from their default state → load kernel, write ACPI → paused.

    `capture`: bytes of console output to keep for programs. `backends`: those that `Machine.release` gave, when a
    machine is to begin anew; disks and consoles are not opened again then, and stay open when this raises. What is
    opened here is closed when it raises.
    """
    from freezeframe.startup import entry

    report = engines.choose(engine)
    config = config.with_device_ids()
    _check(config)
    payload = config.payload
    if payload is None:
        raise Refused("no kernel is given", hint="give one with --kernel")
    map_ = layout.address_map(config.memory.size, config.cpus.max_phys_bits)
    memory = _core.Memory(map_.regions)
    host_khz = tsc.host_khz()
    clock = _core.Clock(host_khz or tsc.FALLBACK_KHZ, host_khz)
    report = engines.settle(report, clock, memory, config.cpus, needs_software=_software_only(config))
    start = _load(config, payload, memory, map_)

    def set_vcpu(engine: _core.Engine, number: int) -> None:
        if number == 0:
            state = engine.state(0)
            entry.apply(state, start)
            if "PicPit" in (config.test_devices or ()):
                entry.wire_pic(state)
            engine.set_state(0, state)

    opened = backends or Backends(config, restored=False, capture=capture)
    try:
        parts = _build(Parts(config, report, memory, clock, opened), States(None), set_vcpu)
    except BaseException:
        if backends is None:
            opened.close()
        raise
    machine = Machine(parts, state="created")
    machine.start_note = start.note
    return machine


def _load(config: VmConfig, payload: PayloadConfig, memory: _core.Memory, map_: layout.AddressMap) -> Entry:
    """Kernel, module and tables into memory; where the boot CPU starts."""
    kernel = payload.kernel
    if kernel is None:
        raise Refused("no kernel is given", hint="give one with --kernel")
    from freezeframe.startup import acpi

    cmdline = payload.cmdline or ""
    platform = acpi.Platform(map_, tuple(range(config.cpus.boot_vcpus)), serial=config.serial.mode != "Off")
    if payload.multiboot:
        from freezeframe.startup import multiboot

        pc = "PicPit" in (config.test_devices or ())
        return multiboot.load(memory, kernel, payload.initramfs, cmdline, platform, pc=pc)
    from freezeframe.startup import loader

    return loader.load(memory, kernel, payload.initramfs, cmdline, platform)


def build_from_snapshot(
    config: VmConfig,
    state: Mapping[str, Any],
    memory: _core.Memory,
    *,
    engine: str | None = None,
    clock: str = "Advance",
    disks: Mapping[str, str] | None = None,
    disk_check: bool = True,
    capture: int = 0,
) -> Machine:
    """Allocate memory → create devices from their saved state → map memory, set vCPUs → paused.

    `state` is what `Machine.save` gave, untrusted; `memory` holds the RAM already. `clock`: `Advance` or `Freeze`.
    `disks`: other files in place of the configuration's, by id. Raises `Incompatible` when state, configuration, disks
    or this host do not fit together; then nothing is left open.
    """
    parts = _from_snapshot(
        config,
        state,
        memory,
        engines.choose(engine),
        make_clock=lambda saved: _restore_clock(saved, advance=clock == "Advance"),
        open_backends=lambda found: Backends(found, restored=True, capture=capture),
        disks=disks,
        disk_check=disk_check,
    )
    return Machine(parts, state="paused")


def build_repeatable(
    config: VmConfig,
    state: Mapping[str, Any],
    memory: _core.Memory,
    *,
    tier: str | None = None,
    seed: int = 0,
    disks: Mapping[str, str] | None = None,
    disk_check: bool = True,
    capture: int = 0,
) -> RepeatableMachine:
    """As `build_from_snapshot`, for runs that are the same each time: time is the count of instructions, random numbers
    follow from `seed`, and so does how far the wall clock is ahead of the snapshot's (0 for seed 0, else up to a year).

    What the guest writes to its disks is thrown away, the files are only read. Consoles are connected to nothing but
    `capture`. Always the software engine, on `tier`.
    """
    if "PicPit" in (config.test_devices or ()):
        raise NotSupported("a machine with a PIT cannot be run the same way twice: its timer follows the host's time")
    config = config.replace(
        console=config.console.replace(mode="Off" if config.console.mode == "Off" else "Null"),
        serial=config.serial.replace(mode="Off" if config.serial.mode == "Off" else "Null"),
    )
    parts = _from_snapshot(
        config,
        state,
        memory,
        engines.choose("software", tier),
        make_clock=lambda saved: _counted_clock(saved, seed),
        open_backends=lambda found: Backends(found, restored=True, capture=capture, overlays=True),
        disks=disks,
        disk_check=disk_check,
        seed=seed,
    )
    return RepeatableMachine(parts)


def _from_snapshot(
    config: VmConfig,
    state: Mapping[str, Any],
    memory: _core.Memory,
    report: EngineReport,
    *,
    make_clock: Callable[[Any], _core.Clock],
    open_backends: Callable[[VmConfig], Backends],
    disks: Mapping[str, str] | None,
    disk_check: bool,
    seed: int | None = None,
) -> Parts:
    substitutes = dict(disks or {})
    config = _substitute(config.with_device_ids(), substitutes)
    _check(config)
    parts_state = saved.keys("the machine", state, {"clock": 0, "vcpus": 0, "devices": 0, "disks": 0})
    map_ = layout.address_map(config.memory.size, config.cpus.max_phys_bits)
    if tuple(memory.regions) != map_.regions:
        raise Incompatible(
            f"the snapshot's memory is {memory.regions}, its configuration asks for {list(map_.regions)}"
        )
    devices = saved.keys("the devices", parts_state["devices"], dict.fromkeys(component_ids(config), 0))
    for name, device in devices.items():
        if not isinstance(device, dict):
            raise Incompatible(f"saved state of {name} is not a table of fields")
    vcpus: list[Any] = parts_state["vcpus"]
    if not isinstance(vcpus, list) or len(vcpus) != config.cpus.boot_vcpus:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise Incompatible(f"the snapshot does not have the states of {config.cpus.boot_vcpus} vCPUs")
    clock = make_clock(parts_state["clock"])
    report = engines.settle(report, clock, memory, config.cpus, vcpus, needs_software=_software_only(config))
    opened = open_backends(config)
    try:
        if disk_check:
            check_disks(opened.disks, parts_state["disks"], substitutes)
        return _build(
            Parts(config, report, memory, clock, opened, seed=seed),
            States(devices),
            lambda engine, number: engine.set_state(number, vcpus[number]),
        )
    except BaseException:
        opened.close()
        raise


def _build(parts: Parts, states: States, set_vcpu: Callable[[_core.Engine, int], None]) -> Parts:
    """What both recipes share: every device of the table from its state, then the engine that they talk to.

    `set_vcpu`: gives each vCPU its state. When something raises, nothing of what was built is left.
    """
    try:
        for there, _, build in ROWS:
            if there(parts.config):
                build(parts, states)
        parts.engine = _make_engine(parts, parts.report)
        board.connect(parts)
        for number in range(parts.config.cpus.boot_vcpus):
            set_vcpu(parts.engine, number)
    except BaseException:
        parts.close()
        raise
    return parts


def _make_engine(parts: Parts, report: EngineReport) -> _core.Engine:
    cpus = parts.config.cpus
    engine = _core.Engine(
        report.name,
        parts.memory,
        parts.bus,
        parts.clock,
        parts.control,
        parts.ioapic,
        parts.msi,
        vcpus=cpus.boot_vcpus,
        phys_bits=cpus.max_phys_bits,
        changes=cpus.changes or (),
        tier=report.tier,
    )
    if engine.untranslated is not None:
        report.warning = (
            f"code is interpreted, which is several times slower: no translator on this host: {engine.untranslated}"
        )
    return engine


def _software_only(config: VmConfig) -> str | None:
    """What of a machine only the software engine can do."""
    if config.cpus.changes:
        return f"other CPU profile ({','.join(config.cpus.changes)})"
    return "8259 interrupt controller" if "PicPit" in (config.test_devices or ()) else None


def _check(config: VmConfig) -> None:
    from freezeframe.config.validate import VCPUS_MAX

    if not 1 <= config.cpus.boot_vcpus <= VCPUS_MAX:
        raise Refused(f"A machine has 1 to {VCPUS_MAX} vCPUs: cpus.boot_vcpus is {config.cpus.boot_vcpus}")
    ids = [disk.id for disk in config.disks or ()]
    if len(set(ids)) != len(ids):
        raise Refused("two disks have the same id")


def _substitute(config: VmConfig, substitutes: Mapping[str, str]) -> VmConfig:
    known = {disk.id for disk in config.disks or ()}
    for name in substitutes:
        if name not in known:
            has = ", ".join(sorted(str(n) for n in known)) or "none"
            raise Refused(f"the snapshot has no disk {name!r} (it has {has})")
    disks = tuple(disk.replace(path=substitutes.get(disk.id or "", disk.path)) for disk in config.disks or ())
    return config.replace(disks=disks) if disks else config


def _restore_clock(state: Any, *, advance: bool) -> _core.Clock:
    """The software engine scales to any rate; where it is the host's, the host's counter is used as it is."""
    host_khz = tsc.host_khz()
    khz = saved.keys("the clock", state, dict.fromkeys(CLOCK_FIELDS, 0))["tsc_khz"]
    if isinstance(khz, int) and tsc.same(khz, host_khz):
        host_khz = khz
    return _core.Clock.from_state(state, host_khz, advance)


def _counted_clock(state: Any, seed: int) -> _core.Clock:
    fields = saved.fields("the clock", state, dict.fromkeys(CLOCK_FIELDS, (1 << 64) - 1))
    ahead = int.from_bytes(_core.blake3(f"wall clock {seed}".encode())[:8], "little") % YEAR_NS if seed else 0
    return _core.Clock.counted({**fields, "wall_ns": fields["wall_ns"] + ahead})
