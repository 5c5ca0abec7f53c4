"""Devices that a PC or QEMU has for programs that test a machine. A machine has those that its configuration names."""

from __future__ import annotations

from freezeframe import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from freezeframe.config import VmConfig
    from freezeframe.machine.parts import Parts, States

# Where the timer's input is on a PC's I/O APIC.
TIMER_PIN = 2


def ids(config: VmConfig) -> list[str]:
    """Component ids of the test devices."""
    from freezeframe.devices import debug_exit, fw_cfg, pic, pit, testdev

    names = {
        "Testdev": [testdev.ID],
        "DebugExit": [debug_exit.DebugExit.ID],
        "FwCfg": [fw_cfg.FwCfg.ID],
        "PicPit": [pic.ID, pit.ID],
    }
    return [name for device in config.test_devices or () for name in names[device]]


def build(parts: Parts, states: States) -> None:
    asked = parts.config.test_devices or ()
    if "PicPit" in asked:
        _pic_and_pit(parts, states)
    if "Testdev" in asked:
        _testdev(parts, states)
    if "DebugExit" in asked:
        from freezeframe.devices.debug_exit import DebugExit

        parts.add_port_device(DebugExit(states.get(DebugExit.ID, DebugExit.cold()), parts.exit))
    if "FwCfg" in asked:
        from freezeframe.devices.fw_cfg import FwCfg

        ram = sum(size for _, size in parts.map.regions)
        state = states.get(FwCfg.ID, FwCfg.cold())
        parts.add_port_device(FwCfg(state, parts.config.cpus.boot_vcpus, ram))


def _pic_and_pit(parts: Parts, states: States) -> None:
    from freezeframe.devices import pic, pit

    parts.intr = _core.IntrLine()
    parts.pic = controller = pic.Pic(states.get(pic.ID, pic.Pic.cold()), parts.intr.set)

    def irq0(level: bool) -> None:
        controller.set_line(0, level)
        parts.ioapic.set_line(TIMER_PIN, level)

    timer = pit.Pit(states.get(pit.ID, pit.Pit.cold()), parts.clock, irq0)
    for base, size, registers in controller.ports():
        parts.bus.add_pio(base, size, registers)
    parts.bus.add_pio(pit.BASE, pit.SIZE, timer)
    parts.keyboard.use_timer(timer)
    parts.devices[pic.ID] = controller
    parts.devices[pit.ID] = parts.virtual[pit.ID] = timer


def _testdev(parts: Parts, states: States) -> None:
    from freezeframe.devices import testdev

    controller = parts.pic

    def set_line(number: int, level: bool) -> None:
        if controller is not None and number < 16:
            controller.set_line(number, level)
        parts.ioapic.set_line(number, level)

    device = testdev.TestDevice(states.get(testdev.ID, testdev.TestDevice.cold()), set_line)
    for base, size, registers in device.ports():
        parts.bus.add_pio(base, size, registers)
    parts.bus.add_mmio(testdev.WINDOW, testdev.WINDOW_SIZE, device.window())
    parts.devices[testdev.ID] = device


def connect(parts: Parts) -> None:
    """Once there is an engine. Raises `NotSupported` where it cannot take the 8259s' interrupts."""
    if parts.pic is not None and parts.intr is not None:
        parts.engine.connect_pic(parts.control, parts.intr, parts.pic.acknowledge)
